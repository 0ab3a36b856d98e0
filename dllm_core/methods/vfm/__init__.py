"""Variational flow maps for text (after arXiv:2603.07276): learned noise and a map that decodes in a few passes."""
