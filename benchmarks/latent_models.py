"""Latent diffusion models of a named shape with random weights, and what a generation must compute and move.

B batch, L new tokens, P prompt tokens, S steps, K latent dimension, W width of a network, D width of the states,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_core.backbone.contract import Contract
from dllm_core.corruption.adaptive_time import AdaptiveTimes
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.ldlm.options import Options
from dllm_core.methods.ldlm.plans import Shape as Work
from dllm_core.methods.ldlm.shapes import BASES as NAMED_BASES
from dllm_core.methods.ldlm.shapes import SHAPES
from dllm_core.methods.requirements import BaseShape
from dllm_core.training.ema import Ema

BASES = {**NAMED_BASES, "smoke": BaseShape(hidden=48, layers=2, vocab=512, parameters=0)}
"""`smoke` is for tests of the benchmark alone."""


@torch.no_grad()
def random_model(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Method:
    """Return a generating model of a named shape, made where and as it runs: no copy in fp32, no averages.

    Every matrix is N(0, 1 / inputs), so that states keep their size and nothing is zero.
    """
    base = BASES[name]
    contract = Contract(mask_token_id=base.vocab, num_tokens=base.vocab)
    with torch.device("meta"):
        method = Method(None, Options(shape=name), base=Base(contract, base.layers, (), base.hidden))
    method.ema = Ema((), 0.0)  # averages in fp32 would be the larger part of the memory
    method.to(dtype=dtype).to_empty(device=device)
    method.ema, method.times = Ema((), 0.0), AdaptiveTimes(1)
    generator = torch.Generator(device=device).manual_seed(seed)
    for key, parameter in method.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            is_gain = "norm" in key and key.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.02, generator=generator)
    method.mean_D.zero_()
    method.std_D.fill_(1.0)
    return method.requires_grad_(False).eval()


@dataclass(frozen=True)
class Pass:
    """One pass of a network within a generation.

    Attributes:
        name: of the network.
        times: how often it runs.
        flops: of one pass; 2 a multiplication.
        weights: numbers of the matrices that one pass reads, each once.
        activations: numbers that go into and come out of its matrix products and attentions.
    """

    name: str
    times: int
    flops: float
    weights: float
    activations: float


def _products(rows: float, *sizes: tuple[int, int]) -> tuple[float, float, float]:
    """Return (flops, weights, activations) of matrix products [rows, inputs] x [inputs, outputs]."""
    weights = float(sum(i * o for i, o in sizes))
    return 2.0 * rows * weights, weights, rows * sum(i + o for i, o in sizes)


def _blocks(
    batch: int, queries: int, keys: int, width: int, depth: int, *, looks_elsewhere: int = 0
) -> tuple[float, float, float]:
    """Return the same of transformer blocks; `looks_elsewhere` rows of further states become keys and values."""
    rows = batch * queries
    flops, weights, activations = _products(
        rows, (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
    )
    flops += 4.0 * batch * queries * keys * width + 2.0 * batch * looks_elsewhere * 2 * width * width
    activations += batch * width * (2 * queries + 2 * keys + 3 * looks_elsewhere)
    return depth * flops, depth * weights, depth * activations


def _sum(*parts: tuple[float, float, float]) -> tuple[float, float, float]:
    flops, weights, activations = (sum(column) for column in zip(*parts, strict=True))
    return flops, weights, activations


def passes(name: str, work: Work) -> list[Pass]:
    """Return what a generation consists of.

    Modulations and tables do not depend on the input and are not counted, however often an implementation makes them;
    neither are norms and other element-wise work, and no gathering of embeddings.
    """
    shape, base = SHAPES[name], BASES[name]
    hidden, latent = base.hidden, shape.latent(base.hidden)
    den, dec, tok = shape.denoiser_width, shape.decoder_width, shape.token_width
    batch, prompt, tokens = work.batch, work.prompt, work.tokens
    rows, prompt_rows = batch * tokens, batch * prompt
    guided = 1 if work.guidance == 1.0 else 2
    prefix = _products(prompt_rows, (den, 2 * den))
    reading = _sum(
        _products(prompt_rows, (hidden, den)),
        _blocks(batch, prompt, prompt, den, shape.prompt_depth),
        *[prefix] * shape.denoiser_depth,
    )
    step = _sum(
        _products(rows, (2 * latent, den), (den, latent)),
        _blocks(batch, tokens, prompt + tokens, den, shape.denoiser_depth),
    )
    decoding = _sum(
        _products(rows, (latent, dec), (latent + dec, hidden)),
        _blocks(batch, tokens, 2 * tokens, dec, shape.decoder_depth, looks_elsewhere=tokens),
    )
    wording = _sum(
        _products(rows, (hidden, tok), (hidden + tok, hidden)),
        _blocks(batch, tokens, tokens, tok, shape.token_depth),
    )
    return [
        Pass("prompt", 1, *reading),
        Pass("denoiser", guided * work.steps, *step),
        Pass("latent decoder", 1, *decoding),
        Pass("token decoder", 1, *wording),
        Pass("token head", 1, *_products(rows, (hidden, base.vocab))),
    ]
