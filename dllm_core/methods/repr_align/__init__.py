"""Masked diffusion with its hidden states held close to those of the frozen model it came from."""
