"""Masked diffusion with an independent random mask: the baseline conversion."""
