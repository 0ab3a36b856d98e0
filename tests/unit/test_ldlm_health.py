"""LDLM's figures of health against plain recomputation, and the consistency term against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from dllm_core.corruption.gaussian import TanSchedule
from dllm_core.corruption.noise import NoiseSource
from dllm_core.methods.ldlm import consistency, health, objective
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.segments import segments_of
from tests import ldlm_tools
from tests.ldlm_tools import LAYOUTS, documents, random_anchors, tiny_ldlm
from tests.method_tools import corrupt, split_losses, step_info

# -- health ---------------------------------------------------------------------------------------------------------


class Naive:
    """The figures of a batch, one document at a time in float64."""

    def __init__(self, method: Method, batch, resources, seed: int) -> None:
        self.method, self.networks = method, ldlm_tools.double(method.networks)
        table_VD = method.embedding_VD.double()
        self.table_VD, self.head_VD = table_VD, table_VD / table_VD.norm(dim=1, keepdim=True)
        drawn = {}
        for name in ("diffusion", "decoder"):
            drawn[name] = NoiseSource(seed).normal(batch, f"health {name}", (batch.length, method.networks.latent_dim))
        self.rows = []
        for row, prompt, response in documents(batch):
            stored = resources.anchors.states[batch.sequence_keys[row]][method.layer].double()[response]
            h_LD = (stored - method.mean_D.double()) / method.std_D.double()
            self.rows.append(
                {
                    "h": h_LD,
                    "z": ldlm_tools.encode(self.networks, h_LD),
                    "ids": batch.input_ids_BL[row, response],
                    "prompt": table_VD[batch.input_ids_BL[row, prompt]],
                    "noise": drawn["diffusion"][row, response].double(),
                    "decoder noise": drawn["decoder"][row, response].double(),
                    "row": row,
                }
            )

    def x0_hat(self, row: dict, z_LK: Tensor, t: float) -> Tensor:
        ratio = self.method.options.schedule_d * math.tan(math.pi * t / 2)
        x_LK = (z_LK + ratio * row["noise"]) / math.sqrt(1 + ratio**2)
        first = ldlm_tools.denoise(self.networks, x_LK, t, torch.zeros_like(x_LK), row["prompt"])
        return ldlm_tools.denoise(self.networks, x_LK, t, first, row["prompt"])

    def logp(self, z_LK: Tensor) -> Tensor:
        states_LD = ldlm_tools.latent_map(self.networks.latent_decoder, z_LK)
        return (ldlm_tools.token_rows(self.networks, states_LD) @ self.head_VD.T).log_softmax(1)

    def mean(self, of) -> float:
        return float(torch.cat([of(row).double() for row in self.rows]).mean())

    def accuracy(self, latents) -> float:
        return self.mean(lambda row: self.logp(latents(row)).argmax(1) == row["ids"])

    def error(self, t: float, latents=lambda row: row["z"]) -> float:
        return self.mean(lambda row: (self.x0_hat(row, latents(row), t) - latents(row)).square().mean(1))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_figure_is_what_it_says(layout):
    data, method = LAYOUTS[layout](), tiny_ldlm().eval()
    method.times.observe(torch.tensor([0.105, 0.105, 0.905]), torch.tensor([1.0, 2.0, 4.0]))
    method.times.end_step()
    batch, resources = data.batch_of([0, 2, 3]), random_anchors(data, method.layer)
    found = method.diagnose(batch, resources, NoiseSource(5))
    naive = Naive(method, batch, resources, 5)
    assert json.loads(json.dumps(found)) == found

    def of_states(row):
        return (ldlm_tools.token_rows(naive.networks, row["h"]) @ naive.head_VD.T).argmax(1) == row["ids"]

    assert found["decode_accuracy_true_states"] == pytest.approx(naive.mean(of_states))
    assert found["reconstruction_accuracy"] == pytest.approx(naive.accuracy(lambda row: row["z"]))
    noisy = naive.accuracy(lambda row: row["z"] + method.decoder_noise * row["decoder noise"])
    assert found["reconstruction_accuracy_noisy"] == pytest.approx(noisy)
    for t in ("0.2", "0.4", "0.6"):
        decoded = naive.accuracy(lambda row, t=t: naive.x0_hat(row, row["z"], float(t)))
        assert found["decode_accuracy_from_x0_hat"][t] == pytest.approx(decoded)
    z_NK = torch.cat([row["z"] for row in naive.rows])
    variance = float(z_NK.var(0, correction=0).mean())
    assert found["latent_variance"] == pytest.approx(variance, rel=1e-4)
    values = torch.linalg.eigvalsh(torch.cov(z_NK.T, correction=0)).clamp(min=1e-300)
    share = values / values.sum()
    assert found["latent_effective_rank"] == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-3)
    for t, error in found["diffusion_mse"].items():
        assert error == pytest.approx(naive.error(float(t)), rel=1e-3)
        assert found["diffusion_mse_relative"][t] == pytest.approx(naive.error(float(t)) / variance, rel=1e-3)

    def mixed(row):
        segment = [r is row for r in naive.rows].index(True)
        generator = NoiseSource(5).generator(batch.sample_ids[row["row"]], segment, "health shuffle")
        return row["z"][torch.randperm(len(row["z"]), generator=generator)]

    assert found["shuffle_test"]["plain"] == found["diffusion_mse"]["0.5"]
    assert found["shuffle_test"]["shuffled"] == pytest.approx(naive.error(0.5, mixed), rel=1e-3)
    best = torch.cat([naive.logp(row["z"]) for row in naive.rows]).topk(2, dim=1).values
    assert found["decoder_margin_nats"] == pytest.approx(float((best[:, 0] - best[:, 1]).mean()), rel=1e-3)
    assert found["adaptive_bin_losses"] == [1.5, 4.0]


def test_the_accuracies_of_a_perfect_autoencoder_are_one():
    """States that are their tokens' embeddings, an identity all the way: every figure of reading is 1."""
    data = LAYOUTS["ragged"]()
    shape = ldlm_tools.SHAPE.model_copy(update={"latent_dim": None})
    method = tiny_ldlm(move=0.0, shape=shape, decoder_noise=0.0).eval()
    resources = random_anchors(data, method.layer)
    with torch.no_grad():
        for n, key in enumerate(data.keys):
            resources.anchors.states[key][method.layer] = method.embedding_VD[data.input_ids_NL[n].long()].clone()
        eye = torch.eye(ldlm_tools.HIDDEN)
        networks = method.networks
        for linear in (networks.latent_encoder, networks.latent_decoder, networks.token_decoder):
            linear.straight.weight.copy_(eye)
    batch = data.batch_of(range(4))
    found = method.diagnose(batch, resources, NoiseSource(0))
    names = ("decode_accuracy_true_states", "reconstruction_accuracy", "reconstruction_accuracy_noisy")
    assert [found[n] for n in names] == [1.0, 1.0, 1.0]
    assert found["decode_accuracy_from_x0_hat"]["0.2"] < 0.2  # the denoiser says zero
    assert found["diffusion_mse"]["0.5"] == pytest.approx(1.0, rel=1e-4)
    corrupted, totals = corrupt(method, batch)
    _, parts, _ = split_losses(method, corrupted, totals, [2, 2], resources, step_info(step=0))
    assert parts["reconstruction_accuracy"] == pytest.approx(1.0)


def test_effective_rank_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    basis_NK = torch.linalg.qr(torch.randn(64, 8, generator=generator, dtype=torch.double))[0]
    assert health.effective_rank(basis_NK) == pytest.approx(8.0)
    assert health.effective_rank(basis_NK[:, :1] @ torch.ones(1, 8, dtype=torch.double)) == pytest.approx(1.0)
    assert health.effective_rank(torch.zeros(5, 3, dtype=torch.double)) == pytest.approx(1.0)
    two = basis_NK * torch.tensor([3.0, 1.0, 0, 0, 0, 0, 0, 0]).double()  # shares .9 and .1
    assert health.effective_rank(two) == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))


# -- consistency ----------------------------------------------------------------------------------------------------


def test_the_next_point_of_the_grid():
    times = torch.tensor([1.0, 0.99, 15 / 16, 0.5, 0.51, 1 / 16 + 1e-4, 1 / 16, 0.01, 0.0])
    wanted = [15 / 16, 15 / 16, 14 / 16, 7 / 16, 8 / 16, 1 / 16, 0.0, 0.0, 0.0]
    assert consistency.next_time(times).tolist() == wanted


def _inputs(method: Method, times: list[float]):
    data = LAYOUTS["ragged"]()
    batch, resources = data.batch_of(range(4)), random_anchors(data, method.layer)
    corrupted, totals = corrupt(method, batch)
    corrupted.extras["time_B"] = torch.tensor(times)
    inputs = method._inputs(corrupted, segments_of(batch), step_info(), resources)
    found, prefix = objective.terms(method.networks, inputs, method.head_VD, method.schedule, 1.0, totals["tokens"])
    return inputs, found, prefix


def _constant(method: Method, student: Tensor, average: Tensor) -> None:
    """Make both predict a constant, whatever they see."""
    with torch.no_grad():
        method.networks.denoiser.out.weight.zero_()
        method.networks.denoiser.out.bias.copy_(student)
        method.ema.averages()["denoiser.out.weight"].zero_()
        method.ema.averages()["denoiser.out.bias"].copy_(average)


def test_the_gap_between_two_constants_is_their_distance():
    """... except up to t = 1/16, where the trajectory ends in the prediction itself."""
    method = tiny_ldlm()
    student, average = torch.randn(12), torch.randn(12)
    _constant(method, student, average)
    inputs, found, prefix = _inputs(method, [0.9, 0.3, 0.0625, 0.02])
    gap_S = consistency.gap(method.networks, method.ema, inputs, found, prefix, method.schedule)
    distance = float((student - average).square().mean())
    expected = torch.tensor([5 * distance, 2 * distance, 0.0, 0.0])  # slots of the rows
    torch.testing.assert_close(gap_S, expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(gap_S.sum(), method.networks.denoiser.out.bias)
    torch.testing.assert_close(grad, 7 * 2 * (student - average) / 12, rtol=1e-4, atol=1e-5)
    _constant(method, student, student)
    inputs, found, prefix = _inputs(method, [0.9, 0.3, 0.5, 0.02])
    gap_S = consistency.gap(method.networks, method.ema, inputs, found, prefix, method.schedule)
    assert float(gap_S.detach().abs().max()) < 1e-10


def test_the_target_is_the_averaged_prediction_one_ddim_step_on():
    method = tiny_ldlm(self_condition=0.0, prompt_drop=0.0)
    with torch.no_grad():
        for average in method.ema.averages().values():
            average += 0.1 * torch.randn_like(average)
    times = [0.9, 0.3, 0.52, 0.7]
    inputs, found, prefix = _inputs(method, times)
    gap_S = consistency.gap(method.networks, method.ema, inputs, found, prefix, method.schedule)
    before = {n: a.clone() for n, a in method.ema.averages().items()}
    gap_S.sum().backward()
    for name, average in method.ema.averages().items():
        assert torch.equal(average, before[name])
        assert average.grad is None
    live = {n: p.detach().clone() for n, p in method.networks.named_parameters()}
    schedule = TanSchedule(method.options.schedule_d)
    for s, t in enumerate(times):
        count = int(inputs.real_SL[s].sum())
        x0_LK, x_LK = found.x0_hat_SLK[s, :count].detach().double(), found.noisy_SLK[s, :count].detach().double()
        earlier = (math.ceil(t * 16) - 1) / 16
        (a_t, s_t), (a_s, s_s) = schedule.coefficients(t), schedule.coefficients(earlier)
        x_s_LK = a_s * x0_LK + s_s * (x_LK - a_t * x0_LK) / s_t
        with torch.no_grad():  # the prompt is read by the student: of the averages only the denoiser's are used
            for name, average in method.ema.averages().items():
                if name.startswith("denoiser."):
                    method.networks.get_parameter(name).copy_(average)
            own = prefix.select(torch.tensor([s]))
            target = method.networks.denoise(
                x_s_LK[None].float(), torch.tensor([earlier]), x0_LK[None].float(), own, None
            )[0]
            for name, value in live.items():
                method.networks.get_parameter(name).copy_(value)
        expected = float((x0_LK - target).square().mean(1).sum())
        assert float(gap_S[s].detach()) == pytest.approx(expected, rel=1e-3)


def test_weight_zero_is_the_loss_without_it_and_another_weight_adds_just_that():
    data = LAYOUTS["ragged"]()
    losses = {}
    for weight in (0.0, 0.5, 2.0):
        method = tiny_ldlm(consistency=weight)
        with torch.no_grad():
            for average in method.ema.averages().values():
                average.mul_(1.1)
        corrupted, totals = corrupt(method, data.batch_of(range(4)))
        loss, parts, grads = split_losses(method, corrupted, totals, [4], random_anchors(data, method.layer))
        losses[weight] = (loss, parts.get("consistency_mse"), grads)
    plain, gap = losses[0.0][0], losses[0.5][1]
    assert losses[0.0][1] is None
    assert gap > 1e-4
    assert losses[2.0][1] == pytest.approx(gap)
    assert losses[0.5][0] == pytest.approx(plain + 0.5 * gap, rel=1e-6)
    assert losses[2.0][0] == pytest.approx(plain + 2.0 * gap, rel=1e-6)
    for name, grad in losses[0.0][2].items():
        if name.startswith(("networks.token_decoder", "networks.latent_decoder")):
            assert torch.equal(losses[2.0][2][name], grad), name  # the term is none of their business
        if name.startswith("networks.denoiser.out"):
            assert not torch.allclose(losses[2.0][2][name], grad), name
