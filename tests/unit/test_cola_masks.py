"""Who sees whom in Cola's [clean | noisy] layout: dense loops, and what the networks really depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_core.layers.block_mask import attention_mask, sees
from dllm_core.methods.cola.networks import Decoder, Encoder, Prior
from dllm_core.methods.cola.objective import FlowInputs, velocities

SIZES = [(length, block) for length in range(1, 8) for block in range(1, 5)]


def _prior(block: int, depth: int = 2) -> Prior:
    torch.manual_seed(0)
    prior = Prior(3, 8, depth, 2, block).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return prior


def _inputs(length: int, block: int, num_clean: int, first: int = 0, **changes: Tensor) -> FlowInputs:
    generator = torch.Generator().manual_seed(length * 10 + block)
    nobody = torch.zeros(1, length, dtype=torch.bool)
    values = {
        "latents_STK": torch.randn(1, length, 3, generator=generator).double(),
        "noise_STK": torch.randn(1, length, 3, generator=generator).double(),
        "time_S": torch.tensor([0.6]),
        "real_ST": ~nobody,
        "known_ST": nobody,
        "alone_ST": nobody,
        **changes,
    }
    return FlowInputs(**values, num_clean=num_clean, first=first)


@pytest.mark.parametrize(("length", "block"), SIZES)
def test_the_masks_of_both_halves_are_those_of_dense_loops(length, block):
    block_L = torch.arange(length) // block
    halves = torch.cat(
        [
            torch.cat([sees(block_L, block_L, "up_to"), torch.zeros(1, length, length, dtype=torch.bool)], dim=-1),
            torch.cat([sees(block_L, block_L, "earlier"), sees(block_L, block_L, "same")], dim=-1),
        ],
        dim=1,
    )[0]
    wanted = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            noisy_q, noisy_k = q >= length, k >= length
            own, other = (q % length) // block, (k % length) // block
            if not noisy_q and not noisy_k:
                wanted[q, k] = other <= own
            elif noisy_q and not noisy_k:
                wanted[q, k] = other < own
            elif noisy_q and noisy_k:
                wanted[q, k] = other == own
    assert torch.equal(halves, wanted)


def test_padding_is_seen_by_nobody_and_rows_that_see_nothing_see_all():
    block_BL = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    real_BL = torch.tensor([[True] * 4, [True, False, False, False]])
    mask = attention_mask(sees(block_BL, block_BL, "same", real_BL))
    assert mask.shape == (2, 1, 4, 4)
    assert mask[1, 0].tolist() == [[True, False, False, False]] * 2 + [[True] * 4] * 2
    joined = attention_mask(sees(block_BL, block_BL, "earlier", real_BL), sees(block_BL, block_BL, "same", real_BL))
    assert joined[0, 0, 2].tolist() == [True, True, False, False, False, False, True, True]


def _depends(prior: Prior, inputs: FlowInputs) -> Tensor:
    """Return bool [N, 2, T]: whether velocity i moves with the clean, or with the noise of slot j."""
    clean, noise = inputs.latents_STK, inputs.noise_STK

    def predicted(context: Tensor, noisy: Tensor) -> Tensor:
        # the noisy half alone gets `noisy`: the clean latents in it must not be taken for the context's
        slot = torch.arange(clean.shape[1])[None]
        cache, c, first = None, inputs.num_clean, inputs.first
        if c:
            cache = prior.clean(context[:, :c], slot[:, :c], inputs.real_ST[:, :c])
        halves = (inputs.real_ST[:, first:], cache, inputs.known_ST[:, first:], inputs.alone_ST[:, first:])
        return prior.velocity(noisy[:, first:], inputs.time_S, slot[:, first:], *halves)[0].sum(-1)

    jacobians = torch.autograd.functional.jacobian(predicted, (clean, noise))
    return torch.stack([j[:, 0].abs().sum(-1) != 0 for j in jacobians], dim=1)


@pytest.mark.parametrize(("length", "block"), SIZES)
def test_velocities_depend_on_earlier_clean_blocks_and_their_own_noisy_one(length, block):
    num_clean = (length - 1) // block * block
    for cut in {num_clean, length}:  # leaving the last clean block out changes nothing
        found = _depends(_prior(block), _inputs(length, block, cut))
        for i in range(length):
            for j in range(length):
                assert found[i, 0, j] == (j // block < i // block), (i, j)
                assert found[i, 1, j] == (j // block == i // block), (i, j)
    whole, _ = velocities(_prior(block), _inputs(length, block, length))
    short, _ = velocities(_prior(block), _inputs(length, block, num_clean))
    torch.testing.assert_close(short, whole, rtol=1e-12, atol=1e-12)


def test_blocks_on_their_own_see_no_context_and_the_noisy_half_may_begin_later():
    alone = torch.tensor([[False] * 4 + [True] * 2])
    found = _depends(_prior(2), _inputs(6, 2, 4, alone_ST=alone))
    assert found[:, 0].tolist() == [[False] * 6] * 2 + [[True] * 2 + [False] * 4] * 2 + [[False] * 6] * 2
    prior, inputs = _prior(2), _inputs(6, 2, 4)
    late, _ = velocities(prior, _inputs(6, 2, 4, first=4))
    torch.testing.assert_close(late, velocities(prior, inputs)[0][:, 4:])


def test_known_slots_enter_clean_at_time_zero():
    known = torch.tensor([[False, False, False, True, True, False]])
    prior, inputs = _prior(3), _inputs(6, 3, 3, known_ST=known)
    found, true = velocities(prior, inputs)
    louder = _inputs(6, 3, 3, known_ST=known, noise_STK=inputs.noise_STK + 5.0 * known[..., None])
    again, _ = velocities(prior, louder)
    assert torch.equal(found, again)  # their noise is not looked at
    torch.testing.assert_close(true, inputs.noise_STK - inputs.latents_STK)
    other = inputs.latents_STK + known[..., None]
    moved, _ = velocities(prior, _inputs(6, 3, 3, known_ST=known, latents_STK=other))
    assert not torch.allclose(moved[0, 5], found[0, 5])  # their latents are
    at_zero, _ = velocities(prior, _inputs(6, 3, 3, time_S=torch.tensor([0.0])))
    all_known = torch.ones(1, 6, dtype=torch.bool)
    as_known, _ = velocities(prior, _inputs(6, 3, 3, known_ST=all_known))
    torch.testing.assert_close(as_known, at_zero)


def test_a_later_token_moves_no_earlier_latent_no_earlier_logit_and_no_earlier_block():
    torch.manual_seed(1)
    encoder, decoder = Encoder(5, 3, 8, 2, 2).double(), Decoder(3, 5, 8, 2, 2).double()
    for module in (encoder, decoder):
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    h, block = torch.randn(1, 7, 5).double(), 3
    prior = _prior(block)
    slot = torch.arange(7)[None]

    def run(states: Tensor) -> tuple[Tensor, ...]:
        q = encoder(states)
        cache = prior.clean(q.mean, slot, torch.ones_like(slot, dtype=torch.bool))
        keys = torch.stack([k for k, _ in cache.keys_values])[:, 0].transpose(1, 2)
        return q.mean[0], q.log_variance[0], decoder(q.mean)[0], keys.transpose(0, 1)

    before = run(h)
    for j in range(7):
        changed = h.clone()
        changed[0, j] += 1.0
        after = run(changed)
        for old, new in zip(before[:3], after[:3], strict=True):
            assert torch.equal(old[:j], new[:j])
            assert not torch.equal(old[j], new[j])
        start = j // block * block
        assert torch.equal(before[3][:start], after[3][:start])
        assert not torch.equal(before[3][start], after[3][start])  # inside a block both ways
