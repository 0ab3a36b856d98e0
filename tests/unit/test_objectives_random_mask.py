from itertools import product

import pytest
import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.ar.method import Method as ArMethod
from dllm_core.methods.ar.options import Options as ArOptions
from dllm_core.methods.protocol import Corrupted, Resources
from dllm_core.methods.random_mask.method import Method
from dllm_core.methods.random_mask.options import Options
from tests.method_tools import TableBackbone, corrupt, nll_rows, split_losses, step_info
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone


def _toy_batch(tokens: list[int], first: int) -> Batch:
    length = len(tokens)
    return Batch(
        torch.tensor([tokens]),
        torch.arange(length)[None] >= first,
        torch.zeros(1, length, dtype=torch.long),
        torch.arange(length)[None],
        (0,),
        (0,),
        ("k",),
    )


def _expected_loss(method: Method, tokens: list[int], first: int) -> float:
    """Return the exact expectation of the training loss: count uniform on 1..n, subsets of a count equally likely."""
    batch, size = _toy_batch(tokens, first), len(tokens) - first
    masks = [torch.tensor([[False] * first + list(bits)]) for bits in product((False, True), repeat=size) if any(bits)]
    by_count = {k: [m for m in masks if int(m.sum()) == k] for k in range(1, size + 1)}
    total = 0.0
    for of_count in by_count.values():
        for masked_BL in of_count:
            corrupted = Corrupted(batch, method.mask(batch, masked_BL), masked_BL)
            loss = method.loss(corrupted, method.totals(corrupted), step_info(), Resources()).loss
            total += float(loss.detach()) / len(of_count) / size
    return total


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_expected_loss_is_the_bound_per_token(noise):
    joint = torch.rand((3,) * 5, generator=torch.Generator().manual_seed(0)) + 0.01
    backbone = TableBackbone(joint, noise=noise)
    method = Method(backbone, Options(path_weight=0.0))
    tokens, first = [2, 0, 1, 1, 2], 1
    expected = _expected_loss(method, tokens, first)
    assert expected == pytest.approx(backbone.bound(tokens, first) / 4, rel=1e-5)
    if noise == 0.0:
        # exact conditionals make the bound tight: -log p(response | prompt)
        p = backbone.joint
        exact = -torch.log(p[tuple(tokens)] / p[tokens[0]].sum())
        assert expected == pytest.approx(float(exact) / 4, rel=1e-5)


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
def test_loss_equals_a_naive_loop_in_float64(alignment):
    method = Method(tiny_backbone(alignment=alignment).double(), Options(path_weight=0.7))
    batch = packed_sequences(4, (7, 9), 3, NUM_TOKENS).batch_of(range(4))
    corrupted, totals = corrupt(method, batch)
    loss, parts, _ = split_losses(method, corrupted, totals, [4])
    mdm, path = [], []
    for row, predicted in enumerate(nll_rows(method, batch, corrupted.noisy_BL, corrupted.masked_BL)):
        nll = [-logp_V[int(batch.input_ids_BL[row, j])] for j, logp_V in predicted.items()]
        mdm.append(sum(nll) / len(nll))
        path.append(sum(x * torch.exp(-x) for x in nll) / len(nll))
    mdm_mean, path_mean = float(sum(mdm).detach() / 4), float(sum(path).detach() / 4)
    assert parts["ce_nats"] == pytest.approx(mdm_mean, rel=1e-6)
    assert parts["path_nats"] == pytest.approx(0.7 * path_mean, rel=1e-6)
    assert loss == pytest.approx(mdm_mean + 0.7 * path_mean, rel=1e-6)


def test_path_gradient_stops_at_the_probability():
    method = Method(tiny_backbone().double(), Options(path_weight=1.0))
    batch = random_sequences(2, 10, 3, NUM_TOKENS).batch_of(range(2))
    corrupted, totals = corrupt(method, batch)
    _, _, grads = split_losses(method, corrupted, totals, [2])
    method.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for row, predicted in enumerate(nll_rows(method, batch, corrupted.noisy_BL, corrupted.masked_BL)):
        for j, logp_V in predicted.items():
            nll = -logp_V[int(batch.input_ids_BL[row, j])]
            loss = loss + (nll + torch.exp(-nll).detach() * nll) / len(predicted) / 2
    loss.backward()
    for name, parameter in method.named_parameters():
        assert torch.allclose(grads[name], parameter.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("causal", [False, True])
def test_splitting_a_batch_changes_neither_loss_nor_gradient(causal):
    backbone = tiny_backbone("qwen3").double()
    method = ArMethod(backbone, ArOptions(tuned=True)) if causal else Method(backbone, Options())
    batch = packed_sequences(6, (9, 4), 2, NUM_TOKENS).batch_of(range(6))
    corrupted, totals = corrupt(method, batch)
    loss, parts, grads = split_losses(method, corrupted, totals, [6])
    for sizes in ([1] * 6, [4, 2], [1, 5]):
        split_loss, split_parts, split_grads = split_losses(method, corrupted, totals, sizes)
        assert split_loss == pytest.approx(loss, rel=1e-6)
        assert split_parts == pytest.approx(parts, rel=1e-5)
        for name, grad in grads.items():
            assert torch.allclose(split_grads[name], grad, rtol=1e-5, atol=1e-8), name


def test_corruption_does_not_depend_on_the_batch():
    method = Method(tiny_backbone(), Options())
    data = random_sequences(6, 14, 4, NUM_TOKENS)
    whole, _ = corrupt(method, data.batch_of(range(6)))
    part, _ = corrupt(method, data.batch_of([5, 2]))
    assert torch.equal(part.noisy_BL, whole.noisy_BL[[5, 2]])


def test_prompts_first_tokens_and_padding_are_never_corrupted_nor_scored():
    method = Method(tiny_backbone(), Options())
    for data in (random_sequences(4, 12, 5, NUM_TOKENS), packed_sequences(4, (5, 4), 3, NUM_TOKENS)):
        touched = torch.zeros(4, 12, dtype=torch.bool)
        for epoch in range(40):
            batch = data.batch([(i, epoch) for i in range(4)])
            corrupted, _ = corrupt(method, batch)
            changed = corrupted.noisy_BL != batch.input_ids_BL
            assert torch.equal(changed, corrupted.masked_BL)
            assert (corrupted.noisy_BL[changed] == NUM_TOKENS).all()
            touched |= corrupted.masked_BL
        assert torch.equal(touched, data.response_NL)  # and every response token is reached
    ar = ArMethod(tiny_backbone(), ArOptions(tuned=True))
    assert torch.equal(corrupt(ar, batch)[0].masked_BL, batch.response_BL)
    assert torch.equal(ar.token_nll(batch).scored_BL, batch.response_BL)


@pytest.mark.parametrize("causal", [False, True])
def test_one_document_cannot_affect_another(causal):
    backbone = tiny_backbone().double()
    method = ArMethod(backbone, ArOptions(tuned=True)) if causal else Method(backbone, Options())
    batch = packed_sequences(2, (6, 7), 3, NUM_TOKENS).batch_of([0, 1])

    def nll(ids_BL: torch.Tensor) -> torch.Tensor:
        changed = Batch(ids_BL, *(getattr(batch, n) for n in ("response_BL", "document_BL", "position_BL")),
                        batch.sample_ids, batch.epochs, batch.sequence_keys)  # fmt: skip
        if causal:
            return method.token_nll(changed).nll_BL
        masked_BL = batch.response_BL & (torch.arange(16) % 2 == 0)
        return method.masked_nll(changed, masked_BL).nll_BL

    before = nll(batch.input_ids_BL)
    ids_BL = batch.input_ids_BL.clone()
    ids_BL[:, :6] = (ids_BL[:, :6] + 11) % NUM_TOKENS
    ids_BL[:, 13:] = 5
    after = nll(ids_BL)
    assert torch.equal(after[:, 6:], before[:, 6:])
    assert not torch.allclose(after[:, :6], before[:, :6])
    # and alone in a row it is scored the same
    alone = packed_sequences(2, (6, 7), 3, NUM_TOKENS)
    single = type(alone)(
        alone.input_ids_NL[:, 6:13],
        alone.response_NL[:, 6:13],
        torch.zeros(2, 7, dtype=torch.int32),
        alone.position_NL[:, 6:13],
        alone.num_bytes_N,
        NUM_TOKENS,
    ).batch_of([0, 1])
    if causal:
        assert torch.allclose(method.token_nll(single).nll_BL, before[:, 6:13], atol=1e-6)


def test_a_literal_mask_id_in_a_prompt_is_text():
    method = Method(tiny_backbone(), Options())
    batch = random_sequences(2, 10, 4, NUM_TOKENS).batch_of([0, 1])
    batch.input_ids_BL[0, 2] = NUM_TOKENS  # the mask token's own id
    corrupted, totals = corrupt(method, batch)
    assert not bool(corrupted.masked_BL[0, 2])
    assert corrupted.noisy_BL[0, 2] == NUM_TOKENS
    reference = random_sequences(2, 10, 4, NUM_TOKENS).batch_of([0, 1])
    assert torch.equal(corrupted.masked_BL, corrupt(method, reference)[0].masked_BL)
    loss, _, _ = split_losses(method, corrupted, totals, [2])
    assert loss == loss
    assert loss < float("inf")
    scored = method.masked_nll(batch, corrupted.masked_BL)
    assert torch.equal(scored.scored_BL, corrupted.masked_BL)
    assert (scored.nll_BL[~corrupted.masked_BL] == 0).all()


def test_masked_nll_equals_the_naive_loop_and_leaves_mode_and_gradients_alone():
    method = Method(tiny_backbone("gpt2"), Options()).train()
    batch = random_sequences(3, 12, 4, NUM_TOKENS).batch_of(range(3))
    masked_BL = corrupt(method, batch)[0].masked_BL
    masked_BL[1] = False
    scored = method.masked_nll(batch, masked_BL)
    rows = nll_rows(method, batch, method.mask(batch, masked_BL), masked_BL)
    for row, predicted in enumerate(rows):
        for j, logp_V in predicted.items():
            target = int(batch.input_ids_BL[row, j])
            assert float(scored.nll_BL[row, j]) == pytest.approx(-float(logp_V[target].detach()), abs=1e-4)
            assert bool(scored.correct_BL[row, j]) == (int(logp_V.argmax()) == target)
    assert method.training
    assert not scored.nll_BL.requires_grad
    empty = method.masked_nll(batch, torch.zeros_like(masked_BL))
    assert not bool(empty.nll_BL.any())


def test_the_first_token_of_a_row_cannot_be_masked_when_shifted():
    method = Method(tiny_backbone(), Options())
    masked_BL = torch.zeros(1, 4, dtype=torch.bool)
    masked_BL[0, 0] = True
    with pytest.raises(AssertionError, match="no predictor"):
        method.predictor_rows(masked_BL)
    same = Method(tiny_backbone(alignment="same_position"), Options())
    assert [i.tolist() for i in same.predictor_rows(masked_BL)] == [[0], [0]]


def test_autoregressive_loss_and_likelihood_equal_the_converted_models_own_causal_forward():
    backbone = tiny_backbone(alignment="same_position")  # the autoregressive row shifts whatever the contract says
    method = ArMethod(backbone, ArOptions(tuned=True))
    batch = random_sequences(3, 12, 4, NUM_TOKENS).batch_of(range(3))
    logits_BLV = backbone.model(batch.input_ids_BL, is_causal=True).logits[..., :NUM_TOKENS].double()
    logp_BL = logits_BLV.log_softmax(-1)[:, :-1].gather(2, batch.input_ids_BL[:, 1:, None])[..., 0]
    scored = method.token_nll(batch)
    assert torch.allclose(scored.nll_BL[:, 4:].double(), -logp_BL[:, 3:], atol=1e-4)
    corrupted, totals = corrupt(method, batch)
    loss, _, _ = split_losses(method, corrupted, totals, [2, 1])
    assert loss == pytest.approx(float(-logp_BL[:, 3:].mean(1).mean().detach()), abs=1e-4)


def test_a_micro_batch_without_response_tokens_contributes_zero():
    method = Method(tiny_backbone(), Options())
    batch = packed_sequences(2, (1, 1), 1, NUM_TOKENS).batch_of([0, 1])
    corrupted = method.corrupt(batch, step_info(), NoiseSource(0))
    out = method.loss(corrupted, method.totals(corrupted), step_info(), Resources())
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0


def test_costs_count_the_forwarded_positions_and_three_times_the_forward():
    method = Method(tiny_backbone(), Options())
    batch = random_sequences(4, 12, 5, NUM_TOKENS).batch_of(range(4))
    corrupted, totals = corrupt(method, batch)
    out = method.loss(corrupted, totals, step_info(), Resources())
    assert out.positions == 48
    assert out.flops == 3 * method.backbone.flops_forward(48, 12, int(corrupted.masked_BL.sum()))
    assert out.teacher_flops == 0
