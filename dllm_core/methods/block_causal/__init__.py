"""Masked diffusion inside blocks, autoregressive between them: the conversion that can keep keys and values exactly."""
