"""Sizes of the networks, and what they cost. Imports no torch.

D width of the base model's states, K latent dimension, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from dllm_core.layers import sizes
from dllm_core.methods.latent_options import HeadedSizes
from dllm_core.methods.requirements import BaseShape


class Shape(HeadedSizes):
    """Widths and depths of the five networks.

    Attributes:
        latent_dim: K; None is full width, D.
        encoder_width, encoder_depth: Perceiver E_z.
        decoder_width, decoder_depth: Perceiver D_z.
        denoiser_width, denoiser_depth: DiT.
        token_width, token_depth: token decoder D_w.
        prompt_depth: blocks of the prompt encoder, at the width of the DiT.
        token_head: `frozen` reads tokens out along the base model's normalised embeddings; `own` trains a matrix.
    """

    latent_dim: PositiveInt | None = 768
    encoder_width: PositiveInt
    encoder_depth: PositiveInt
    decoder_width: PositiveInt
    decoder_depth: PositiveInt
    denoiser_width: PositiveInt
    denoiser_depth: PositiveInt
    token_width: PositiveInt
    token_depth: PositiveInt
    prompt_depth: NonNegativeInt = 1
    token_head: Literal["frozen", "own"] = "frozen"

    def latent(self, hidden: int) -> int:
        """Return K for a base model of that width."""
        return self.latent_dim or hidden


def _square(width: int, encoder: int, denoiser: int, token: int, **more: object) -> Shape:
    """Return a shape whose networks all have one width."""
    sizes_of = {f"{name}_width": width for name in ("encoder", "decoder", "denoiser", "token")}
    depths = {"encoder_depth": encoder, "decoder_depth": encoder, "denoiser_depth": denoiser, "token_depth": token}
    return Shape.model_validate({**sizes_of, **depths, **more})


SHAPES: dict[str, Shape] = {
    "smoke": _square(64, 1, 2, 1, latent_dim=32, head_width=16),
    "laptop": _square(384, 2, 4, 1, latent_dim=256),
    "qwen3_1_7b": _square(768, 6, 8, 3, latent_dim=768),
    "qwen3_6_35b_a3b": _square(2048, 4, 3, 2, latent_dim=None, token_head="own"),
    "qwen3_6_27b": _square(5120, 4, 4, 2, latent_dim=None, token_head="own"),
    "paper": _square(768, 6, 12, 3, latent_dim=768, token_head="own"),
}
"""`qwen3_6_*`: the widths of the original system's speed figures; `paper`: the sizes of arXiv:2605.07933."""

BASES: dict[str, BaseShape] = {
    "qwen3_6_35b_a3b": BaseShape(hidden=2048, layers=40, vocab=248_320, parameters=35_000_000_000),
    "qwen3_6_27b": BaseShape(hidden=5120, layers=64, vocab=248_320, parameters=27_000_000_000),
    "paper": BaseShape(hidden=768, layers=12, vocab=50_304, parameters=124_000_000),
    "qwen3_1_7b": BaseShape(hidden=2048, layers=28, vocab=151_936, parameters=1_720_000_000),
    "laptop": BaseShape(hidden=576, layers=30, vocab=49_216, parameters=134_500_000),
}
"""The base models that the named shapes were made for, for tables and benchmarks without weights."""


def parameter_table(shape: Shape, base: BaseShape) -> dict[str, int]:
    """Return module -> trained parameters; a test compares it with the modules."""
    hidden, latent = base.hidden, shape.latent(base.hidden)
    enc, dec, den, tok = shape.encoder_width, shape.decoder_width, shape.denoiser_width, shape.token_width
    table = {
        "latent encoder": hidden * latent  # straight path
        + hidden * enc
        + enc
        + enc * latent
        + sizes.perceiver(enc, shape.encoder_depth, shape.heads(enc)),
        "latent decoder": latent * hidden
        + latent * dec
        + dec
        + dec * hidden
        + sizes.perceiver(dec, shape.decoder_depth, shape.heads(dec)),
        "denoiser": 2 * latent * den + den * latent + latent + sizes.dit(den, shape.denoiser_depth, shape.heads(den)),
        "prompt encoder": hidden * den + sizes.transformer(den, shape.prompt_depth, shape.heads(den)),
        "token decoder": hidden * hidden
        + hidden  # intercept
        + hidden * tok
        + tok * hidden
        + 1
        + sizes.transformer(tok, shape.token_depth, shape.heads(tok)),
    }
    if shape.token_head == "own":
        table["token head"] = hidden * base.vocab
    return table


def forward_flops(shape: Shape, base: BaseShape, slots: float, prompt: float) -> dict[str, float]:
    """Return network -> operations of a forward pass per response position: 2 per weight that a position meets.

    Attention scores come on top, over all keys, as in `Backbone.flops_forward`. Keys and values of a Perceiver are made
    of input and latents: 2 W^2 more a layer, and twice the keys. Modulations are made once a row and not counted.

    Args:
        shape: sizes.
        base: the base model's shape.
        slots: response positions of a sequence.
        prompt: prompt positions of a sequence.
    """
    hidden, latent = base.hidden, shape.latent(base.hidden)
    enc, dec, den, tok = shape.encoder_width, shape.decoder_width, shape.denoiser_width, shape.token_width
    weights = {
        "latent encoder": hidden * (latent + enc) + enc * latent + 14 * enc * enc * shape.encoder_depth,
        "latent decoder": latent * (hidden + dec) + dec * hidden + 14 * dec * dec * shape.decoder_depth,
        "denoiser": 3 * latent * den + 12 * den * den * shape.denoiser_depth,
        "token decoder": hidden * hidden + 2 * hidden * tok + 12 * tok * tok * shape.token_depth,
        "token head": hidden * base.vocab,
        # per prompt position
        "prompt encoder": hidden * den + (12 * shape.prompt_depth + 2 * shape.denoiser_depth) * den * den,
    }
    scores = {
        "latent encoder": sizes.score_flops(enc, shape.encoder_depth, 2 * slots),
        "latent decoder": sizes.score_flops(dec, shape.decoder_depth, 2 * slots),
        "denoiser": sizes.score_flops(den, shape.denoiser_depth, prompt + slots),
        "token decoder": sizes.score_flops(tok, shape.token_depth, slots),
        "token head": 0.0,
        "prompt encoder": sizes.score_flops(den, shape.prompt_depth, prompt),
    }
    return {network: 2.0 * weights[network] + scores[network] for network in weights}
