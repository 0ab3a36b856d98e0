"""Latent diffusion language model: a text autoencoder on frozen states and a diffusion on its latents."""
