"""The loss of LDLM against a float64 oracle; which loss reaches which module; splitting and packing change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.anchors import AnchorStore
from dllm_core.methods.ldlm import objective
from dllm_core.methods.protocol import Corrupted
from dllm_core.methods.segments import segments_of
from dllm_core.training.gradient_gate import encoder_gate
from tests.ldlm_tools import (
    LAYOUTS,
    SHAPE,
    extracted_anchors,
    naive_losses,
    ragged_sequences,
    random_anchors,
    tiny_ldlm,
)
from tests.method_tools import corrupt, split_losses, step_info

COINS = [
    {"self_condition": 0.0, "prompt_drop": 0.0, "true_states": 0.0, "token_fraction": 1.0},
    {"self_condition": 1.0, "prompt_drop": 1.0, "true_states": 1.0, "token_fraction": 1.0},
    {"self_condition": 0.5, "prompt_drop": 0.5, "true_states": 0.5, "token_fraction": 0.5},
]


def _grads(method, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    named = dict(method.named_parameters())
    wanted = {n: p for n, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _audit(gamma: float, shape=SHAPE, **options):
    """Return, per loss, the gradient of every trained parameter, each loss differentiated alone."""
    method = tiny_ldlm(shape=shape, self_condition=1.0, prompt_drop=0.0, true_states=0.5, **options)
    data = LAYOUTS["ragged"]()
    batch, resources = data.batch_of(range(4)), random_anchors(data, method.layer)
    corrupted, totals = corrupt(method, batch)
    assert len(set(corrupted.extras["true_states_B"].tolist())) == 2
    inputs = method._inputs(corrupted, segments_of(batch), step_info(), resources)
    inputs.gamma = gamma
    found, _ = objective.terms(
        method.networks, inputs, method.head_VD, method.schedule, method.decoder_noise, totals["tokens"]
    )
    losses = {"diff": found.diffusion_S.sum(), "h": found.states_S.sum(), "w": found.tokens.total}
    return method, {name: _grads(method, loss) for name, loss in losses.items()}


@pytest.mark.parametrize("head", ["frozen", "own"])
def test_each_loss_reaches_every_weight_of_its_modules_and_no_other(head):
    method, grads = _audit(1.0, SHAPE.model_copy(update={"token_head": head}))
    reached_by = {
        "networks.latent_encoder": {"diff", "h"},
        "networks.latent_decoder": {"h"},
        "networks.denoiser": {"diff"},
        "networks.prompt_encoder": {"diff"},
        "networks.token_decoder": {"w"},
        "networks.token_head_VD": {"w"},
    }
    seen = set()
    for name in grads["diff"]:
        (module,) = [m for m in reached_by if name.startswith(m)]
        seen.add(module)
        reaching = {loss for loss in grads if grads[loss][name] is not None and bool(grads[loss][name].any())}
        assert reaching == reached_by[module], name
    assert ("networks.token_head_VD" in seen) == (head == "own")
    assert seen >= set(reached_by) - {"networks.token_head_VD"}
    assert not method.embedding_VD.requires_grad


def test_the_gate_scales_the_diffusion_gradient_into_the_encoder_and_nothing_else():
    (_, quarter), (_, whole), (_, closed) = _audit(0.25), _audit(1.0), _audit(0.0)
    for name, grad in whole["diff"].items():
        if grad is None:
            continue
        if name.startswith("networks.latent_encoder"):
            assert torch.equal(quarter["diff"][name], 0.25 * grad), name  # a power of two: exact
            assert not closed["diff"][name].any()
        else:
            assert torch.equal(quarter["diff"][name], grad), name
            assert torch.equal(closed["diff"][name], grad), name
    for loss in ("h", "w"):
        for name, grad in whole[loss].items():
            assert (grad is None and closed[loss][name] is None) or torch.equal(closed[loss][name], grad), name


def test_the_gradient_of_the_loss_is_the_sum_of_the_three_with_the_gate_of_the_step():
    info = step_info(step=10, steps=100)
    gamma = 0.7 * encoder_gate(10, 15)
    assert 0.05 < gamma < 0.65
    method, grads = _audit(gamma, gate_ceiling=0.7, token_weight=0.3)
    data = LAYOUTS["ragged"]()
    corrupted, totals = corrupt(method, data.batch_of(range(4)))
    _, parts, total = split_losses(method, corrupted, totals, [4], random_anchors(data, method.layer), info)
    assert parts["gate"] == pytest.approx(gamma)
    denominator = {"diff": totals["tokens"], "h": totals["tokens"], "w": 1 / 0.3}
    for name, grad in total.items():
        wanted = sum(g[name] / denominator[loss] for loss, g in grads.items() if g[name] is not None)
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize("own", [False, True])
def test_the_loss_equals_a_naive_float64_one(layout, coins, own):
    shape = SHAPE.model_copy(update={"token_head": "own"}) if own else SHAPE
    more = {"normalise": "none", "schedule_d": 5.0, "token_weight": 0.3} if own else {}
    method = tiny_ldlm(shape=shape, **more, **coins)
    data = LAYOUTS[layout]()
    batch, resources = data.batch_of(range(4)), random_anchors(data, method.layer)
    corrupted, totals = corrupt(method, batch, seed=2)
    found, parts, _ = split_losses(method, corrupted, totals, [4], resources)
    wanted = naive_losses(method, batch, corrupted.extras, resources)
    for name, total in (("decode_true_accuracy", "true_tokens"), ("reconstruction_noisy_accuracy", "decoded_tokens")):
        assert (name in parts) == bool(totals[total]), "a share of nothing is not logged"
    for name, value in wanted.items():
        if name in parts or not name.endswith("_accuracy"):
            assert parts[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    tokens = method.options.token_weight * wanted["token_nats"]
    assert found == pytest.approx(wanted["diffusion_mse"] + wanted["state_mse"] + tokens, rel=2e-4)


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        ("latent_encoder", ("diffusion_mse", "state_mse")),
        ("latent_decoder", ("state_mse",)),
        ("denoiser", ("diffusion_mse",)),
        ("prompt_encoder", ("diffusion_mse",)),
        ("token_decoder", ("token_nats",)),
    ],
)
def test_gradients_are_the_slopes_of_the_naive_losses_that_reach_a_module(module, parts):
    """With the gate open: through the input of the denoiser and through its target."""
    method = tiny_ldlm(self_condition=0.0, prompt_drop=0.0, true_states=0.5, gate_warmup=0.0)
    data = LAYOUTS["ragged"]()
    batch, resources = data.batch_of(range(4)), random_anchors(data, method.layer)
    corrupted, totals = corrupt(method, batch)
    _, _, grads = split_losses(method, corrupted, totals, [4], resources)
    parameters = dict(method.networks.get_submodule(module).named_parameters())
    own = {name: grads[f"networks.{module}.{name}"] for name in parameters}
    # a random way, turned towards the gradient so that the slope is no small difference of large terms
    uphill = 10.0 / math.sqrt(sum(float(g.square().sum()) for g in own.values()))
    way = {name: torch.randn_like(p) + uphill * own[name] for name, p in parameters.items()}
    slope = sum(float((own[n].double() * d.double()).sum()) for n, d in way.items())

    def at(place: float) -> float:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += place * way[name]
            found = naive_losses(method, batch, corrupted.extras, resources)
            for name, parameter in parameters.items():
                parameter -= place * way[name]
        return sum(found[part] for part in parts)

    step = 1e-3
    assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_micro_batches_add_up_to_the_whole(layout, sizes):
    method = tiny_ldlm(consistency=0.5)
    data = LAYOUTS[layout]()
    resources = random_anchors(data, method.layer)
    corrupted, totals = corrupt(method, data.batch_of(range(4)))
    whole = split_losses(method, corrupted, totals, [4], resources)
    observed = method.times.pending_sum.clone(), method.times.pending_count.clone()
    method.times.pending_sum.zero_()
    method.times.pending_count.zero_()
    pieces = split_losses(method, corrupted, totals, sizes, resources)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5)
    assert pieces[2].keys() == whole[2].keys()
    for name, grad in whole[2].items():
        torch.testing.assert_close(pieces[2][name], grad, rtol=1e-3, atol=2e-6, msg=name)
    torch.testing.assert_close(method.times.pending_sum, observed[0], rtol=1e-5, atol=0)
    assert torch.equal(method.times.pending_count, observed[1])


def test_documents_packed_in_a_row_count_as_they_do_on_their_own():
    """The same documents one a row, with the same draws at their tokens, give the same sums."""
    method = tiny_ldlm(self_condition=1.0, prompt_drop=0.0, true_states=0.0, token_fraction=1.0)
    packed = LAYOUTS["packed"]()
    resources = random_anchors(packed, method.layer)
    batch = packed.batch_of([0])
    corrupted, totals = corrupt(method, batch)
    loss, _, grads = split_losses(method, corrupted, totals, [1], resources)
    alone = 0.0
    added = {name: torch.zeros_like(g) for name, g in grads.items()}
    for document in range(3):
        here_L = batch.document_BL[0] == document
        data = ragged_sequences([(1, int(here_L.sum()) - 1)])
        data.input_ids_NL[0] = batch.input_ids_BL[0, here_L]
        states_LD = resources.anchors.states[batch.sequence_keys[0]][method.layer][here_L]
        single = data.batch_of([0])
        own = random_anchors(data, method.layer)
        own.anchors.states[single.sequence_keys[0]][method.layer] = states_LD
        extras = {n: v[:, here_L] if v.ndim > 1 else v for n, v in corrupted.extras.items()}
        piece = Corrupted(single, single.input_ids_BL, single.response_BL, extras)
        one, _, more = split_losses(method, piece, totals, [1], own)
        alone += one
        for name, grad in more.items():
            added[name] += grad
    assert alone == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(added[name], grad, rtol=1e-3, atol=2e-6, msg=name)


def test_a_dropped_prompt_is_no_prompt():
    method = tiny_ldlm(prompt_drop=1.0)
    data = LAYOUTS["ragged"]()
    batch, resources = data.batch_of(range(4)), random_anchors(data, method.layer)
    corrupted, totals = corrupt(method, batch)
    dropped, _, grads = split_losses(method, corrupted, totals, [4], resources)
    for name, grad in grads.items():
        assert not (name.startswith("networks.prompt_encoder") and grad.any()), name
    batch.input_ids_BL[~batch.response_BL] = 5
    again, _, _ = split_losses(method, corrupted, totals, [4], resources)
    assert again == dropped
    kept = tiny_ldlm(prompt_drop=0.0)
    corrupted, totals = corrupt(kept, batch)
    assert split_losses(kept, corrupted, totals, [4], resources)[0] != pytest.approx(dropped, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_the_store_that_are_not_responses_are_never_read(layout, tmp_path):
    """Padded slots must not ask a store for rows that it was not told to keep."""
    method = tiny_ldlm()
    data = LAYOUTS[layout]() if layout == "packed" else ragged_sequences([(5, 3), (6, 7), (4, 2), (5, 5)])
    resources = extracted_anchors(tmp_path, data, method.options)
    assert isinstance(resources.anchors, AnchorStore)
    corrupted, totals = corrupt(method, data.batch_of(range(4)))
    whole, _, _ = split_losses(method, corrupted, totals, [4], resources)
    rows, _, _ = split_losses(method, corrupted, totals, [1, 1, 1, 1], resources)
    assert whole == pytest.approx(rows, rel=1e-5)
    method.prepare(data, range(4), resources)
    assert method.diagnose(data.batch_of(range(4)), resources, NoiseSource(0))["latent_variance"] > 0


def test_a_batch_without_response_tokens_costs_nothing():
    method = tiny_ldlm()
    data = ragged_sequences([(3, 2), (4, 0), (2, 3)])
    batch, resources = data.batch_of(range(3)), random_anchors(data, method.layer)
    corrupted, totals = corrupt(method, batch, step_info(batch_size=3))
    out = method.loss(corrupted.rows(1, 2), totals, step_info(), resources)
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()
    assert split_losses(method, corrupted, totals, [3], resources)[0] == pytest.approx(
        split_losses(method, corrupted, totals, [1, 1, 1], resources)[0], rel=1e-5
    )
