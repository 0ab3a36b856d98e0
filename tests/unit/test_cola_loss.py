"""Cola's losses: a dense oracle, what each reaches, splitting, statistics between the phases, operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.layers import attention
from dllm_core.layers.attention import rotate, rotation
from dllm_core.layers.dit import modulated
from dllm_core.methods.cola import objective
from dllm_core.methods.cola.draws import PRIOR, VAE, block_draws
from dllm_core.methods.cola.health import linear_error
from dllm_core.methods.cola.method import Method
from dllm_core.methods.cola.networks import Prior
from dllm_core.methods.cola.shapes import Shape
from dllm_core.methods.cola.spans import spans_of
from dllm_core.methods.protocol import Resources
from tests.cola_tools import PHASES, SHAPE, corrupted_in, in_phase, tiny_cola
from tests.ldlm_tools import LAYOUTS, documents, extracted_anchors, ragged_sequences, random_anchors
from tests.method_tools import split_losses
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS


def _batch(layout: str = "ragged"):
    data = LAYOUTS[layout]()
    return data, data.batch_of(range(4))


def dense_velocity(prior: Prior, clean_TK: Tensor, noisy_TK: Tensor, t: float, known_T: Tensor, alone_T: Tensor):
    """Return velocities of one document by one pass over 2 T positions under a dense mask made by loops."""
    length, dit = len(clean_TK), prior.dit
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            own, other = (q % length) // prior.block_size, (k % length) // prior.block_size
            if q < length:
                mask[q, k] = k < length and other <= own
            elif k < length:
                mask[q, k] = other < own and not alone_T[q - length]
            else:
                mask[q, k] = other == own
    x = prior.to_width(torch.cat((clean_TK, noisy_TK)))[None]
    times = torch.cat((torch.zeros(length), torch.where(known_T, 0.0, t))).double()
    by = rotation(torch.arange(length).repeat(2), dit.head_width)
    modulations = dit.modulations(times[None])
    for block, modulation in zip(dit.blocks, modulations.blocks, strict=True):
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, -1)
        inside, normed = block.attention, modulated(x, shift_a, scale_a)
        key, value = inside.to_key_value(normed).chunk(2, -1)
        query, key, value = (inside._heads(part) for part in (inside.to_query(normed), key, value))
        query, key = rotate(inside.query_norm(query), by), rotate(inside.key_norm(key), by)
        scores = (query @ key.mT / dit.head_width**0.5).masked_fill(~mask, -torch.inf)
        x = x + gate_a * inside.to_out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        x = x + gate_f * block.feedforward(modulated(x, shift_f, scale_f))
    shift, scale = modulations.final.chunk(2, -1)
    found = prior.out(modulated(x, shift, scale))[0, length:]
    return found + (2 * t - 1) / ((1 - t) ** 2 + t**2) * noisy_TK if prior.linear else found


@torch.no_grad()
def naive_losses(method: Method, batch, extras: dict[str, Tensor], resources: Resources, phase: str) -> dict:
    """Return the parts of the loss, document after document, in float64."""
    networks = method.networks
    sums = dict.fromkeys(("nats", "kl", "masked", "flow"), 0.0)
    counts = dict.fromkeys(("tokens", "masked", "flow"), 0)
    for row, prompt, response in documents(batch):
        own = [*prompt, *response]
        stored = resources.anchors.states[batch.sequence_keys[row]][method.layer][own].double()
        h = ((stored - method.mean_D) / method.std_D).clamp(-8, 8)[None]
        q = networks.encoder(h)
        std = (0.5 * q.log_variance).exp()
        z = q.mean + std * extras["posterior_BTK"][row, own].double()
        counts["tokens"] += len(response)
        slots = range(len(prompt), len(own))
        if phase == VAE:
            hidden = extras["masked_BT"][row, own]
            weight = extras["token_weight_BT"][row, own]
            logp = (networks.decoder(z)[0] @ method.head_VD.double().T).log_softmax(-1)
            r = networks.encoder(h, hidden[None])
            masked_z = r.mean + (0.5 * r.log_variance).exp() * extras["masked_posterior_BTK"][row, own].double()
            masked_logp = (networks.decoder(masked_z)[0] @ method.head_VD.double().T).log_softmax(-1)
            for j in slots:
                token = int(batch.input_ids_BL[row, own[j]])
                sums["nats"] -= float(weight[j] * logp[j, token])
                mu, variance = q.mean[0, j], std[0, j].square()
                sums["kl"] += float((0.5 * (mu**2 + variance - 1 - variance.log())).mean())
                if hidden[j]:
                    sums["masked"] -= float(masked_logp[j, token])
                    counts["masked"] += 1
            continue
        c = ((z - method.latent_mean_K) / method.latent_std_K)[0]
        noise, t = extras["flow_BTK"][row, own].double(), float(extras["time_B"][row])
        known, alone = extras["known_BT"][row, own], extras["alone_BT"][row, own]
        noisy = torch.where(known[:, None], c, (1 - t) * c + t * noise)
        error = (dense_velocity(networks.prior, c, noisy, t, known, alone) - (noise - c)).square().mean(-1)
        for j in slots:
            if not known[j]:
                sums["flow"] += float(error[j])
                counts["flow"] += 1
    if phase == PRIOR:
        return {"flow_mse": sums["flow"] / counts["flow"]}
    return {
        "reconstruction_nats": sums["nats"] / counts["tokens"],
        "kl_per_dimension": sums["kl"] / counts["tokens"],
        "masked_nats": sums["masked"] / counts["masked"],
    }


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("coins", [0.0, 0.5, 1.0])
def test_the_loss_equals_a_naive_float64_one(layout, phase, coins):
    method = tiny_cola(
        start="random" if coins == 1.0 else "linear",
        clean_prefix=coins,
        prefix_drop=coins,
        token_fraction=1.0 - coins / 2,
        masked_share=0.5,
    )
    data, batch = _batch(layout)
    resources = random_anchors(data, method.layer)
    corrupted, totals = corrupted_in(method, batch, phase, seed=2)
    loss, parts, _ = split_losses(method, corrupted, totals, [4], resources, in_phase(phase))
    wanted = naive_losses(method.double(), batch, corrupted.extras, resources, phase)
    for name, value in wanted.items():
        assert parts[name] == pytest.approx(value, rel=2e-4), name
    options = method.options
    total = wanted.get("flow_mse", 0.0)
    if phase == VAE:
        total = wanted["reconstruction_nats"] + options.beta * wanted["kl_per_dimension"] + wanted["masked_nats"]
    assert loss == pytest.approx(total, rel=2e-4)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("joint", [False, True])
def test_micro_batches_add_up_to_the_whole(layout, phase, joint):
    method = tiny_cola(joint=joint)
    data, batch = _batch(layout)
    resources, info = random_anchors(data, method.layer), in_phase(phase)
    corrupted, totals = corrupted_in(method, batch, phase)
    whole = split_losses(method, corrupted, totals, [4], resources, info)
    for sizes in ([1, 3], [1, 1, 1, 1]):
        pieces = split_losses(method, corrupted, totals, sizes, resources, info)
        assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
        assert pieces[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-6)
        for name, grad in whole[2].items():
            torch.testing.assert_close(pieces[2][name], grad, rtol=1e-3, atol=5e-6, msg=name)


def _reached(method: Method, info) -> dict[str, bool]:
    """Return parameter -> whether the loss of the step moves it (None and zero gradients do not)."""
    data, batch = _batch()
    corrupted = method.corrupt(batch, info, NoiseSource(0))
    totals = method.totals(corrupted)
    split_losses(method, corrupted, totals, [4], random_anchors(data, method.layer), info)
    return {n: p.grad is not None and bool(p.grad.any()) for n, p in method.networks.named_parameters()}


@pytest.mark.parametrize(
    ("info", "options", "modules"),
    [
        (in_phase(VAE, 0), {}, {"encoder", "decoder"}),
        (in_phase(VAE, 9), {}, {"decoder"}),  # the encoder stands still at the end
        (in_phase(PRIOR), {}, {"prior"}),
        (in_phase(PRIOR), {"joint": True}, {"encoder", "decoder", "prior"}),
        # the flow loss sends nothing into the autoencoder, even when that is trained
        (in_phase(PRIOR), {"joint": True, "vae_weight": 0.0, "reference_weight": 0.0}, {"prior"}),
        (in_phase(PRIOR), {"joint": True, "vae_weight": 0.0}, {"encoder", "prior"}),  # the reference alone
    ],
)
def test_each_loss_reaches_every_weight_of_its_networks_and_no_other(info, options, modules):
    method = tiny_cola(clean_prefix=0.5, masked_share=0.5, **options)
    if options.get("vae_weight") == 0.0 and options.get("reference_weight") is None:
        for average in method.reference.averages().values():
            average += 0.1  # a reference to be away from
    reached = _reached(method, info)
    for name, found in reached.items():
        if name == "encoder.mask_D" and options.get("vae_weight") == 0.0:
            continue
        # what a pass over the clean half of the last layer computes is keys and values: all its weights are used by
        # the noisy half all the same
        assert found == (name.split(".")[0] in modules), name
    assert not method.head_VD.requires_grad


def test_the_closed_gate_of_the_flow_loss_is_no_accident_of_the_phase():
    """Differentiating the flow loss alone with an encoder that keeps its graph: no path leads back to it."""
    method = tiny_cola()
    data, batch = _batch()
    cut, resources = spans_of(batch), random_anchors(data, method.layer)
    corrupted, _ = corrupted_in(method, batch, PRIOR)
    q = method.networks.encoder(method.states_of(batch, cut, resources))
    assert q.mean.requires_grad
    inputs = method._flow_inputs(corrupted, cut, q.detach())
    assert not inputs.latents_STK.requires_grad
    live = objective.FlowInputs(**{**vars(inputs), "latents_STK": method.to_prior(q.mean)})
    error, _ = objective.flow_error(method.networks.prior, live)
    target = torch.autograd.grad(error.sum(), list(method.networks.encoder.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in target)


def test_the_reference_holds_the_encoder_where_the_first_phase_left_it():
    method = tiny_cola(joint=True, reference_weight=1.0)
    data, batch = _batch()
    resources, last = random_anchors(data, method.layer), in_phase(VAE, 9)
    corrupted = method.corrupt(batch, last, NoiseSource(0))
    method.train()
    method.loss(corrupted, method.totals(corrupted), last, resources)
    method.on_step_end(last)
    kept = {n: v.clone() for n, v in method.reference.averages().items()}
    corrupted, totals = corrupted_in(method, batch, PRIOR)
    _, parts, _ = split_losses(method, corrupted, totals, [4], resources, in_phase(PRIOR))
    assert parts["reference_kl_per_dimension"] == pytest.approx(0.0, abs=1e-6)
    before = method.networks.encoder(method.states_of(batch, spans_of(batch), resources))
    with torch.no_grad():
        method.networks.encoder.straight.bias += 0.3
    method.on_step_end(in_phase(PRIOR))
    assert all(torch.equal(v, kept[n]) for n, v in method.reference.averages().items())
    _, parts, _ = split_losses(method, corrupted, totals, [4], resources, in_phase(PRIOR))
    cut = spans_of(batch)
    after = method.networks.encoder(method.states_of(batch, cut, resources))
    of_q, of_r = (torch.distributions.Normal(p.mean, (0.5 * p.log_variance).exp()) for p in (after, before))
    wanted = torch.distributions.kl_divergence(of_q, of_r).mean(-1)[cut.response_ST].mean()
    assert parts["reference_kl_per_dimension"] == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_statistics_are_those_of_the_encoder_that_the_prior_sees():
    method = tiny_cola(settle=0.3)
    data = random_sequences(12, 10, 3, NUM_TOKENS)
    resources = random_anchors(data, method.layer)
    method.train()
    assert [method.settles(in_phase(VAE, step)) for step in range(10)] == [False] * 7 + [True] * 3
    for step in range(10):
        info = in_phase(VAE, step)
        batch = data.batch_of(range(4 * (step % 3), 4 * (step % 3) + 4))
        corrupted = method.corrupt(batch, info, NoiseSource(0))
        totals = method.totals(corrupted)
        out = method.loss(corrupted, totals, info, resources)
        out.loss.backward()
        if not method.settles(info):
            with torch.no_grad():
                for p in method.networks.encoder.parameters():
                    p -= 0.05 * p.grad
        method.zero_grad()
        method.on_step_end(info)
    samples = []
    for first in (0, 4, 8):
        batch = data.batch_of(range(first, first + 4))
        cut = spans_of(batch)
        q = method.networks.encoder(method.states_of(batch, cut, resources))
        generator = torch.Generator().manual_seed(first)
        for _ in range(300):
            samples.append(q.sample(torch.randn(q.mean.shape, generator=generator))[cut.response_ST].detach())
    z = torch.cat(samples)
    torch.testing.assert_close(method.latent_mean_K, z.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(method.latent_std_K, z.std(0), rtol=0.01, atol=0)
    c = method.to_prior(z)
    torch.testing.assert_close(method.from_prior(c), z, rtol=1e-5, atol=1e-5)
    held = method.latent_std_K.clone()
    for step in range(3):
        method.on_step_end(in_phase(PRIOR, step))
    assert torch.equal(held, method.latent_std_K)


def test_block_draws_know_prompts_and_beginnings_alone():
    method = tiny_cola(clean_prefix=1.0, prefix_drop=0.5)
    data = random_sequences(64, 14, 3, NUM_TOKENS)
    batch = data.batch_of(range(64))
    found = block_draws(batch, NoiseSource(0), method.options)
    known, alone = found["known_BT"], found["alone_BT"]
    assert bool(known[:, :3].all())
    for start in (4, 8, 12):
        block = known[:, start : start + 4]
        lengths = block.sum(1)
        assert torch.equal(block, torch.arange(block.shape[1]) < lengths[:, None])
        assert bool((lengths >= 1).all())
        if block.shape[1] == 4:
            assert set(lengths.tolist()) == {1, 2, 3}
        coin = alone[:, start : start + 4]
        assert bool((coin == coin[:, :1]).all())
    assert 0.3 < float(alone.float().mean()) < 0.7
    nothing = method.options.model_copy(update={"clean_prefix": 0.0, "prefix_drop": 0.0})
    plain = block_draws(batch, NoiseSource(0), nothing)
    assert torch.equal(plain["known_BT"], ~batch.response_BL)
    assert not plain["alone_BT"].any()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_training_flops_are_those_that_torch_counts(phase, joint, monkeypatch):
    """To a few per cent: modulations and the first matrices' input gradients are left out."""
    monkeypatch.setattr(attention, "is_plain", lambda *_: True)  # products that torch's counter knows
    shape = Shape(
        latent_dim=48,
        encoder_width=64,
        encoder_depth=2,
        decoder_width=96,
        decoder_depth=2,
        prior_width=128,
        prior_depth=3,
        head_width=32,
    )
    method = tiny_cola(shape=shape, joint=joint, token_fraction=1.0, masked_share=0.99, settle=0.0)
    rows, length, prompt = 8, 32, 4
    data = random_sequences(rows, length, prompt, NUM_TOKENS)
    corrupted = method.corrupt(data.batch_of(range(rows)), replace(in_phase(phase), batch_size=rows), NoiseSource(0))
    totals = method.totals(corrupted)
    with FlopCounterMode(display=False) as counter:
        out = method.loss(corrupted, totals, in_phase(phase), random_anchors(data, method.layer))
        out.loss.backward()
    found = sum(counter.get_flop_counts()["Global"].values())
    assert out.flops == pytest.approx(found, rel=0.06)


def test_the_average_step_is_the_mean_over_both_phases_at_the_usual_window():
    method = tiny_cola(vae_share=0.3, settle=0.2, block_size=1, masked_share=0.25, token_fraction=0.5)
    base, options = method.base.shape, method.options
    first = [options.vae_flops(base, 160, moves=m, responses=128) / 128 for m in (False, True)]
    second = options.prior_flops(base, 160, 159, 128, responses=128) / 128  # the last block is context to none
    wanted = 0.3 * (0.2 * first[0] + 0.8 * first[1]) + 0.7 * second
    assert options.training_flops(base) == pytest.approx(wanted)
    assert options.network(base).flops_per_response_token == options.training_flops(base)


def test_a_batch_without_response_tokens_costs_nothing():
    method = tiny_cola()
    data = ragged_sequences([(3, 2), (4, 0), (2, 3)])
    batch, resources = data.batch_of(range(3)), random_anchors(data, method.layer)
    for phase in PHASES:
        corrupted, totals = corrupted_in(method, batch, phase)
        out = method.loss(corrupted.rows(1, 2), totals, in_phase(phase), resources)
        assert float(out.loss.detach()) == 0.0
        out.loss.backward()


def test_what_is_read_of_a_real_store_is_what_was_asked_for(tmp_path):
    method = tiny_cola()
    data = ragged_sequences([(5, 3), (6, 7), (4, 2), (5, 5)])
    resources = extracted_anchors(tmp_path, data, method.options)
    method.prepare(data, range(4), resources)
    for phase in PHASES:
        corrupted, totals = corrupted_in(method, data.batch_of(range(4)), phase)
        split_losses(method, corrupted, totals, [2, 2], resources, in_phase(phase))
    found = method.diagnose(data.batch_of(range(4)), resources, NoiseSource(0))
    assert set(found["alarms"].values()) <= {0, 1}
    assert len(found["kl_of_dimension"]) == SHAPE.latent_dim
    assert found["kl_nats_per_token"] == pytest.approx(sum(found["kl_of_dimension"]))
    cut = spans_of(data.batch_of(range(4)))
    states = method.stored_states(data.batch_of(range(4)), cut.row_S, cut.position_ST, resources)
    real = cut.response_ST
    torch.testing.assert_close(method.mean_D, states[real].mean(0), rtol=1e-4, atol=1e-5)


def test_missing_and_foreign_anchors_are_refused_in_two_lines():
    method = tiny_cola()
    data, batch = _batch()
    corrupted, totals = corrupted_in(method, batch, VAE)
    for resources, word in ((Resources(), "no anchor store"), (random_anchors(data, method.layer, hidden=8), "8 wide")):
        with pytest.raises(DllmError) as caught:
            method.loss(corrupted, totals, in_phase(VAE), resources)
        assert len(str(caught.value).split("\n")) == 2
        assert word in caught.value.problem


def test_the_linear_start_is_the_best_rank_k_map_to_head_rows():
    method = tiny_cola(move=0.0, start_log_variance=-9.0)
    data = random_sequences(64, 20, 3, NUM_TOKENS)
    resources = random_anchors(data, method.layer)
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(32, 32, generator=generator) * torch.logspace(0, -2, 32)[:, None]
    for n, key in enumerate(data.keys):  # states that hold their token, in a few directions
        rows = method.head_VD[data.input_ids_NL[n].long()] @ mix
        resources.anchors.states[key][method.layer] = rows + 0.01 * torch.randn(20, 32, generator=generator)
    method.prepare(data, range(64), resources)
    batch = data.batch_of(range(64))
    cut = spans_of(batch)
    h = method.states_of(batch, cut, resources)[cut.response_ST].double()
    e = method.head_VD[cut.slots(batch.input_ids_BL)[cut.response_ST]].double()
    e = e - e.mean(0)
    z = h @ method.networks.encoder.straight.weight[: SHAPE.latent_dim].double().T
    covariance = z.T @ z / len(z)
    torch.testing.assert_close(covariance, torch.eye(SHAPE.latent_dim).double(), rtol=0, atol=0.02)
    fit = z @ torch.linalg.lstsq(z, e).solution
    full = h @ torch.linalg.lstsq(h, e).solution
    values = torch.linalg.svdvals(full).square()
    best = float((e - full).square().sum() + values[SHAPE.latent_dim :].sum())  # Eckart-Young on the fitted values
    assert float((e - fit).detach().square().sum()) == pytest.approx(best, rel=0.01)
    decoded = z @ method.networks.decoder.straight.weight.double().T
    assert float((e - decoded).square().sum()) == pytest.approx(best, rel=0.02)
    found = F.normalize(decoded, dim=1)
    assert float((found * F.normalize(e, dim=1)).sum(1).mean()) > 0.3


def test_a_start_that_knows_nothing_names_tokens_by_their_average_row():
    method = tiny_cola(move=0.0)
    data = random_sequences(16, 20, 3, 5)
    method.prepare(data, range(16), random_anchors(data, method.layer))
    counts = torch.bincount(data.input_ids_NL[:, 3:].flatten().long(), minlength=NUM_TOKENS).float()
    wanted = counts @ method.head_VD / counts.sum()
    decoder = method.networks.decoder
    found = decoder(torch.zeros(1, 1, SHAPE.latent_dim))[0, 0] / decoder.log_scale.exp()
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "wanted"), [("linear", 1.0), ("random", None)])
def test_an_untrained_prior_is_the_linear_guess(start, wanted):
    method = tiny_cola(move=0.0, start=start)
    generator = torch.Generator().manual_seed(0)
    c, noise = torch.randn(2, 50, 40, 6, generator=generator)
    nobody = torch.zeros(50, 40, dtype=torch.bool)
    for t in (0.2, 0.8):
        inputs = objective.FlowInputs(c, noise, torch.full((50,), t), ~nobody, nobody, nobody, 36, 0)
        error, _ = objective.flow_error(method.networks.prior, inputs)
        assert float(error.mean().detach()) == pytest.approx(2.0 if wanted is None else linear_error(t), rel=0.05)
