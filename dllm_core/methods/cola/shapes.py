"""Sizes of the networks, and what they cost. Imports no torch.

D width of the base model's states, K latent dimension of a token, V vocabulary.
"""

from __future__ import annotations

from pydantic import PositiveInt

from dllm_core.layers import sizes
from dllm_core.methods.latent_options import HeadedSizes
from dllm_core.methods.requirements import BaseShape


class Shape(HeadedSizes):
    """Widths and depths of the three networks.

    Attributes:
        latent_dim: K, of every token.
        encoder_width, encoder_depth: causal transformer from states to mean and log-variance.
        decoder_width, decoder_depth: causal transformer from latents to the rows that read tokens out.
        prior_width, prior_depth: block-causal DiT.
    """

    latent_dim: PositiveInt
    encoder_width: PositiveInt
    encoder_depth: PositiveInt
    decoder_width: PositiveInt
    decoder_depth: PositiveInt
    prior_width: PositiveInt
    prior_depth: PositiveInt


def _shape(latent: int, encoder: tuple[int, int], decoder: tuple[int, int], prior: tuple[int, int], head: int) -> Shape:
    """Return a shape from (width, depth) pairs."""
    return Shape(
        latent_dim=latent,
        encoder_width=encoder[0],
        encoder_depth=encoder[1],
        decoder_width=decoder[0],
        decoder_depth=decoder[1],
        prior_width=prior[0],
        prior_depth=prior[1],
        head_width=head,
    )


SHAPES: dict[str, Shape] = {
    "smoke": _shape(16, (64, 1), (64, 1), (64, 2), 16),
    "laptop": _shape(64, (384, 1), (384, 2), (384, 6), 64),
    "qwen3_1_7b": _shape(64, (1024, 2), (1024, 4), (1024, 12), 64),
    "paper": _shape(16, (1536, 4), (1536, 4), (2048, 24), 128),
}
"""`paper`: widths and depths of arXiv:2605.06548 over a base of its own; the others follow the base in size."""

BASES: dict[str, BaseShape] = {
    "smoke": BaseShape(hidden=128, layers=4, vocab=1024, parameters=1_000_000),
    "laptop": BaseShape(hidden=576, layers=30, vocab=49_216, parameters=134_500_000),
    "qwen3_1_7b": BaseShape(hidden=2048, layers=28, vocab=151_936, parameters=1_720_000_000),
    "paper": BaseShape(hidden=1536, layers=24, vocab=100_352, parameters=1_000_000_000),
}
"""The base models that the named shapes were made for, for tables without weights."""


def parameter_table(shape: Shape, base: BaseShape) -> dict[str, int]:
    """Return module -> trained parameters; a test compares it with the modules."""
    hidden, latent = base.hidden, shape.latent_dim
    (enc, enc_depth, enc_heads), (dec, dec_depth, dec_heads), (pri, pri_depth, pri_heads) = map(
        shape.of, ("encoder", "decoder", "prior")
    )
    return {
        "encoder": (hidden + 1) * 2 * latent  # straight path
        + hidden  # what stands for a masked row
        + hidden * enc
        + enc * 2 * latent
        + sizes.transformer(enc, enc_depth, enc_heads),
        "decoder": (latent + 1) * hidden
        + latent * dec
        + dec * hidden
        + 1
        + sizes.transformer(dec, dec_depth, dec_heads),
        "prior": (latent + 1) * pri + (pri + 1) * latent + sizes.dit(pri, pri_depth, pri_heads),
    }


def vae_flops(shape: Shape, base: BaseShape, length: float) -> dict[str, float]:
    """Return network -> operations of a forward pass per position: 2 per weight that a position meets.

    Attention scores come on top, over all keys whether a causal mask hides them or not, as in `Backbone.flops_forward`.

    Args:
        shape: sizes.
        base: the base model's shape.
        length: positions of a document.
    """
    hidden, latent = base.hidden, shape.latent_dim
    enc, dec = shape.encoder_width, shape.decoder_width
    return {
        "encoder": 2.0 * (hidden * (2 * latent + enc) + 2 * enc * latent + 12 * enc * enc * shape.encoder_depth)
        + sizes.score_flops(enc, shape.encoder_depth, length),
        "decoder": 2.0 * (latent * (hidden + dec) + dec * hidden + 12 * dec * dec * shape.decoder_depth)
        + sizes.score_flops(dec, shape.decoder_depth, length),
        "head": 2.0 * hidden * base.vocab,
    }


def prior_flops(shape: Shape, clean: float, noisy: float) -> dict[str, float]:
    """Return half of the prior -> operations of a forward pass per position, attention scores as in `vae_flops`.

    Of the clean half the last block gives keys and values alone. Modulations are made once a row and not counted.

    Args:
        shape: sizes.
        clean, noisy: positions of a document's halves.
    """
    latent, width, depth = shape.latent_dim, shape.prior_width, shape.prior_depth
    return {
        "clean": 2.0 * (latent * width + 12 * width * width * (depth - 1) + 2 * width * width)
        + sizes.score_flops(width, depth - 1, clean),
        "noisy": 2.0 * (2 * latent * width + 12 * width * width * depth)
        + sizes.score_flops(width, depth, clean + noisy),
    }
