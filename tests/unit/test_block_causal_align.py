"""Alignment of the clean rows with the frozen model: against a loop, and what it must leave alone."""

import pytest
import torch

from dllm_core.errors import DllmError
from dllm_core.methods.block_causal.options import Options
from dllm_core.methods.protocol import Resources
from tests.block_causal_tools import block_causal, blocks_of
from tests.method_tools import DictAnchors, corrupt, split_losses
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

LAYERS = ["embed", "1", "2", "final"]


def _states(backbone, ids: list[int], size: int) -> dict[str, torch.Tensor]:
    """Return layer -> states [L, D] of one document: block-causal with blocks of `size`; 1 is causal."""
    length = len(ids)
    sees = torch.tensor([[j // size <= i // size for j in range(length)] for i in range(length)])
    bias = torch.zeros(length, length, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    out = backbone.model.model(torch.tensor([ids]), attention_mask=bias[None, None], output_hidden_states=True)
    return dict(zip(LAYERS, (s[0] for s in (*out.hidden_states[:-1], out.last_hidden_state)), strict=True))


def _anchors(backbone, batch) -> Resources:
    """Return the frozen model's states at rows whose next token is a response token; NaN at all others."""
    stored = {}
    for row, key in enumerate(batch.sequence_keys):
        states = {name: torch.full((batch.length, backbone.hidden_size), torch.nan).double() for name in LAYERS}
        for document in batch.document_BL[row].unique().tolist():
            places = (batch.document_BL[row] == document).nonzero().flatten()
            if document < 0:
                continue
            with torch.no_grad():
                found = _states(backbone, batch.input_ids_BL[row, places].tolist(), 1)
            for name in LAYERS:
                read = places[:-1][batch.response_BL[row, places[1:]]]
                states[name][read] = found[name][read - places[0]]
        stored[key] = states
    return Resources(anchors=DictAnchors(stored))


def _naive(method, batch, resources, layers) -> torch.Tensor:
    terms = []
    for row in range(len(batch)):
        ids = batch.input_ids_BL[row].tolist()
        prefixes = {}  # of the last block of each document: what is read
        for prefix, _, scored in blocks_of(batch, row, method.options.block_size):
            prefixes[int(batch.document_BL[row, scored[0]])] = prefix
        for prefix in prefixes.values():
            if not prefix:
                continue
            student = _states(method.backbone, [ids[i] for i in prefix], method.options.block_size)
            for i in prefix:
                if not batch.response_BL[row, i + 1]:
                    continue
                for name in layers:
                    teacher_D = resources.anchors.states[batch.sequence_keys[row]][name][i]
                    terms.append(1 - torch.cosine_similarity(student[name][i - prefix[0]], teacher_D, dim=0))
    return torch.stack(terms).mean()


def _moved(method, by: float = 0.05):
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    return method


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("layers", ["all", (0, 2)])
@pytest.mark.parametrize("complementary", [False, True])
def test_the_term_and_its_gradient_equal_a_loop(layers, alignment, complementary):
    backbone = tiny_backbone(layers=3, alignment=alignment).double()
    batch = packed_sequences(4, (9, 3, 6), 2, NUM_TOKENS).batch_of(range(4))
    resources = _anchors(backbone, batch)
    method = _moved(block_causal(backbone, weight=2.0, layers=layers, complementary=complementary, path_weight=0.0))
    corrupted, totals = corrupt(method, batch)
    plain = block_causal(backbone, complementary=complementary, path_weight=0.0)
    base, _, base_grads = split_losses(plain, *corrupt(plain, batch), [4])
    names = LAYERS if layers == "all" else ["embed", "2"]
    expected = _naive(method, batch, resources, names)
    for sizes in ([4], [1, 3]):
        loss, parts, grads = split_losses(method, corrupted, totals, sizes, resources)
        assert parts["align"] == pytest.approx(float(expected.detach()), rel=1e-5)
        assert loss == pytest.approx(base + 2 * float(expected.detach()), rel=1e-6)
        method.zero_grad()
        (2 * _naive(method, batch, resources, names)).backward()
        for name, parameter in method.named_parameters():
            own = 0.0 if parameter.grad is None else parameter.grad
            assert torch.allclose(grads[name], base_grads[name] + own, rtol=1e-4, atol=1e-6), name


def test_blocks_of_one_token_at_the_start_are_aligned_perfectly():
    """With blocks of one token the clean half is the frozen causal model itself."""
    batch = random_sequences(3, 10, 3, NUM_TOKENS).batch_of(range(3))
    for size, is_zero in ((1, True), (4, False)):
        method = block_causal(tiny_backbone(layers=3), block_size=size, weight=1.0, teacher="live")
        found = split_losses(method, *corrupt(method, batch), [3])[1]["align"]
        assert (abs(found) < 1e-6) == is_zero


def test_a_share_of_the_rows_is_an_unbiased_estimate():
    backbone = tiny_backbone(layers=3).double()
    batch = random_sequences(4, 18, 3, NUM_TOKENS).batch_of(range(4))
    resources = _anchors(backbone, batch)
    method = _moved(block_causal(backbone, weight=1.0, token_fraction=0.25))
    full = float(_naive(method, batch, resources, LAYERS).detach())
    values = []
    for seed in range(30):
        corrupted, totals = corrupt(method, batch, seed=seed)
        assert 0 < int((corrupted.extras["align_BL"] > 0).sum()) < totals["aligned"] / 2
        values.append(split_losses(method, corrupted, totals, [4], resources)[1]["align"])
    values = torch.tensor(values)
    assert abs(float(values.mean()) - full) < 4 * float(values.std()) / len(values) ** 0.5


def test_it_is_off_by_default_and_asks_for_a_store_when_on():
    assert Options().requirements(3).anchors is None
    assert Options(weight=1.0).requirements(3).anchors.positions == "response_predictors"
    assert Options(weight=1.0, teacher="live").cost_factor() == pytest.approx(Options().cost_factor() + 1 / 3)
    batch = random_sequences(3, 12, 4, NUM_TOKENS).batch_of(range(3))
    method = block_causal(tiny_backbone(), weight=1.0)
    with pytest.raises(DllmError, match="no anchor store"):
        split_losses(method, *corrupt(method, batch), [3])


def test_a_document_of_one_block_has_nothing_to_align():
    batch = random_sequences(2, 4, 2, NUM_TOKENS).batch_of(range(2))
    method = block_causal(tiny_backbone(), weight=1.0)
    assert split_losses(method, *corrupt(method, batch), [2])[1]["align"] == 0.0


def test_activation_checkpointing_changes_nothing():
    backbone = tiny_backbone(layers=3).double()
    batch = random_sequences(4, 14, 3, NUM_TOKENS).batch_of(range(4))
    resources = _anchors(backbone, batch)
    method = _moved(block_causal(backbone, weight=1.0))
    corrupted, totals = corrupt(method, batch)
    plain = split_losses(method, corrupted, totals, [4], resources)
    backbone.enable_activation_checkpointing()
    method.train()
    again = split_losses(method, corrupted, totals, [4], resources)
    assert again[0] == pytest.approx(plain[0], rel=1e-9)
    for name, grad in plain[2].items():
        assert torch.allclose(again[2][name], grad, rtol=1e-7, atol=1e-10), name
