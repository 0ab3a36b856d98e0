"""How well autoencoder and prior are doing, on held-out text. S spans, T slots, N noisy slots, K latent dimension."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.kernels import token_stats
from dllm_core.methods.cola.draws import block_draws
from dllm_core.methods.cola.flow import euler, time_grid
from dllm_core.methods.cola.objective import FlowInputs, flow_error, kl_to_standard
from dllm_core.methods.cola.spans import spans_of
from dllm_core.methods.protocol import Resources

if TYPE_CHECKING:
    from dllm_core.methods.cola.method import Method

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
EULER_STEPS = (1, 4, 16)
ACTIVE_NATS = 0.01
"""A dimension whose KL is below this carries nothing: it has fallen back to the standard normal."""
LEAST_ACTIVE, LEAST_ACCURACY = 0.5, 0.5
LOG_SNR_RANGE = (0.0, 8.0)


@torch.no_grad()
def health(method: Method, batch: Batch, resources: Resources, noise: NoiseSource) -> dict[str, Any]:
    """Return figures of health over response tokens, JSON-able; times and steps are keyed by their text.

    posterior_log_snr: log(mean mu^2 / mean sigma^2), in nats. kl_nats_per_token: summed over dimensions;
    kl_of_dimension: mean over tokens of each; active_dimensions: those above 0.01 nats. reconstruction_accuracy: tokens
    read out of the posterior's mode; `_noisy` of a sample. flow_mse: error of the velocity per dimension with the whole
    clean prefix at hand; `_relative` to the best linear guess from z_t alone, 2 - (2 t - 1)^2 / ((1 - t)^2 + t^2).
    decode_accuracy_from_euler: tokens read out of a block sampled in so many steps after its true prefix, without
    guidance. alarms: 1 where something has collapsed.
    """
    cut = spans_of(batch)
    states_STD = method.states_of(batch, cut, resources)
    used_ST, ids_ST = cut.response_ST, cut.slots(batch.input_ids_BL)
    q = method.networks.encoder(states_STD)
    shape = (batch.length, method.networks.latent_dim)
    drawn = {n: cut.slots(noise.normal(batch, f"health {n}", shape)).to(q.mean) for n in ("posterior", "flow")}
    z_STK = q.sample(drawn["posterior"])

    def accuracy(latents_STK: Tensor) -> float:
        outputs_MD = method.networks.decoder(latents_STK)[used_ST]
        best_M = token_stats.stats(outputs_MD, method.head_VD, second=False).argmax_M
        return float((best_M == ids_ST[used_ST]).double().mean())

    mean_MK, variance_MK = q.mean[used_ST].double(), q.log_variance[used_ST].double().exp()
    kl_K = kl_to_standard(q)[used_ST].double().mean(0)
    inputs = _inputs(method, batch, noise, z_STK, drawn["flow"])
    flow = {t: _flow_mse(method, inputs, t) for t in TIMES}
    found: dict[str, Any] = {
        "posterior_log_snr": math.log(float(mean_MK.square().mean()) / float(variance_MK.mean())),
        "kl_nats_per_token": float(kl_K.sum()),
        "kl_of_dimension": kl_K.tolist(),
        "active_dimensions": int((kl_K > ACTIVE_NATS).sum()),
        "reconstruction_accuracy": accuracy(q.mean),
        "reconstruction_accuracy_noisy": accuracy(z_STK),
        "flow_mse": {f"{t:g}": e for t, e in flow.items()},
        "flow_mse_relative": {f"{t:g}": e / linear_error(t) for t, e in flow.items()},
        "decode_accuracy_from_euler": {str(n): accuracy(_sampled(method, inputs, z_STK, n)) for n in EULER_STEPS},
    }
    return found | {"alarms": _alarms(found, shape[1])}


def linear_error(t: float) -> float:
    """Return the error per dimension of the best linear velocity from z_t alone, for latents of mean 0, variance 1."""
    return 2.0 - (2.0 * t - 1.0) ** 2 / ((1.0 - t) ** 2 + t**2)


def _inputs(method: Method, batch: Batch, noise: NoiseSource, z_STK: Tensor, flow_STK: Tensor) -> FlowInputs:
    """Return the [clean | noisy] layout with every block given its whole prefix and nothing of itself."""
    cut = spans_of(batch)
    options = method.options.model_copy(update={"clean_prefix": 0.0, "prefix_drop": 0.0})
    drawn = {n: cut.slots(v.to(z_STK.device)) for n, v in block_draws(batch, noise, options).items()}
    num_clean, first = cut.halves(options.block_size)
    return FlowInputs(
        latents_STK=method.to_prior(z_STK),
        noise_STK=flow_STK,
        time_S=torch.zeros(len(cut), device=z_STK.device),
        real_ST=cut.real_ST,
        known_ST=drawn["known_BT"],
        alone_ST=drawn["alone_BT"],
        num_clean=num_clean,
        first=first,
    )


def _flow_mse(method: Method, inputs: FlowInputs, t: float) -> float:
    at_t = replace(inputs, time_S=torch.full_like(inputs.time_S, t))
    error_SN, counted_SN = flow_error(method.networks.prior, at_t)
    return float(error_SN.double()[counted_SN].mean())


def _sampled(method: Method, inputs: FlowInputs, z_STK: Tensor, steps: int) -> Tensor:
    """Return latents whose blocks are sampled, all at once, each after its true prefix."""
    prior, first, count = method.networks.prior, inputs.first, inputs.num_clean
    slot_ST = torch.arange(z_STK.shape[1], device=z_STK.device).expand(z_STK.shape[:2])
    clean_STK, known_SN1 = inputs.latents_STK, inputs.known_ST[:, first:, None]
    context = None
    if count:
        context = prior.clean(clean_STK[:, :count], slot_ST[:, :count], inputs.real_ST[:, :count])

    def velocity(x_SNK: Tensor, t_S: Tensor) -> Tensor:
        x_SNK = torch.where(known_SN1, clean_STK[:, first:], x_SNK)
        known_SN = inputs.known_ST[:, first:]
        return prior.velocity(x_SNK, t_S, slot_ST[:, first:], inputs.real_ST[:, first:], context, known_SN)

    found_SNK = euler(velocity, inputs.noise_STK[:, first:], time_grid([steps] * len(z_STK)))
    sampled_STK = z_STK.clone()
    sampled_STK[:, first:] = torch.where(known_SN1, z_STK[:, first:], method.from_prior(found_SNK))
    return sampled_STK


def _alarms(found: dict[str, Any], latent_dim: int) -> dict[str, int]:
    """Return 1 for what has collapsed: the posterior, its noise, reconstruction, the prior."""
    low, high = LOG_SNR_RANGE
    relative = found["flow_mse_relative"]
    return {
        "few_active_dimensions": int(found["active_dimensions"] < LEAST_ACTIVE * latent_dim),
        "posterior_all_noise": int(found["posterior_log_snr"] < low),
        "posterior_without_noise": int(found["posterior_log_snr"] > high),
        "reconstruction_lost": int(found["reconstruction_accuracy"] < LEAST_ACCURACY),
        "prior_no_better_than_linear": int(min(relative.values()) >= 1.0),
    }
