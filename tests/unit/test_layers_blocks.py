"""Transformer, Perceiver, DiT and time embedding against loops in float64; padding, conditioning made once, counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.layers import sizes
from dllm_core.layers.attention import Attention, key_mask, rotation
from dllm_core.layers.dit import DiT, DiTBlock, Modulations
from dllm_core.layers.feedforward import FeedForward
from dllm_core.layers.perceiver import Perceiver
from dllm_core.layers.time_embedding import TimeEmbedding, sinusoids
from dllm_core.layers.transformer import Transformer
from tests.unit import layers_oracle as oracle

WIDTH, HEADS = 12, 3
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 rotary tables
TIMES = (0.9, 0.25)


def _states(length: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.double)


def _dit(depth: int = 2) -> DiT:
    network = oracle.randomise(DiT(WIDTH, depth, HEADS))
    assert isinstance(network, DiT)
    return network


def _at(network: DiT, times: tuple[float, ...] = TIMES) -> Modulations:
    return network.modulations(torch.tensor(times, dtype=torch.double)[:, None])


# --- transformer and Perceiver


@torch.no_grad()
def test_transformer_is_its_loops() -> None:
    network = oracle.randomise(Transformer(WIDTH, 2, HEADS))
    x, at = _states(4), torch.tensor([[-2, -1, 0, 1], [3, 9, 4, 4]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    got = network(x, at, causal[None, None])
    for b in range(2):
        torch.testing.assert_close(got[b], oracle.transformer(network, x[b], at[b].tolist(), causal), **CLOSE)


@pytest.mark.parametrize("given", ["none", "input", "latents", "both"])
@torch.no_grad()
def test_perceiver_is_its_loops(given: str) -> None:
    """A mask of one of the two alone is obeyed as well."""
    network = oracle.randomise(Perceiver(WIDTH, 2, HEADS))
    x, latents = _states(4), _states(3)
    at_x, at_latents = torch.tensor([[-2, -1, 0, 1], [5, 6, 7, 9]]), torch.tensor([[0, 1, 2], [-6, 6, 8]])
    visible_x = torch.tensor([[False, True, True, True], [True, False, True, False]])
    visible_latents = torch.tensor([[True, True, False], [True, False, True]])
    if given in ("none", "latents"):
        visible_x[:] = True
    if given in ("none", "input"):
        visible_latents[:] = True
    got = network(
        x,
        latents,
        at_x,
        at_latents,
        visible_x if given in ("input", "both") else None,
        visible_latents if given in ("latents", "both") else None,
    )
    for b in range(2):
        visible = torch.cat((visible_x[b], visible_latents[b]))
        want = oracle.perceiver(network, x[b], latents[b], at_x[b].tolist(), at_latents[b].tolist(), visible)
        torch.testing.assert_close(got[b], want, **CLOSE)


@torch.no_grad()
def test_padding_does_not_reach_a_perceiver_row() -> None:
    network = oracle.randomise(Perceiver(WIDTH, 2, HEADS))
    x, latents = _states(5), _states(4)
    x[1, 3:], latents[1, 2:] = 1e3, -1e3
    at_x, at_latents = torch.arange(5), torch.arange(4)
    visible_x, visible_latents = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    visible_x[1, 3:] = visible_latents[1, 2:] = False
    got = network(x, latents, at_x, at_latents, visible_x, visible_latents)
    torch.testing.assert_close(got[:1], network(x[:1], latents[:1], at_x, at_latents))
    torch.testing.assert_close(got[1:, :2], network(x[1:, :3], latents[1:, :2], at_x[:3], at_latents[:2]))


# --- DiT


@torch.no_grad()
def test_a_fresh_block_is_the_identity() -> None:
    block, x, by = DiTBlock(WIDTH, HEADS), _states(4).float(), rotation(torch.arange(4), WIDTH // HEADS)
    for t in torch.tensor([[0.0], [0.7]]):
        modulation = block.modulation(F.silu(TimeEmbedding(WIDTH)(t)))
        assert torch.equal(block(x, modulation, by, None, None), x)
    network = DiT(WIDTH, 3, HEADS)
    got = network(x, network.modulations(torch.rand(2, 1)), by, network.prefix(_states(2).float(), torch.arange(2)))
    torch.testing.assert_close(got, F.layer_norm(x, (WIDTH,)))


def test_a_fresh_network_can_start_to_learn() -> None:
    network = DiT(WIDTH, 1, HEADS)
    out = network(_states(4).float(), network.modulations(torch.rand(2, 1)), rotation(torch.arange(4), WIDTH // HEADS))
    (out * torch.randn_like(out)).sum().backward()
    gates = network.blocks[0].modulation.weight.grad.chunk(6)
    assert gates[2].any()
    assert gates[5].any()
    assert network.final_modulation.weight.grad.any()


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_dit_is_its_loops(masked: bool) -> None:
    network = _dit()
    x, context = _states(3), _states(2)
    at_x, at_context = torch.tensor([[0, 1, 2], [4, 5, 7]]), torch.tensor([[-2, -1], [-7, 3]])
    visible_x = torch.tensor([[True, True, False], [True, True, True]]) if masked else None
    visible_context = torch.tensor([[False, True], [False, False]]) if masked else None
    prefix = network.prefix(context, at_context, visible_context)
    got = network(x, _at(network), rotation(at_x, network.head_width), prefix, visible_x)
    for b in range(2):
        visible = torch.ones(5, dtype=torch.bool)
        if visible_x is not None and visible_context is not None:
            visible = torch.cat((visible_context[b], visible_x[b]))
        want = oracle.dit(network, x[b], TIMES[b], at_x[b].tolist(), context[b], at_context[b].tolist(), visible)
        torch.testing.assert_close(got[b], want, **CLOSE)


@torch.no_grad()
def test_a_prefix_is_clean_tokens_at_time_zero() -> None:
    """One block over [context; x], each position at its own time, gives at x what the prefix gives."""
    network, x, context = _dit(depth=1), _states(4), _states(3)
    at_x, at_context = torch.arange(4), torch.arange(-3, 0)
    t_BM = torch.tensor([[0.0] * 3 + [t] * 4 for t in TIMES])
    together = network(
        torch.cat((context, x), dim=1),
        network.modulations(t_BM),
        rotation(torch.cat((at_context, at_x)), network.head_width),
    )
    by = rotation(at_x, network.head_width)
    torch.testing.assert_close(
        network(x, _at(network), by, network.prefix(context, at_context)), together[:, 3:], rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_a_prefix_made_once_serves_every_time() -> None:
    """What is kept from before a loop equals what is made inside it, and a loop changes nothing of it."""
    network, context, at_context = _dit(), _states(3), torch.arange(-3, 0)
    by = rotation(torch.arange(4), network.head_width)
    times = torch.tensor([1.0, 0.6, 0.2])
    kept, all_times = network.prefix(context, at_context), network.modulations(times)
    x = y = _states(4)
    for i, t in enumerate(times):
        x = x - 0.1 * network(x, all_times.at(i), by, kept)
        y = y - 0.1 * network(y, network.modulations(t.expand(2, 1)), by, network.prefix(context, at_context))
        torch.testing.assert_close(x, y)


@torch.no_grad()
def test_a_hidden_prefix_is_no_prefix() -> None:
    network, x, by = _dit(), _states(4), rotation(torch.arange(4), WIDTH // HEADS)
    visible = torch.tensor([[True, True, True], [False, False, False]])
    context = _states(3)
    got = network(x, _at(network), by, network.prefix(context, torch.arange(-3, 0), visible))
    without, with_all = (
        network(x, _at(network), by),
        network(x, _at(network), by, network.prefix(context, torch.arange(-3, 0))),
    )
    torch.testing.assert_close(got[1], without[1])
    torch.testing.assert_close(got[0], with_all[0])
    assert (without - with_all).abs().amax((1, 2)).min() > 1e-2


@torch.no_grad()
def test_padding_does_not_reach_a_dit_row() -> None:
    network, x, context = _dit(), _states(5), _states(3)
    x[1, 3:], context[1, :2] = 1e3, -1e3
    visible_x, visible_context = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    visible_x[1, 3:] = visible_context[1, :2] = False
    at_x, at_context = torch.arange(5), torch.arange(-3, 0)
    by = rotation(at_x, network.head_width)
    got = network(x, _at(network), by, network.prefix(context, at_context, visible_context), visible_x)
    short = rotation(at_x[:3], network.head_width)
    alone = network.prefix(context[1:, 2:], at_context[2:])
    torch.testing.assert_close(got[1:, :3], network(x[1:, :3], _at(network, TIMES[1:]), short, alone))
    full = network(x[:1], _at(network, TIMES[:1]), by, network.prefix(context[:1], at_context))
    torch.testing.assert_close(got[:1], full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dit", "perceiver"])
def test_a_row_of_padding_alone_leaves_finite_gradients(kind: str, dtype: torch.dtype) -> None:
    network = oracle.randomise(DiT(WIDTH, 2, HEADS) if kind == "dit" else Perceiver(WIDTH, 2, HEADS)).to(dtype)
    x, context = _states(4).to(dtype).requires_grad_(), _states(3).to(dtype)
    visible = torch.tensor([[True], [False]])
    if isinstance(network, DiT):
        prefix = network.prefix(context, torch.arange(3), visible.expand(2, 3))
        by = rotation(torch.arange(4), network.head_width)
        out = network(x, network.modulations(torch.rand(2, 1)), by, prefix, visible.expand(2, 4))
    else:
        out = network(context, x, torch.arange(3), torch.arange(4), visible.expand(2, 3), visible.expand(2, 4))
    out[0].sum().backward()
    assert torch.isfinite(out).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in [x, *network.parameters()])


@torch.no_grad()
def test_modulations_of_many_times_are_those_of_each() -> None:
    network, times = _dit(), torch.rand(3, 4)
    flat = network.modulations(times.flatten())
    together = network.modulations(times)
    for i, t in enumerate(times.flatten()):
        single, at = network.modulations(t), flat.at(i)
        row, column = divmod(i, 4)
        every = zip(
            (*single.blocks, single.final), (*at.blocks, at.final), (*together.blocks, together.final), strict=True
        )
        for want, got, of_all in every:
            assert got.shape == (1, 1, len(want))
            torch.testing.assert_close(got[0, 0], want)
            torch.testing.assert_close(of_all[row, column], want)


# --- time and counts


def test_sinusoids_are_their_closed_form() -> None:
    times = [0.0, 1e-3, 0.31, 1.0]
    got = sinusoids(torch.tensor(times), 8)
    want = [[f(1000.0 * t * 10_000.0 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)] for t in times]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=3e-4)
    assert sinusoids(torch.rand(2, 3)).shape == (2, 3, sizes.TIME_FREQUENCIES)


@torch.no_grad()
def test_time_embedding_is_its_formula() -> None:
    module = oracle.randomise(TimeEmbedding(5))
    t = torch.tensor([[0.2], [0.9]])
    wave = sinusoids(t).double()
    hidden = wave @ module.inner.weight.T + module.inner.bias
    want = (hidden / (1 + torch.exp(-hidden))) @ module.out.weight.T + module.out.bias
    torch.testing.assert_close(module(t), want)
    assert (module(t)[0] - module(t)[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("width", "depth", "heads"), [(12, 2, 3), (32, 1, 4), (64, 3, 16), (8, 0, 1)])
def test_counts_are_those_of_the_modules(width: int, depth: int, heads: int) -> None:
    pairs: list[tuple[nn.Module, int]] = [
        (Attention(width, heads), sizes.attention(width, heads)),
        (FeedForward(width), sizes.feedforward(width)),
        (FeedForward(width, 3), sizes.feedforward(width, 3)),
        (Transformer(width, depth, heads), sizes.transformer(width, depth, heads)),
        (Perceiver(width, depth, heads), sizes.perceiver(width, depth, heads)),
        (TimeEmbedding(width), sizes.time_embedding(width)),
        (DiT(width, depth, heads), sizes.dit(width, depth, heads)),
    ]
    for module, count in pairs:
        assert count == sum(p.numel() for p in module.parameters()), type(module).__name__


# --- compilation


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)  # an error where Python looks into a tensor


@pytest.mark.parametrize("kind", ["dit", "perceiver", "transformer"])
@torch.no_grad()
def test_one_graph_without_a_look_at_the_data(kind: str) -> None:
    x, context = _states(4).bfloat16(), _states(3).bfloat16()
    visible = torch.tensor([[True, True, False], [False, False, False]])
    at_x, at_context = torch.arange(4), torch.arange(-3, 0)
    if kind == "dit":
        network = _dit().bfloat16()

        def run(x: Tensor, t: Tensor) -> Tensor:
            prefix = network.prefix(context, at_context, visible)
            return network(x, network.modulations(t), rotation(at_x, network.head_width), prefix)

    else:
        other = oracle.randomise(
            Perceiver(WIDTH, 2, HEADS) if kind == "perceiver" else Transformer(WIDTH, 2, HEADS)
        ).bfloat16()

        def run(x: Tensor, t: Tensor) -> Tensor:
            if kind == "transformer":
                return other(x, at_x, key_mask(visible[:, [0, 1, 2, 0]]))
            return other(context, x, at_context, at_x, visible)

    t = torch.tensor(TIMES)[:, None]
    torch.testing.assert_close(_compiled(run)(x, t), run(x, t))
