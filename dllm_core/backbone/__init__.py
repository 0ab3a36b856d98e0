"""Load an autoregressive checkpoint and make it a bidirectional denoiser."""
