"""Statistics and closed forms of LDLM's start against numpy and brute force; the draws of a training step."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_core.corruption.adaptive_time import AdaptiveTimes
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods import closed_forms
from dllm_core.methods.ldlm import start
from dllm_core.methods.ldlm.draws import TIME_MIN, draw, weight_totals
from dllm_core.methods.ldlm.options import Options
from dllm_core.methods.protocol import Resources
from tests.ldlm_tools import HIDDEN, LAYOUTS, random_anchors, tiny_ldlm
from tests.method_tools import DictAnchors, step_info
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS

V, D, N = 11, 6, 400


def _data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return correlated states of very different scales, their tokens, and the head's rows."""
    generator = torch.Generator().manual_seed(seed)
    head_VD = torch.nn.functional.normalize(torch.randn(V, D, generator=generator), dim=1)
    ids_N = torch.randint(V, (N,), generator=generator)
    mix_DD = torch.randn(D, D, generator=generator)
    states_ND = (head_VD[ids_N] + 0.3 * torch.randn(N, D, generator=generator)) @ mix_DD
    return states_ND * torch.logspace(-2, 2, D) + 3.0, ids_N, head_VD


def _found(parts: int = 3) -> tuple[closed_forms.Statistics, Tensor, Tensor, Tensor]:
    states_ND, ids_N, head_VD = _data()
    cuts = np.linspace(0, N, parts + 1).astype(int)
    pieces = [(states_ND[a:b], ids_N[a:b]) for a, b in pairwise(cuts)]
    found = closed_forms.gather_statistics(iter(pieces), head_VD)
    standard_ND = (states_ND.double() - states_ND.double().mean(0)) / states_ND.double().std(0, correction=0)
    return found, standard_ND, ids_N, head_VD


def test_moments_are_those_of_numpy_however_the_data_are_cut():
    states_ND, _, _ = _data()
    for parts in (1, 7):
        found, standard_ND, ids_N, head_VD = _found(parts)
        states = states_ND.numpy().astype(np.float64)
        np.testing.assert_allclose(found.mean_D, states.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.std_D, states.std(0), rtol=1e-6)
        np.testing.assert_allclose(found.covariance_DD, np.corrcoef(states.T), atol=1e-9)
        rows = head_VD.numpy().astype(np.float64)[ids_N]
        centred = rows - rows.mean(0)
        wanted = sum(np.outer(standard_ND[n], centred[n]) for n in range(N)) / N
        np.testing.assert_allclose(found.with_head_DD, wanted, atol=1e-9)
        assert found.num_tokens == N


def test_a_dimension_that_never_varies_stays_as_it_is():
    states_ND, ids_N, head_VD = _data()
    states_ND[:, 2] = 7.0
    found = closed_forms.gather_statistics([(states_ND, ids_N)], head_VD)
    assert found.std_D[2] == 1.0
    assert found.mean_D[2] == 7.0
    assert found.covariance_DD.isfinite().all()
    with pytest.raises(ValueError, match="1 tokens"):
        closed_forms.gather_statistics([(states_ND[:1], ids_N[:1])], head_VD)


@pytest.mark.parametrize("latent", [2, 4, D, D + 3])
def test_the_principal_map_keeps_the_most_variance_of_all_projections(latent):
    found, standard_ND, _, _ = _found()
    map_KD = start.principal_map(found, latent).double()
    z_NK = standard_ND @ map_KD.T
    assert float(z_NK.var(0, correction=0).mean()) == pytest.approx(1.0, rel=1e-5)
    left, values, _ = np.linalg.svd(standard_ND.numpy(), full_matrices=False)
    kept = min(latent, D)
    best = left[:, :kept] @ np.diag(values[:kept])
    restored, *_ = np.linalg.lstsq(z_NK.numpy(), standard_ND.numpy(), rcond=None)
    error = np.square(z_NK.numpy() @ restored - standard_ND.numpy()).sum()
    total = np.square(standard_ND.numpy()).sum()
    assert error / total == pytest.approx(1 - np.square(best).sum() / total, abs=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_the_decoder_is_the_least_squares_one_on_noisy_latents(noise):
    """Regression on many noisy copies tends to it; and no other matrix has a smaller expected error."""
    found, standard_ND, _, _ = _found()
    map_KD = start.principal_map(found, 3)
    decoder_DK = start.best_decoder(found, map_KD, noise).double()
    z_NK = standard_ND @ map_KD.double().T
    generator = torch.Generator().manual_seed(1)
    copies = 400 if noise else 1
    noisy_NK = z_NK.repeat(copies, 1) + noise * torch.randn(copies * N, 3, generator=generator, dtype=torch.double)
    fitted_KD, *_ = np.linalg.lstsq(noisy_NK.numpy(), standard_ND.repeat(copies, 1).numpy(), rcond=None)
    np.testing.assert_allclose(decoder_DK, fitted_KD.T, atol=0.01)

    def expected(matrix_DK: Tensor) -> float:
        fit = (standard_ND - z_NK @ matrix_DK.T).square().mean()
        return float(fit + noise**2 * matrix_DK.square().sum() / D)

    least = expected(decoder_DK)
    for _ in range(20):
        assert expected(decoder_DK + 0.05 * torch.randn(D, 3, generator=generator, dtype=torch.double)) > least


def test_the_map_to_the_head_is_the_ridge_regression():
    """Least squares with an intercept, and rows that pull every weight to zero."""
    found, standard_ND, ids_N, head_VD = _found()
    rows = head_VD.double()[ids_N].numpy()
    pull = np.c_[math.sqrt(closed_forms.RIDGE * N) * np.eye(D), np.zeros(D)]
    design = np.r_[np.c_[standard_ND.numpy(), np.ones(N)], pull]
    fitted, *_ = np.linalg.lstsq(design, np.r_[rows, np.zeros((D, D))], rcond=None)
    np.testing.assert_allclose(closed_forms.head_map(found), fitted[:-1].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mean_row_D, fitted[-1], rtol=1e-4, atol=1e-6)


def test_an_affine_map_to_the_head_is_recovered_exactly(monkeypatch):
    """States that are an affine image of their tokens' head rows are read without any error, the offset included."""
    monkeypatch.setattr(closed_forms, "RIDGE", 0.0)
    method = tiny_ldlm(move=0.0)
    head_VD = method.head_VD.detach().float()
    generator = torch.Generator().manual_seed(2)
    turn_DD = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
    # tokens of unlike frequency, so that the mean row is far from zero
    ids_N = torch.randint(NUM_TOKENS, (3000,), generator=generator).minimum(torch.randint(NUM_TOKENS, (3000,)))
    states_ND = 7.0 * (head_VD[ids_N] - 0.3) @ turn_DD + 5.0
    found = closed_forms.gather_statistics([(states_ND, ids_N)], head_VD)
    start.start_linear(method.networks, found, (states_ND, ids_N), head_VD, 0.5)
    h_ND = (states_ND - found.mean_D) / found.std_D
    decoder = method.networks.token_decoder
    with torch.no_grad():
        rows_ND = decoder(h_ND[None])[0] / decoder.log_scale.exp()
    torch.testing.assert_close(rows_ND, head_VD[ids_N], rtol=1e-3, atol=1e-4)
    assert float(found.mean_row_D.norm()) > 0.05, "an offset that matters"


def test_the_scale_is_the_best_of_those_tried():
    _, ids_N, head_VD = _data()
    outputs_ND = head_VD[ids_N] + 0.5 * torch.randn(N, D)
    scores = (outputs_ND @ head_VD.T).double()

    def nats(scale: float) -> float:
        return float(-(scale * scores).log_softmax(1)[torch.arange(N), ids_N].mean())

    found = math.exp(closed_forms.best_log_scale(outputs_ND, ids_N, head_VD))
    assert found == pytest.approx(min(closed_forms.SCALES, key=nats))
    assert found not in (closed_forms.SCALES[-1],)


# -- the method's own start -----------------------------------------------------------------------------------------


def _readable(num: int = 64, noise: float = 0.6) -> tuple:
    """Return sequences and states from which tokens can be read: a fixed turn of the token's direction, plus noise."""
    data = random_sequences(num, 14, 4, NUM_TOKENS)
    method = tiny_ldlm(move=0.0)
    generator = torch.Generator().manual_seed(4)
    turn_DD = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
    unit_VD = torch.nn.functional.normalize(method.embedding_VD, dim=1)
    states = {}
    for n, key in enumerate(data.keys):
        rows_LD = unit_VD[data.input_ids_NL[n].long()] @ turn_DD * math.sqrt(HIDDEN)
        states_LD = rows_LD + noise * torch.randn(rows_LD.shape, generator=generator)
        states_LD[0] = 1e6
        states[key] = {method.layer: states_LD}
    return data, Resources(anchors=DictAnchors(states))


def test_the_first_position_never_enters_the_statistics():
    for layout in LAYOUTS.values():
        data, method = layout(), tiny_ldlm(move=0.0)
        resources = random_anchors(data, method.layer)
        batch = data.batch_of(range(4))
        method.prepare(data, [0, 1, 2, 3], resources)
        rows = torch.cat(
            [resources.anchors.states[key][method.layer][batch.response_BL[b]] for b, key in enumerate(data.keys)]
        )
        assert rows.abs().max() < 10
        torch.testing.assert_close(method.mean_D, rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method.std_D, rows.std(0, correction=0), rtol=1e-4, atol=1e-5)


def test_only_the_first_sequences_of_the_run_are_read():
    data, resources = _readable(8)
    few, all_ = tiny_ldlm(move=0.0, start_sequences=3), tiny_ldlm(move=0.0)
    few.prepare(data, [5, 2, 7, 1], resources)
    all_.prepare(data, [5, 2, 7], resources)
    assert torch.equal(few.mean_D, all_.mean_D)
    unread = [key for n, key in enumerate(data.keys) if n not in (5, 2, 7)]
    for key in unread:
        del resources.anchors.states[key]
    few.prepare(data, [5, 2, 7, 1], resources)


def test_the_linear_start_reads_tokens_and_the_random_one_does_not():
    data, resources = _readable()
    found = {}
    for kind in ("linear", "random"):
        method = tiny_ldlm(move=0.0, start=kind, decoder_noise=0.0)
        before = {n: p.clone() for n, p in method.networks.named_parameters()}
        method.prepare(data, range(48), resources)
        found[kind] = method.diagnose(data.batch_of(range(48, 64)), resources, NoiseSource(0))
        moved = {n for n, p in method.networks.named_parameters() if not torch.equal(p, before[n])}
        assert bool(moved) == (kind == "linear")
        for name, average in method.ema.averages().items():
            assert torch.equal(average, method.networks.get_parameter(name)), name
    assert found["linear"]["decode_accuracy_true_states"] > 0.6
    assert found["linear"]["reconstruction_accuracy"] > 0.1
    assert found["random"]["decode_accuracy_true_states"] < 0.1
    assert found["random"]["reconstruction_accuracy"] < 0.1


def test_the_linear_start_is_the_closed_forms_and_nothing_else():
    """At the start every network is its straight path: what comes out is the plain linear algebra."""
    data, resources = _readable()
    method = tiny_ldlm(move=0.0, normalise="none")
    method.prepare(data, range(48), resources)
    batch = data.batch_of([50])
    stored_LD = resources.anchors.states[batch.sequence_keys[0]][method.layer][4:]
    h_LD = (stored_LD - method.mean_D) / method.std_D
    rows = [resources.anchors.states[data.keys[n]][method.layer][4:] for n in range(48)]
    ids_N = torch.cat([data.input_ids_NL[n, 4:].long() for n in range(48)])
    found = closed_forms.gather_statistics([(torch.cat(rows), ids_N)], method.head_VD.detach())
    map_KD = start.principal_map(found, 12)
    z_LK = h_LD @ map_KD.T
    torch.testing.assert_close(method.networks.encode(h_LD[None])[0], z_LK, rtol=1e-4, atol=1e-5)
    decoder_DK = start.best_decoder(found, map_KD, method.decoder_noise)
    torch.testing.assert_close(method.networks.latent_decoder(z_LK[None])[0], z_LK @ decoder_DK.T, rtol=1e-4, atol=1e-5)
    scale = method.networks.token_decoder.log_scale.exp()
    rows_LD = scale * (h_LD @ closed_forms.head_map(found).T + found.mean_row_D)
    torch.testing.assert_close(method.networks.token_decoder(h_LD[None])[0], rows_LD, rtol=1e-4, atol=1e-4)


# -- draws ----------------------------------------------------------------------------------------------------------

OPTIONS = Options(prompt_drop=0.25)
KEYED = (
    "noise_BTK",
    "decoder_noise_BTK",
    "self_condition_B",
    "drop_prompt_B",
    "true_states_B",
    "token_weight_BT",
)


def _draw(batch: Batch, seed: int = 0, times: AdaptiveTimes | None = None, **info: int) -> dict[str, Tensor]:
    where = step_info(batch_size=len(batch), **info)
    return draw(batch, where, NoiseSource(seed), OPTIONS, times or AdaptiveTimes(10), 5)


def test_what_is_keyed_by_the_sample_does_not_depend_on_its_company():
    data = random_sequences(8, 9, 3, 50)
    whole = _draw(data.batch([(i, 1) for i in range(8)]))
    assert set(whole) == {"time_B", *KEYED}
    for i in (0, 5):
        alone = _draw(data.batch([(i, 1)]), step=3)
        for name in KEYED:
            assert torch.equal(alone[name][0], whole[name][i]), name
    other = _draw(data.batch([(i, 2) for i in range(8)]))
    seeded = _draw(data.batch([(i, 1) for i in range(8)]), seed=1)
    for name in ("noise_BTK", "decoder_noise_BTK"):
        assert not torch.equal(other[name], whole[name])
        assert not torch.equal(seeded[name], whole[name])
        assert whole[name].shape == (8, 9, 5)
    assert not torch.equal(whole["noise_BTK"], whole["decoder_noise_BTK"])


def test_there_is_one_time_in_each_stratum_and_the_density_shapes_them():
    data = random_sequences(8, 9, 3, 50)
    batch = data.batch_of(range(8))
    seen = set()
    for step in range(4):
        times = _draw(batch, step=step)["time_B"]
        place = ((times.double() - TIME_MIN) / (1 - TIME_MIN) * 8).floor()
        assert sorted(place.tolist()) == list(range(8))
        seen.add(float(times[0]))
    assert len(seen) == 4
    steep = AdaptiveTimes(1, pool=0)
    t = torch.linspace(0.001, 1, 1000)
    steep.observe(t, (t > 0.7).float())
    steep.end_step()
    assert (_draw(batch, times=steep)["time_B"] > 0.65).sum() >= 7
    even = OPTIONS.model_copy(update={"adaptive_times": False})
    flat = draw(batch, step_info(batch_size=8), NoiseSource(0), even, steep, 5)["time_B"]
    torch.testing.assert_close(flat, _draw(batch)["time_B"], rtol=1e-5, atol=1e-6)


def test_coins_fall_as_often_as_they_should():
    data = random_sequences(4, 6, 3, 50)
    drawn = _draw(data.batch([(i % 4, i // 4) for i in range(2000)]))
    for name, share in (("self_condition_B", 0.5), ("drop_prompt_B", 0.25), ("true_states_B", 0.5)):
        assert float(drawn[name].double().mean()) == pytest.approx(share, abs=0.04)
    together = (drawn["self_condition_B"] & drawn["true_states_B"]).double().mean()
    assert float(together) == pytest.approx(0.25, abs=0.04)


def test_totals_count_what_each_mean_is_over():
    data = LAYOUTS["ragged"]()
    batch = data.batch_of(range(4))
    extras = _draw(batch)
    extras["true_states_B"] = torch.tensor([True, False, True, False])
    totals = weight_totals(batch.response_BL, extras)
    assert totals["tokens"] == int(batch.response_BL.sum()) == 17
    assert totals["true_tokens"] == pytest.approx(5 + 6)  # weights of a row add up to its tokens
    assert totals["decoded_tokens"] == pytest.approx(2 + 4)
    assert totals["samples"] == 4
