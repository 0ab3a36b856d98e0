"""How far kernels are from float64, forward and gradients, at odd sizes; every oracle here is plain torch in float64.

B batch, L positions, M rows, D hidden, V vocabulary, W width, N heads, H head width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import DTYPES, difference
from dllm_core.kernels import dispatch, masked_ce, token_stats

SIZES = ((1, 3, 97), (7, 5, 301), (33, 64, 49_153), (257, 576, 5_003), (130, 127, 151_936), (65, 2048, 151_937))
"""(M, D, V)."""
SMOKE_SIZES = ((1, 3, 97), (7, 5, 301))
TOLERANCE = {"fp32": 1e-3, "bf16": 1.5e-2}
"""Of ||got - want|| / ||want||: tf32 products, and logits rounded to bf16, stay below."""
TEMPERATURE = 0.7
LARGEST = 1e9
"""What an error that is not finite counts as: JSON has no word for it."""
DEFINITION = (
    "error = ||got - want|| / ||want|| of each output, want in float64 from the same inputs; the tolerance is "
    + ", ".join(f"{bound:g} in {name}" for name, bound in TOLERANCE.items())
)


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Send the dispatch to one implementation inside the context."""
    before = os.environ.get("DLLM_KERNELS")
    os.environ["DLLM_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("DLLM_KERNELS", None)
        if before is not None:
            os.environ["DLLM_KERNELS"] = before


def head_inputs(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, head, targets and blocked ids.

    Every second row points along the longest row of the head, its target, whose logit is far above all others; the rest
    have the least likely id as theirs. So rounding does not decide which are correct, the only ones with an entropy.
    """
    rows, depth, vocab = size
    generator = torch.Generator(device=device).manual_seed(seed)
    hidden_MD = torch.randn(rows, depth, device=device, generator=generator)
    weight_VD = torch.randn(vocab, depth, device=device, generator=generator) * 2 * depth**-0.5
    blocked_V = torch.rand(vocab, device=device, generator=generator) < 0.2
    blocked_V[0], blocked_V[-1] = False, True
    chosen = int((~blocked_V).nonzero()[-1])
    weight_VD[chosen] *= 2 * weight_VD.norm(dim=1).max() / weight_VD[chosen].norm()
    hidden_MD[1::2] = 0.1 * hidden_MD[1::2] + 3 * weight_VD[chosen] / weight_VD[chosen].norm()
    hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
    logits_MV = hidden_MD.double() @ weight_VD.double().T
    targets_M = logits_MV.masked_fill(blocked_V, torch.inf).argmin(-1)
    targets_M[1::2] = chosen
    return hidden_MD, weight_VD, targets_M, blocked_V


def exact_stats(hidden_MD: Tensor, weight_VD: Tensor, blocked_V: Tensor) -> list[Tensor]:
    """Return the best and second log-probability and the entropy."""
    logp_MV = (hidden_MD.double() @ weight_VD[~blocked_V].double().T).log_softmax(-1)
    top_M2 = logp_MV.topk(2, dim=-1).values
    return [top_M2[:, 0], top_M2[:, 1], -(logp_MV.exp() * logp_MV).sum(-1)]


def exact_losses(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, blocked_V: Tensor, weights_3M: Tensor
) -> list[Tensor]:
    """Return total, nll and both gradients of all three terms, by autograd."""
    h_MD, w_VD = (x.detach().double().requires_grad_() for x in (hidden_MD, weight_VD))
    ce_M, path_M, entropy_M = weights_3M.double()
    z_MV = h_MD @ w_VD[~blocked_V].T
    target_M = ((~blocked_V).cumsum(0) - 1)[targets_M]
    nll_M = -z_MV.log_softmax(-1).gather(1, target_M[:, None])[:, 0]
    logq_MV = (z_MV / TEMPERATURE).log_softmax(-1)
    spread_M = -(logq_MV.exp() * logq_MV).sum(-1)
    hit_M = z_MV.argmax(-1) == target_M
    total = ((ce_M + path_M * torch.exp(-nll_M).detach()) * nll_M).sum() + (entropy_M * spread_M)[hit_M].sum()
    return [total.detach(), nll_M.detach(), *torch.autograd.grad(total, [h_MD, w_VD])]


def stats_error(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> float:
    """Return the largest error of `token_stats` as the dispatch has it."""
    hidden_MD, weight_VD, _, blocked_V = head_inputs(size, dtype, device, seed)
    got = token_stats.stats(hidden_MD, weight_VD, blocked_V, second=True, entropy=True)
    assert got.second_logprob_M is not None
    assert got.entropy_M is not None
    found = [got.top_logprob_M, got.second_logprob_M, got.entropy_M]
    want = exact_stats(hidden_MD, weight_VD, blocked_V)
    # a distribution with all its weight on one id has values of almost nothing: their error is absolute
    return difference([x + 1 for x in found], [x + 1 for x in want])


def losses_error(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> float:
    """Return the largest error of `token_losses`: total, nll, gradients of states and head."""
    hidden_MD, weight_VD, targets_M, blocked_V = head_inputs(size, dtype, device, seed)
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    weights_3M = torch.rand(3, len(hidden_MD), device=device, generator=generator) + 0.1
    h_MD, w_VD = (x.clone().requires_grad_() for x in (hidden_MD, weight_VD))
    ce_M, path_M, entropy_M = weights_3M
    out = masked_ce.token_losses(
        h_MD, w_VD, targets_M, ce_M=ce_M, path_M=path_M, entropy_M=entropy_M,
        entropy_temperature=TEMPERATURE, blocked_V=blocked_V,
    )  # fmt: skip
    grads = torch.autograd.grad(out.total, [h_MD, w_VD])
    want = exact_losses(hidden_MD, weight_VD, targets_M, blocked_V, weights_3M)
    return difference([out.total.detach(), out.nll_M, *grads], want)


KERNELS: dict[str, Callable[..., float]] = {"token_stats": stats_error, "masked_ce": losses_error}


def measure(device: torch.device, dtype_names: Sequence[str], *, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Return the error of every kernel, implementation, dtype and size that can run here.

    Args:
        device: where.
        dtype_names: keys of `DTYPES`.
        quick: two small sizes.
        seed: of the inputs.
    """
    found: list[dict[str, Any]] = []
    for dtype in dtype_names:
        obstacle = dispatch.triton_obstacle(device, DTYPES[dtype])
        for kernel, error in KERNELS.items():
            for name in ("reference", *(["triton"] if obstacle is None else [])):
                for size in SMOKE_SIZES if quick else SIZES:
                    with implementation(name):
                        value = min(error(size, DTYPES[dtype], device, seed), LARGEST)
                    row = {"kernel": kernel, "implementation": name, "dtype": dtype, "size": size}
                    found.append({**row, "error": value, "tolerance": TOLERANCE[dtype]})
    return found


# -- the element-wise parts of a latent generation --------------------------------------------------------------------

Parts = Any
"""`dllm_core.methods.ldlm.parts.Parts`, whose module needs pydantic beside it: this one does without."""


def part_cases(
    width: int, heads: int, batch: int, length: int, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, tuple[Callable[[Parts], list[Tensor]], list[Tensor]]]:
    """Return part -> (a call of an implementation, what it has to give in float64)."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device, generator=generator)).to(dtype)

    x_BLW, branch_BLW = draw(batch, length, width), draw(batch, length, width)
    gate_W, shift_W, scale_W = draw(width), draw(width), 1 + draw(width, scale=0.1)
    joint, half = draw(batch, length, 3 * width), width // heads
    cos, sin = (draw(length, 2, 1, half) for _ in range(2))
    state, x0_hat, noise = draw(batch, length, 64), draw(batch, length, 32), draw(batch, length, 32)
    numbers = (0.8, 0.3, 0.2, -0.1)

    def place(parts: Parts) -> list[Tensor]:
        keys, values = (joint.new_zeros(batch, heads, length + 3, half) for _ in range(2))
        return [parts.place(joint, heads, cos, sin, keys, values, 3), keys, values]

    def step(parts: Parts) -> list[Tensor]:
        from dllm_core.samplers.continuous import StepCoefficients

        found = state.clone()
        told = torch.tensor(numbers, device=device) if parts.in_tensors else StepCoefficients(*numbers)
        parts.step(found, x0_hat, noise, told)
        return [found]

    added = x_BLW.double() + branch_BLW.double()
    gated = x_BLW.double() + gate_W.double() * branch_BLW.double()
    return {
        "normed": (lambda p: [p.normed(x_BLW, scale_W, shift_W)], [_norm(x_BLW, scale_W, shift_W)]),
        "added_normed": (
            lambda p: list(p.added_normed(x_BLW, branch_BLW, scale_W, shift_W)),
            [added, _norm(added, scale_W, shift_W)],
        ),
        "modulated": (lambda p: [p.modulated(x_BLW, shift_W, scale_W)], [_norm(x_BLW, scale_W, shift_W)]),
        "gated_modulated": (
            lambda p: list(p.gated_modulated(x_BLW, gate_W, branch_BLW, shift_W, scale_W)),
            [gated, _norm(gated, scale_W, shift_W)],
        ),
        "place": (place, _placed(joint, heads, cos, sin)),
        "step": (step, [_stepped(state, x0_hat, noise, numbers)]),
    }


def _norm(x: Tensor, scale_W: Tensor, shift_W: Tensor) -> Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    # torch's own epsilon of a layer norm
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale_W.double() + shift_W.double()


def _placed(joint: Tensor, heads: int, cos: Tensor, sin: Tensor) -> list[Tensor]:
    from dllm_core.layers.attention import NORM_EPS

    batch = len(joint)
    query, key, value = joint.double().unflatten(-1, (3, heads, -1)).unbind(2)

    def turned(x: Tensor, group: int) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
        swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
        return (x * cos[:, group].double() + swapped * sin[:, group].double()).transpose(1, 2)

    room = joint.new_zeros(batch, heads, 3, query.shape[-1], dtype=torch.float64)
    keys, values = (torch.cat((room, x), dim=2) for x in (turned(key, 1), value.transpose(1, 2)))
    return [turned(query, 0), keys, values]


def _stepped(state: Tensor, x0_hat: Tensor, noise: Tensor, numbers: tuple[float, ...]) -> Tensor:
    x, before = state.double().chunk(2, dim=-1)
    c_x, c_x0, c_noise, c_before = numbers
    moved = c_x * x + c_x0 * x0_hat.double() + c_noise * noise.double() + c_before * before
    return torch.cat((moved, x0_hat.double()), dim=-1)


def measure_parts(device: torch.device, dtype_names: Sequence[str], *, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Return the errors of the latent sampler's parts: as written, and as a GPU runs them, through torch.compile."""
    from dllm_core.methods.ldlm import parts

    kinds = {"eager": parts.eager()}
    if device.type == "cuda":
        kinds["compiled"] = parts.compiled()
    found: list[dict[str, Any]] = []
    for dtype in dtype_names:
        width, heads, length = (48, 3, 5) if quick else (2048, 16, 65)
        cases = part_cases(width, heads, 3, length, DTYPES[dtype], device, seed)
        for part, (call, want) in cases.items():
            for name, kind in kinds.items():
                row = {"kernel": f"ldlm {part}", "implementation": name, "dtype": dtype, "size": (3, length, width)}
                value = min(difference(call(kind), want), LARGEST)
                found.append({**row, "error": value, "tolerance": TOLERANCE[dtype]})
    return found
