"""Metaflow flows: wiring only."""
