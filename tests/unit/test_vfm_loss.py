"""The loss of VFM against float64 oracles, closed forms, and the traps that its original fell into."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.methods.protocol import Resources
from dllm_core.methods.vfm import objective
from dllm_core.methods.vfm.adapter import Posterior
from dllm_core.methods.vfm.draws import TIME_MIN, draw, masked_prompts, times_of
from dllm_core.methods.vfm.flow_map import expected_embeddings, inverse_rms, unit_embeddings
from dllm_core.methods.vfm.options import Options
from tests.ldlm_tools import LAYOUTS, random_anchors
from tests.method_tools import corrupt, split_losses, step_info
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS
from tests.vfm_tools import coins, naive_losses, phase_info, tiny_vfm, two_modes

ALWAYS = {"adapter_fraction": 1.0, "observe_fraction": 1.0}


# -- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("prompt", ["visible", "hidden"])
@pytest.mark.parametrize("encoder", ["embedding", "states"])
def test_the_loss_of_the_flow_phase_equals_a_naive_float64_one(layout, alignment, prompt, encoder):
    method = tiny_vfm(backbone={"alignment": alignment}, prompt=prompt, prompt_encoder=encoder, tau=0.8, sigma=1.5)
    data = LAYOUTS[layout]()
    resources = random_anchors(data, method.layer)
    corrupted, _ = corrupt(method, data.batch_of(range(4)), phase_info("flow"), seed=3)
    corrupted = coins(corrupted, adapter_B=[True, True, False, True], time_B=[1.0, 0.9, 0.6, 0.3])
    observed_BL = masked_prompts(corrupted.clean, NoiseSource(1), torch.ones(4), all_of_it=prompt == "hidden")
    corrupted.extras["observed_BL"] = observed_BL & corrupted.extras["adapter_B"][:, None]
    totals = method.totals(corrupted)
    found, parts, _ = split_losses(method, corrupted, totals, [4], resources, phase_info("flow"))
    wanted = naive_losses(method, corrupted, resources)
    assert layout == "packed" or wanted["observed_nats"] > 1
    for name, value in wanted.items():
        assert parts.get(name, 0.0) == pytest.approx(value, rel=2e-4, abs=1e-6), name
    whole = wanted["data_nats"] / (2 * 0.8**2) + wanted["observed_nats"] / (2 * 1.5**2) + wanted["kl_nats_per_dim"]
    assert found == pytest.approx(whole, rel=2e-4)


@pytest.mark.parametrize("prompt", ["visible", "hidden"])
def test_the_loss_of_the_paired_phase_equals_a_naive_float64_one(prompt):
    method = tiny_vfm(prompt=prompt, move=0.1)
    data = LAYOUTS["ragged"]()
    corrupted, _ = corrupt(method, data.batch_of(range(4)), phase_info("paired"))
    corrupted = coins(
        corrupted, adapter_B=[True, False, True, False], paired_B=[True, True, False, True], time_B=[1.0, 1.0, 0.8, 1.0]
    )
    totals = method.totals(corrupted)
    _, parts, _ = split_losses(method, corrupted, totals, [4], None, phase_info("paired"))
    assert parts["data_nats"] == pytest.approx(naive_losses(method, corrupted, Resources())["data_nats"], rel=2e-4)
    unpaired = coins(corrupted, paired_B=[False] * 4)
    _, others, _ = split_losses(method, unpaired, method.totals(unpaired), [4], None, phase_info("flow"))
    assert abs(others["data_nats"] - parts["data_nats"]) > 0.05  # the sampler's tokens are not the data


@pytest.mark.parametrize("phase", ["flow", "paired"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [[1, 3], [1, 1, 1, 1]])
def test_micro_batches_add_up_to_the_whole(phase, layout, sizes):
    method = tiny_vfm()
    corrupted, totals = corrupt(method, LAYOUTS[layout]().batch_of(range(4)), phase_info(phase))
    whole = split_losses(method, corrupted, totals, [4], None, phase_info(phase))
    pieces = split_losses(method, corrupted, totals, sizes, None, phase_info(phase))
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5)
    assert pieces[2].keys() == whole[2].keys()
    for name, grad in whole[2].items():
        torch.testing.assert_close(pieces[2][name], grad, rtol=1e-3, atol=2e-5, msg=name)


def test_kl_is_that_of_torch_as_a_mean_over_dimensions():
    mean, log_std = torch.randn(2, 3, 7), 0.5 * torch.randn(2, 3, 7)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0))
    found = Posterior(mean, log_std)
    torch.testing.assert_close(found.kl_SLD(), wanted)
    torch.testing.assert_close(found.kl_SL(), wanted.mean(-1))
    assert not Posterior(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5)).kl_SL().any()


def test_x0_hat_is_the_mean_of_unit_embeddings():
    method = tiny_vfm()
    backbone, rows_MD = method.backbone, torch.randn(5, 32)
    table_VD = backbone.embedding_weight_VD.detach().double()
    unit_VD = table_VD / table_VD.square().mean(1, keepdim=True).sqrt()
    p_MV = (rows_MD.double() @ table_VD[:NUM_TOKENS].T).softmax(1)
    found = expected_embeddings(backbone, rows_MD, inverse_rms(backbone.embedding_weight_VD))
    torch.testing.assert_close(found.double(), p_MV @ unit_VD[:NUM_TOKENS], rtol=1e-4, atol=1e-5)
    drawn = unit_embeddings(backbone.embedding_weight_VD, torch.tensor([3, 8]))
    torch.testing.assert_close(drawn.double(), unit_VD[[3, 8]], rtol=1e-5, atol=1e-6)
    assert not drawn.requires_grad


# -- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at_one", "power"), [(0.25, 2.0), (0.0, 0.0), (0.5, 5.0), (1.0, 1.0)])
def test_times_have_their_closed_form(at_one, power):
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    t = times_of(u, at_one, power).double()
    assert float((t == 1).double().mean()) == pytest.approx(at_one, abs=1e-4)
    for x in (0.2, 0.5, 0.8, 0.95):
        wanted = (1 - at_one) * x ** (1 + power)
        assert float((t <= x).double().mean()) == pytest.approx(wanted, abs=1e-3), x
    assert float(t.min()) >= TIME_MIN * (1 - 1e-6)
    if at_one < 1 and power:
        continuous = t[t < 1]
        assert float(continuous.mean()) == pytest.approx((1 + power) / (2 + power), abs=1e-3)


def _drawn(phase="flow", rows=8, step=3, **options):
    data = random_sequences(rows, 10, 4, NUM_TOKENS)
    batch = data.batch_of(range(rows))
    info = step_info(phase, step, batch_size=rows)
    return batch, draw(batch, info, NoiseSource(0), Options(**options), 6, paired=phase == "paired")


def test_draws_depend_on_the_sample_and_times_are_stratified():
    batch, drawn = _drawn(adapter_fraction=0.5)
    again = draw(batch, step_info("flow", 3, batch_size=8), NoiseSource(0), Options(), 6, paired=False)
    for name, tensor in drawn.items():
        assert torch.equal(tensor, again[name]), name
    assert sorted((drawn["time_B"] == 1).tolist()) == [False] * 6 + [True] * 2  # a quarter of every batch
    data = random_sequences(8, 10, 4, NUM_TOKENS)
    order = [5, 2]
    other = draw(data.batch_of(order), step_info("flow", 3, batch_size=2), NoiseSource(0), Options(), 6, paired=False)
    assert torch.equal(other["noise_BLD"], drawn["noise_BLD"][order])
    assert torch.equal(other["adapter_B"], drawn["adapter_B"][order])


def test_the_second_phase_keeps_data_away_from_t_one():
    _, drawn = _drawn("paired", rows=64, paired_fraction=0.5)
    assert 16 < int(drawn["paired_B"].sum()) < 48
    assert torch.equal(drawn["time_B"] == 1, drawn["paired_B"])
    _, before = _drawn("flow", rows=64)
    assert not before["paired_B"].any()
    assert int((before["time_B"] == 1).sum()) == 16


def test_prompts_are_hidden_for_the_observation_alone_and_never_their_first_token():
    batch, drawn = _drawn(rows=64, **ALWAYS)
    hidden_BL = drawn["observed_BL"]
    assert bool(hidden_BL.any(1).all())
    assert not bool(hidden_BL[:, 4:].any())
    assert not bool(hidden_BL[:, 0].any())
    assert 1.5 < float(hidden_BL.sum(1).double().mean()) < 2.5  # uniform on 1..3
    _, none = _drawn(rows=64, adapter_fraction=0.0, observe_fraction=1.0)
    assert not none["observed_BL"].any()
    assert int(masked_prompts(batch, NoiseSource(0), torch.ones(64), all_of_it=True).sum()) == 64 * 3
    single = two_modes(4, 3).batch_of(range(4))  # a prompt of one token has nothing to hide
    assert not masked_prompts(single, NoiseSource(0), torch.ones(4), all_of_it=False).any()


def test_prompt_embeddings_are_shown_as_they_are():
    """Neither noise nor time touches a prompt token; only L_obs hides some of them."""
    method = tiny_vfm(move=0.3, **ALWAYS)
    batch = LAYOUTS["ragged"]().batch_of(range(4))
    corrupted, totals = corrupt(method, batch, phase_info("flow"))
    seen = []
    hook = method.backbone.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    method.loss(corrupted, totals, phase_info("flow"), Resources())
    hook.remove()
    data_BLD, observed_BLD = seen
    clean_BLD = method.backbone.embedding_weight_VD[batch.input_ids_BL]
    prompt_BL = (batch.document_BL >= 0) & ~batch.response_BL
    assert torch.equal(data_BLD[prompt_BL], clean_BLD[prompt_BL])
    assert not torch.isclose(data_BLD[batch.response_BL], clean_BLD[batch.response_BL]).all(1).any()
    rows = corrupted.extras["observed_BL"].any(1)
    shown_BL = (prompt_BL & ~corrupted.extras["observed_BL"])[rows]
    assert torch.equal(observed_BLD[shown_BL], clean_BLD[rows][shown_BL])
    mask_D = method.backbone.embedding_weight_VD[method.backbone.contract.mask_token_id]
    assert torch.equal(observed_BLD[corrupted.extras["observed_BL"][rows]], mask_D.expand(int(totals["observed"]), -1))


# -- gradients ------------------------------------------------------------------------------------------------------


def _reached(grads) -> set[str]:
    return {name.split(".")[0] for name, grad in grads.items() if bool(grad.any())}


@pytest.mark.parametrize("phase", ["flow", "paired"])
def test_what_each_phase_trains(phase):
    method = tiny_vfm(move=0.05, **ALWAYS, paired_fraction=1.0)
    batch = LAYOUTS["ragged"]().batch_of(range(4))
    corrupted, totals = corrupt(method, batch, phase_info(phase))
    _, _, grads = split_losses(method, corrupted, totals, [4], None, phase_info(phase))
    assert _reached(grads) == {"backbone", "adapter", "flow"}
    assert all(bool(g.any()) for n, g in grads.items() if n.startswith("adapter")), "an adapter weight without gradient"
    plain = coins(corrupted, adapter_B=[False] * 4, observed_BL=torch.zeros_like(batch.response_BL).tolist())
    _, _, grads = split_losses(method, plain, method.totals(plain), [4], None, phase_info(phase))
    assert _reached(grads) == {"backbone", "flow"}
    assert "adapter.mean.weight" not in grads


def test_the_kl_reaches_the_adapter_alone_and_beta_rises():
    method = tiny_vfm(kl_weight=2.0, kl_warmup=0.5)
    weights = [objective.kl_weight(method, step_info("flow", step, steps=20)) for step in (0, 5, 10, 19)]
    assert weights == [0.0, 1.0, 2.0, 2.0]
    batch = LAYOUTS["ragged"]().batch_of(range(4))
    corrupted, _ = corrupt(method, batch, phase_info("flow"))
    inputs = objective.prepare_inputs(method, corrupted, Resources())
    assert inputs.posterior is not None
    inputs.posterior.kl_SL().sum().backward()
    assert _reached({n: p.grad for n, p in method.named_parameters() if p.grad is not None}) == {"adapter"}


def test_the_rollout_leaves_weights_modes_and_gradients_alone():
    method = tiny_vfm(paired_fraction=1.0).train()
    corrupted, totals = corrupt(method, LAYOUTS["ragged"]().batch_of(range(4)), phase_info("paired"))
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    method.loss(corrupted, totals, phase_info("paired"), Resources())
    assert method.training
    assert method.backbone.training
    assert all(torch.equal(before[n], p) for n, p in method.named_parameters())
    assert all(p.grad is None for p in method.parameters())


def test_what_is_imitated_does_not_move_with_the_weights():
    method = tiny_vfm(paired_fraction=1.0, adapter_fraction=0.0, move=0.1)
    batch = LAYOUTS["ragged"]().batch_of(range(4))
    corrupted, _ = corrupt(method, batch, phase_info("paired", step=0))

    def targets():
        inputs = objective.prepare_inputs(method, corrupted, Resources())
        objective.roll_out(method, inputs, corrupted.extras["paired_B"])
        return inputs.ids_SL[inputs.cut.real_SL]

    before = targets()
    with torch.no_grad():
        for parameter in method.map_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    corrupt(method, batch, phase_info("paired", step=1))  # taken once, at the start of the phase
    assert torch.equal(targets(), before)
    method.teacher.drop()
    corrupt(method, batch, phase_info("paired", step=2))
    assert not torch.equal(targets(), before)


# -- the traps of the original ----------------------------------------------------------------------------------------


def test_trap_a_new_map_is_no_constant_function_of_its_noise():
    method = tiny_vfm(move=0.0)  # as it starts, with all that starts at zero
    batch = two_modes(2, 5).batch_of([0, 1])
    corrupted, _ = corrupt(method, batch, phase_info("flow"))
    inputs = objective.prepare_inputs(method, corrupted, Resources())
    ones = torch.ones(2)
    states = [
        method.flow(method.backbone, batch, inputs.cut, z_SLD, ones)[0].detach()
        for z_SLD in (torch.randn_like(inputs.z_SLD), torch.randn_like(inputs.z_SLD))
    ]
    # relative change of the states that are read out, noise against noise
    gap = (states[0] - states[1])[:, 1:].norm() / states[0][:, 1:].norm()
    assert gap > 0.3
    prompts = random_sequences(2, 9, 4, NUM_TOKENS).batch_of([0, 1])
    found = method.posterior(prompts, objective.segments_of(prompts), None)
    assert (found.mean_SLD[0] - found.mean_SLD[1]).abs().max() > 1e-3  # nor is the adapter one of its prompt
    assert found.kl_SL().max() < 0.05  # and it starts as N(0, 1) all the same


def test_trap_the_terms_are_commensurate():
    """A head that knows nothing pays ln V for data and observation alike, whatever the scale of the embeddings."""
    for scale in (1.0, 50.0):
        method = tiny_vfm(**ALWAYS, backbone={"tied": False}, move=0.0)
        with torch.no_grad():
            method.backbone.embedding_weight_VD.mul_(scale)
            method.backbone.head_weight_VD.zero_()
        corrupted, totals = corrupt(method, LAYOUTS["ragged"]().batch_of(range(4)), phase_info("flow"))
        _, parts, _ = split_losses(method, corrupted, totals, [4], None, phase_info("flow"))
        assert parts["data_nats"] == pytest.approx(math.log(NUM_TOKENS), rel=1e-5)
        assert parts["observed_nats"] == pytest.approx(math.log(NUM_TOKENS), rel=1e-5)


def test_trap_the_kl_does_not_grow_with_the_width():
    """The same deviation from N(0, 1) costs the same whatever the width and length."""
    for slots, width in ((2, 8), (9, 512)):
        posterior = Posterior(torch.full((1, slots, width), 0.5), torch.full((1, slots, width), -0.5))
        kl = 0.5 * (0.25 + math.exp(-1) - 1) + 0.5
        assert posterior.kl_SL().tolist()[0] == pytest.approx([kl] * slots, rel=1e-5)


def test_trap_prompts_keep_their_embeddings_where_noise_is_mixed():
    method = tiny_vfm(adapter_fraction=0.5)
    batch = LAYOUTS["packed"]().batch_of(range(4))
    corrupted, _ = corrupt(method, batch, phase_info("flow"))
    inputs = objective.prepare_inputs(method, corrupted, Resources())
    plain_S = ~inputs.chosen_S
    noise_SLD = inputs.cut.slots(corrupted.extras["noise_BLD"])
    assert torch.equal(inputs.z_SLD[plain_S], noise_SLD[plain_S])
    assert not torch.isclose(inputs.z_SLD[inputs.chosen_S], noise_SLD[inputs.chosen_S]).all()


def test_samples_follow_the_common_order_or_loop():
    method = tiny_vfm(anchor_sequences=3)
    order = SampleOrder(10, 0)
    assert [i for i, _ in method.select_samples(order, step_info("flow", 0))] == [order[i % 3][0] for i in range(4)]
    free = tiny_vfm()
    assert free.select_samples(order, step_info("flow", 2)) == [order[i] for i in range(8, 12)]
