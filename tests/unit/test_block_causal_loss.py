"""Block-causal training: layout, masks, loss and bound against loops, enumeration and one forward per block."""

import math
from itertools import product

import pytest
import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.evals.nelbo import block_nelbo, nelbo
from dllm_core.methods.block_causal.draws import block_masks
from dllm_core.methods.block_causal.layout import Layout
from dllm_core.methods.block_causal.options import Options
from dllm_core.methods.protocol import Corrupted, Resources
from tests.block_causal_tools import (
    SeeingTable,
    block_bound,
    block_causal,
    blocks_of,
    mask_draws,
    naive_nll,
)
from tests.method_tools import corrupt, split_losses, step_info
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone


def _window(tokens: list[int], first: int) -> Batch:
    length = len(tokens)
    place_1L = torch.arange(length)[None]
    zeros_1L = torch.zeros(1, length, dtype=torch.long)
    return Batch(torch.tensor([tokens]), place_1L >= first, zeros_1L, place_1L, (0,), (0,), ("k",))


def _ragged(num: int = 4) -> Batch:
    """Return rows of three documents with prompts of 1 to 4 tokens, a response of one token, and padding."""
    batch = packed_sequences(num, (9, 2, 6), 3, NUM_TOKENS).batch_of(range(num))
    response_BL = batch.response_BL & (batch.position_BL > torch.tensor([[0], [1], [2], [3]])[:num])
    return Batch(
        batch.input_ids_BL, response_BL, batch.document_BL, batch.position_BL,
        batch.sample_ids, batch.epochs, batch.sequence_keys,
    )  # fmt: skip


BATCHES = {
    "window": lambda: random_sequences(4, 14, 3, NUM_TOKENS).batch_of(range(4)),
    "whole blocks": lambda: random_sequences(4, 12, 4, NUM_TOKENS).batch_of(range(4)),
    "one block": lambda: random_sequences(4, 4, 1, NUM_TOKENS).batch_of(range(4)),
    "ragged": _ragged,
}


# -- who sees whom -------------------------------------------------------------------------------------------------


def _check_layout(batch: Batch, size: int, views: int) -> None:
    layout = Layout.of(batch, size, views)
    inside = {(row, i) for row in range(len(batch)) for _, block, _ in blocks_of(batch, row, size) for i in block}
    before = {(row, i) for row in range(len(batch)) for past, _, _ in blocks_of(batch, row, size) for i in past}
    assert layout.num_clean == max((i for _, i in before), default=-1) + 1
    assert layout.first == min(i for _, i in inside)
    assert layout.stop >= max(i for _, i in inside) + 1
    assert layout.stop <= batch.length

    noisy = range(layout.first, layout.stop)
    columns = [("clean", i) for i in range(layout.num_clean)] + [(v, i) for v in range(views) for i in noisy]
    assert layout.width == len(columns)
    mask_B1WW = layout.attention_mask(batch.document_BL, batch.position_BL)
    for row in range(len(batch)):
        document, position = batch.document_BL[row].tolist(), batch.position_BL[row].tolist()
        for q, (query_part, i) in enumerate(columns):
            if document[i] < 0:
                continue  # nobody reads what padding sees
            for k, (key_part, j) in enumerate(columns):
                b_q, b_k = position[i] // size, position[j] // size
                if key_part == "clean":
                    allowed = b_k <= b_q if query_part == "clean" else b_k < b_q
                else:
                    allowed = query_part == key_part and b_k == b_q
                assert bool(mask_B1WW[row, 0, q, k]) == (allowed and document[i] == document[j]), (row, q, k)
    assert bool(mask_B1WW.any(-1).all()), "a query that sees nothing would be NaN"

    for view in range(views):
        column_BL = layout.predictors(batch.position_BL, view, shifted=True)
        for row in range(len(batch)):
            for _, _, scored in blocks_of(batch, row, size):
                for j in scored:
                    begins = batch.position_BL[row, j] % size == 0
                    assert columns[column_BL[row, j - 1]] == ("clean" if begins else view, j - 1)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 20])
def test_layout_and_mask_equal_a_loop_for_every_window(size, views):
    for length in range(2, 10):
        for prompt in range(1, length):
            _check_layout(random_sequences(2, length, prompt, NUM_TOKENS).batch_of([0, 1]), size, views)
    _check_layout(_ragged(), size, views)


def test_clean_states_never_see_noise_and_blocks_only_their_own():
    method = block_causal(tiny_backbone().double())
    batch = random_sequences(2, 14, 3, NUM_TOKENS).batch_of([0, 1])
    masked_BL = batch.response_BL & (batch.position_BL % 3 != 0)
    noisy_BL = method.mask(batch, masked_BL)
    before = method.run(batch, noisy_BL)
    for j in range(3, 14):
        changed_BL = noisy_BL.clone()
        changed_BL[:, j] = (changed_BL[:, j] + 1) % NUM_TOKENS
        moved_L = (method.run(batch, changed_BL) - before).abs().amax((0, 2)) > 1e-9
        block = range(j // 4 * 4, min(14, j // 4 * 4 + 4))
        # the last row of a block stands for the clean row: it predicts the next block's first token
        assert [i for i in range(2, 13) if moved_L[i]] == [i for i in block if i >= 2 and i % 4 != 3 and i < 13], j


# -- what is masked ------------------------------------------------------------------------------------------------


def _counts(batch: Batch, masked_BL: torch.Tensor, size: int) -> list[list[tuple[int, int]]]:
    """Return (masked, size) of every block of every row."""
    return [
        [(sum(bool(masked_BL[row, i]) for i in scored), len(scored)) for _, _, scored in blocks_of(batch, row, size)]
        for row in range(len(batch))
    ]


@pytest.mark.parametrize("complementary", [False, True])
def test_counts_of_a_block_are_uniform_and_its_subsets_equally_likely(complementary):
    data = random_sequences(4000, 13, 2, NUM_TOKENS)  # blocks of 2, 4, 4 and 1 response tokens
    batch = data.batch_of(range(len(data)))
    masked_BL = block_masks(batch, 4, NoiseSource(3), complementary=complementary)
    assert not bool((masked_BL & ~batch.response_BL).any())
    counts = torch.tensor([[k for k, _ in row] for row in _counts(batch, masked_BL, 4)])
    for block, n in enumerate((2, 4, 4, 1)):
        least = 0 if complementary else 1
        seen = torch.bincount(counts[:, block], minlength=n + 1).double() / len(data)
        wanted = torch.zeros(n + 1).double()
        wanted[least:] = 1 / (n + 1 - least)
        assert torch.allclose(seen, wanted, atol=4 * (0.25 / len(data)) ** 0.5), (block, seen)
    pairs = masked_BL[:, 4:8][counts[:, 1] == 2].double()
    assert torch.allclose(pairs.mean(0), torch.full((4,), 0.5).double(), atol=4 * 0.5 / len(pairs) ** 0.5)


def test_the_rates_of_a_sequence_cover_the_unit_interval():
    data = random_sequences(50, 20, 4, NUM_TOKENS)
    batch = data.batch_of(range(50))
    for row in _counts(batch, block_masks(batch, 4, NoiseSource(0), complementary=False), 4):
        assert sorted(k for k, _ in row) == [1, 2, 3, 4]
    for row in _counts(batch, block_masks(batch, 4, NoiseSource(0), complementary=True), 4):
        counts = sorted(k for k, _ in row)
        assert len(set(counts)) == 4


def test_masks_depend_on_the_row_alone():
    batch = _ragged()
    whole = block_masks(batch, 4, NoiseSource(1), complementary=False)
    for row in range(4):
        assert torch.equal(block_masks(batch.rows(row, row + 1), 4, NoiseSource(1), complementary=False)[0], whole[row])
    assert not torch.equal(block_masks(batch, 4, NoiseSource(2), complementary=False), whole)


# -- the loss ------------------------------------------------------------------------------------------------------


def _naive_loss(method, batch: Batch, masks: list[torch.Tensor], path_weight: float) -> torch.Tensor:
    """Return the loss of a batch: per block, per sequence, then over sequences; one forward per block and mask."""
    total, sequences = 0.0, int(batch.response_BL.any(1).sum())
    for row in range(len(batch)):
        tokens = int(batch.response_BL[row].sum())
        for masked_BL in masks:
            nll = naive_nll(method, batch, masked_BL, row)
            for _, _, scored in blocks_of(batch, row, method.options.block_size):
                hidden = [nll[i] for i in scored if i in nll]
                if hidden:
                    n = len(scored) if len(masks) == 1 else (len(scored) + 1) / 2
                    terms = torch.stack(hidden)
                    total = total + n * (terms + path_weight * torch.exp(-terms).detach() * terms).mean() / tokens
    return total / sequences


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_loss_and_gradient_equal_one_forward_per_block(kind, complementary, alignment):
    backbone = tiny_backbone("qwen3", layers=2, alignment=alignment).double()
    method, batch = block_causal(backbone, complementary=complementary), BATCHES[kind]()
    corrupted, totals = corrupt(method, batch)
    found = [split_losses(method, corrupted, totals, sizes) for sizes in ([4], [3, 1])]
    method.zero_grad()
    first_BL = corrupted.extras["first_BL"]
    masks = [first_BL, batch.response_BL & ~first_BL] if complementary else [first_BL]
    expected = _naive_loss(method, batch, masks, 1.0)
    expected.backward()
    for loss, _, grads in found:
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
        for name, parameter in method.named_parameters():
            # the head's arithmetic is fp32 whatever the dtype
            assert torch.allclose(grads[name], parameter.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_loss_of_every_family(family):
    method, batch = block_causal(tiny_backbone(family), path_weight=0.0), _ragged()
    corrupted, totals = corrupt(method, batch)
    loss, parts, _ = split_losses(method, corrupted, totals, [4])
    expected = float(_naive_loss(method, batch, [corrupted.masked_BL], 0.0).detach())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert parts["ce_nats"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("complementary", [False, True])
def test_the_expected_loss_is_the_bound_per_token(complementary):
    method = block_causal(tiny_backbone(), block_size=3, path_weight=0.0, complementary=complementary)
    batch = _window([5, 9, 2, 7, 1, 30, 4], 2)  # blocks of 1, 3 and 1 response tokens
    expected, probability = 0.0, 0.0
    for first_BL, p in mask_draws(batch, 3, from_zero=complementary):
        masked_BL = batch.response_BL if complementary else first_BL
        corrupted = Corrupted(batch, method.mask(batch, first_BL), masked_BL, {"first_BL": first_BL})
        loss = method.loss(corrupted, method.totals(corrupted), step_info(), Resources()).loss
        expected, probability = expected + p * float(loss.detach()), probability + p
    assert probability == pytest.approx(1.0)
    assert expected == pytest.approx(block_bound(method, batch) / 5, rel=1e-5)


def _seen_bound(table: SeeingTable, tokens: list[int], size: int) -> float:
    """Return the block bound of tokens[1:] for one that knows the joint, of a block's first token only the prefix."""
    total = 0.0
    for start in range(0, len(tokens), size):
        scored = [i for i in range(start, min(start + size, len(tokens))) if i > 0]
        for bits in product((False, True), repeat=len(scored)):
            masked = [i for i, bit in zip(scored, bits, strict=True) if bit]
            if masked:
                weight = math.factorial(len(masked) - 1) * math.factorial(len(scored) - len(masked))
                for i in masked:
                    known = [t if j < start or j not in masked else table.vocab for j, t in enumerate(tokens)]
                    visible = start if i == start else start + size
                    known[visible:] = [table.vocab] * len(known[visible:])
                    total -= weight / math.factorial(len(scored)) * float(table.log_conditional(known, i)[tokens[i]])
    return total


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_network_that_knows_the_joint_is_as_good_as_what_it_is_shown(size):
    """The table answers from what attention shows it. The first token of a block is the exception to the tight bound:
    its predictor lies before the block, so it never profits from what is visible inside."""
    joint = torch.rand((3,) * 5, generator=torch.Generator().manual_seed(0)) + 0.01
    table, tokens = SeeingTable(joint), [2, 0, 1, 1, 2]
    method, batch = block_causal(table, block_size=size, path_weight=0.0), _window(tokens, 1)
    found = 0.0
    for first_BL, probability in mask_draws(batch, size, from_zero=False):
        corrupted = Corrupted(batch, method.mask(batch, first_BL), first_BL, {"first_BL": first_BL})
        loss = method.loss(corrupted, {"sequences": 1.0}, step_info(), Resources()).loss
        found += probability * float(loss.detach())
    assert found == pytest.approx(_seen_bound(table, tokens, size) / 4, rel=1e-6)
    exact = -float(torch.log(table.joint[tuple(tokens)] / table.joint[tokens[0]].sum()))
    # tight where every token is its block's first, and where the only block begins with the given token
    assert (found == pytest.approx(exact / 4, rel=1e-6)) == (size in (1, 5))


# -- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BATCHES)
def test_masked_nll_sees_a_clean_prefix(kind):
    method, batch = block_causal(tiny_backbone()), BATCHES[kind]()
    method.train()
    masked_BL = batch.response_BL & (torch.rand(batch.response_BL.shape, generator=torch.manual_seed(0)) < 0.6)
    scored = method.masked_nll(batch, masked_BL)
    for row in range(len(batch)):
        nll = naive_nll(method, batch, masked_BL, row)
        assert set(nll) == set(scored.scored_BL[row].nonzero().flatten().tolist())
        for i, value in nll.items():
            assert float(scored.nll_BL[row, i]) == pytest.approx(float(value.detach()), abs=1e-4)
    assert method.training
    assert not bool(method.masked_nll(batch, torch.zeros_like(masked_BL)).nll_BL.any())


def test_both_estimators_give_the_block_bound_of_the_model():
    """Whole-response masks of any count, and those of blocks of another size: each token's context is its own block."""
    method, batch = block_causal(tiny_backbone(), block_size=3), _window([5, 9, 2, 7, 1, 30, 4], 2)
    exact = block_bound(method, batch)
    rows = _repeat(batch, 600)
    for sums in (
        nelbo(method, rows, samples=5, noise=NoiseSource(0), batch_size=200),
        block_nelbo(method, rows, samples=5, block_size=8, noise=NoiseSource(0), batch_size=200),
    ):
        values = torch.tensor(sums.sums)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / len(values) ** 0.5
        assert float(values.std()) < 0.2 * exact


def _repeat(batch: Batch, times: int) -> Batch:
    rows = batch.select([0] * times)
    return Batch(
        rows.input_ids_BL, rows.response_BL, rows.document_BL, rows.position_BL,
        tuple(range(times)), rows.epochs, rows.sequence_keys,
    )  # fmt: skip


def test_costs_count_the_rows_that_are_forwarded():
    batch = random_sequences(3, 14, 5, NUM_TOKENS).batch_of(range(3))
    for complementary, views in ((False, 1), (True, 2)):
        method = block_causal(tiny_backbone(), complementary=complementary)
        corrupted, totals = corrupt(method, batch)
        out = method.loss(corrupted, totals, step_info(), Resources())
        width = 12 + views * 10  # clean blocks 0..2; noisy ones from the one in which the response begins
        assert out.positions == 3 * width
        scored = 27 if complementary else int(corrupted.masked_BL.sum())
        assert out.flops == 3 * method.backbone.flops_forward(3 * width, width, scored)
    usual = random_sequences(1, 160, 32, NUM_TOKENS).batch_of([0])
    for size, complementary in ((32, False), (16, True), (48, False)):
        options = Options(block_size=size, complementary=complementary)
        layout = Layout.of(usual, size, 2 if complementary else 1)
        assert options.cost_factor() == pytest.approx(layout.width / 160)


def test_rows_without_a_response_contribute_zero():
    method = block_causal(tiny_backbone())
    batch = packed_sequences(2, (1, 1), 1, NUM_TOKENS).batch_of([0, 1])
    corrupted, totals = corrupt(method, batch)
    out = method.loss(corrupted, totals, step_info(), Resources())
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
