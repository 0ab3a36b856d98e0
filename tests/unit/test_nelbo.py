"""Both estimators of the bound against enumeration of a model with 3^5 sequences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.evals.nelbo import block_nelbo, block_views, count_views, nelbo, nelbo_by_rate, rate_views
from dllm_core.evals.views import Views, block_of, counts_from, fixed_count, fixed_rate, score, stratified
from tests.unit.toy_denoiser import TableDenoiser, toy_batch

L = 5
TOKENS = [2, 0, 1, 1, 2]


def weighted(parts: list[tuple[torch.Tensor, torch.Tensor, float]]) -> list[Views]:
    """Turn (mask, weight, probability) of single views into views whose total is the expectation."""
    return [Views(torch.tensor([0]), mask, weight * probability) for mask, weight, probability in parts]


@pytest.mark.parametrize("skew", [0.0, 0.8])
def test_count_estimator_expects_the_exact_bound(skew: float) -> None:
    method, batch = TableDenoiser(L, skew), toy_batch([[TOKENS]])
    orders = list(itertools.permutations(range(L)))
    parts = []
    for k in range(1, L + 1):
        for order in orders:
            key = torch.cat([torch.tensor([-1.0]), torch.tensor(order).float()])[None]  # the prompt's key is smallest
            parts.append((*fixed_count(batch.response_BL, torch.tensor([k]), key), 1 / (L * len(orders))))
    nats_B, _ = score(method, batch, weighted(parts), batch_size=64, on_views=None)
    assert nats_B.item() == pytest.approx(method.exact_bound(TOKENS), abs=1e-9)


@pytest.mark.parametrize("skew", [0.0, 0.8])
def test_rate_estimator_expects_the_exact_bound(skew: float) -> None:
    method, batch = TableDenoiser(L, skew), toy_batch([[TOKENS]])
    nodes, quadrature = np.polynomial.legendre.leggauss(6)  # exact for the polynomials in t that arise
    parts = []
    for node, share in zip(nodes, quadrature, strict=True):
        t = float(node + 1) / 2
        for subset in itertools.product([False, True], repeat=L):
            key = torch.tensor([[0.0, *(t / 2 if hidden else (1 + t) / 2 for hidden in subset)]])
            probability = float(share) / 2 * t ** sum(subset) * (1 - t) ** (L - sum(subset))
            rate = torch.tensor([t], dtype=torch.float64)
            parts.append((*fixed_rate(batch.response_BL, rate, key), probability))
    nats_B, _ = score(method, batch, weighted(parts), batch_size=64, on_views=None)
    assert nats_B.item() == pytest.approx(method.exact_bound(TOKENS), abs=1e-7)


def test_exact_conditionals_make_the_bound_tight() -> None:
    method = TableDenoiser(L)
    assert method.exact_bound(TOKENS) == pytest.approx(-method.log_p(TOKENS), abs=1e-9)
    assert TableDenoiser(L, 0.8).exact_bound(TOKENS) != pytest.approx(-method.log_p(TOKENS), abs=1e-2)


@pytest.mark.parametrize(("offset", "samples"), [(0.0, 4), (0.37, 7), (0.99, 3)])
def test_strata_are_systematic(offset: float, samples: int) -> None:
    u_S = stratified(torch.tensor([offset]), samples)[0]
    assert ((u_S * samples).floor() == torch.arange(samples)).all()
    assert (u_S < 1).all()


@pytest.mark.parametrize("size", [1, 5, 128])
def test_counts_are_uniform_over_offsets(size: int) -> None:
    grid_G = (torch.arange(1000 * size, dtype=torch.float64) + 0.5) / (1000 * size)
    for samples in (1, 8):
        draws = stratified(grid_G, samples).flatten()
        counts = torch.bincount(counts_from(draws, torch.tensor(size)), minlength=size + 1)
        assert counts[0] == 0
        assert (counts[1:].double() / counts.sum() - 1 / size).abs().max() < 0.02 / size


def test_whole_estimators_converge_to_the_bound() -> None:
    """End to end on rows of different length: systematic sampling must not bias what the pieces get right."""
    method = TableDenoiser(4, 0.8)
    rows = [[2, 0, 1, 1], [1, 1, 0, 2]]
    batch = toy_batch([[r] for r in rows])
    noise = NoiseSource(3)
    for estimator in (nelbo, nelbo_by_rate):
        found = estimator(method, batch, samples=1500, noise=noise, batch_size=256)
        assert found.tokens == (4.0, 4.0)
        for value, row in zip(found.sums, rows, strict=True):
            assert value == pytest.approx(method.exact_bound(row), rel=0.03)


def test_block_size_one_is_the_left_to_right_likelihood() -> None:
    method, batch = TableDenoiser(L, 0.8), toy_batch([[TOKENS]])
    chain = sum(method.nll(TOKENS, tuple(range(i)), i) for i in range(L))
    found = block_nelbo(method, batch, samples=1, block_size=1, noise=NoiseSource(0))
    assert found.sums[0] == pytest.approx(chain, abs=1e-9)


@pytest.mark.parametrize("block_size", [2, 3, 5])
def test_block_estimator_with_a_ragged_last_block(block_size: int) -> None:
    method, batch = TableDenoiser(L, 0.8), toy_batch([[TOKENS]])
    exact = method.exact_block_bound(TOKENS, block_size)
    found = block_nelbo(method, batch, samples=2400, block_size=block_size, noise=NoiseSource(1), batch_size=512)
    assert found.sums[0] == pytest.approx(exact, rel=0.03)


def test_documents_of_a_row_add_up() -> None:
    method = TableDenoiser(3, 0.8)
    first, second = [0, 2, 1], [1, 1, 2]
    packed, alone = toy_batch([[first, second]]), [toy_batch([[d]]) for d in (first, second)]
    assert block_of(packed, 2).tolist() == [[-1, 0, 0, 1, -1, 0, 0, 1]]
    noise = NoiseSource(5)
    chain = sum(block_nelbo(method, b, samples=3, block_size=1, noise=noise).sums[0] for b in alone)
    assert block_nelbo(method, packed, samples=3, block_size=1, noise=noise).sums[0] == pytest.approx(chain, abs=1e-9)
    whole = nelbo(method, packed, samples=2000, noise=noise, batch_size=256).sums[0]
    assert whole == pytest.approx(method.exact_bound(first) + method.exact_bound(second), rel=0.03)


def test_views_hide_responses_only_and_force_nothing() -> None:
    batch = toy_batch([[[1, 2, 0, 1], [2, 2]], [[0, 1]]])
    views = [*count_views(batch, 16, NoiseSource(0)), *rate_views(batch, 16, NoiseSource(0))]
    assert not any((v.masked_VL & ~batch.response_BL).any() for v in views)
    assert all(((v.weight_VL != 0) == v.masked_VL).all() for v in views)
    assert any((~v.masked_VL.any(1)).any() for v in views[16:]), "independent masks of a short row are empty at times"


def test_later_blocks_are_hidden_and_unscored() -> None:
    batch = toy_batch([[[1, 2, 0, 1, 2]]])
    block_L = block_of(batch, 2)[0]
    seen = []
    for view in block_views(batch, 6, 2, NoiseSource(0)):
        scored = (view.weight_VL[0] != 0).nonzero()[:, 0]
        (block,) = set(block_L[scored].tolist())
        assert view.masked_VL[0][block_L > block].all()
        assert not view.masked_VL[0][block_L < block].any()
        seen.append(block)
    assert sorted(seen) == [0, 0, 1, 1, 2, 2], "every block is covered"


def test_result_does_not_depend_on_batching_or_company() -> None:
    method = TableDenoiser(4, 0.8)
    batch = toy_batch([[[2, 0, 1, 1]], [[1, 1, 0, 2]], [[0, 0, 2, 1]]])
    noise = NoiseSource(7)
    together = nelbo(method, batch, samples=5, noise=noise, batch_size=4).sums
    assert together == pytest.approx(nelbo(method, batch, samples=5, noise=noise, batch_size=1).sums, abs=1e-12)
    alone = nelbo(method, batch.rows(1, 2), samples=5, noise=noise).sums
    assert alone[0] == pytest.approx(together[1], abs=1e-12)
    blocks = block_nelbo(method, batch, samples=4, block_size=2, noise=noise, batch_size=3).sums
    alone = block_nelbo(method, batch.rows(2, 3), samples=4, block_size=2, noise=noise).sums
    assert alone[0] == pytest.approx(blocks[2], abs=1e-12)


def test_views_are_counted_and_batched() -> None:
    method, batch = TableDenoiser(4), toy_batch([[[2, 0, 1, 1]], [[1, 1, 0, 2]], [[0, 0, 2, 1]]])
    done: list[int] = []
    nelbo(method, batch, samples=5, noise=NoiseSource(0), batch_size=4, on_views=done.append)
    assert done == [4, 4, 4, 3]
    assert method.calls == 4


def test_stratified_counts_reduce_the_variance() -> None:
    """The point of strata: less spread than independent counts at equal cost."""
    method, batch = TableDenoiser(4, 0.8), toy_batch([[[2, 0, 1, 1]]])

    def spread(samples: int, repeats: int, seed: int) -> float:
        values = [
            math.fsum(nelbo(method, batch, samples=samples, noise=NoiseSource(seed + r), batch_size=64).sums)
            for r in range(repeats)
        ]
        return float(np.var(values))

    assert spread(8, 60, 0) < 0.7 * spread(1, 240, 1000) / 8
