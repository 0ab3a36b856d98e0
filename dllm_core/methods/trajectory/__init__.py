"""Aligned masked diffusion, then training on the order in which a student would commit the tokens."""
