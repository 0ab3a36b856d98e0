"""Continuous latents per token: a causal text autoencoder on frozen states and a block-causal flow on its latents."""
