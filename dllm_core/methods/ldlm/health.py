"""How well the autoencoder and the denoiser are doing, on held-out text. S segments, L slots, K latent dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_core.corruption.gaussian import diffuse
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.kernels import token_stats
from dllm_core.layers.dit import Prefix
from dllm_core.methods.protocol import Resources
from dllm_core.methods.segments import Segments, segments_of

if TYPE_CHECKING:
    from dllm_core.methods.ldlm.method import Method

TIMES = (0.2, 0.4, 0.5, 0.6, 0.8)
DECODED_AT = (0.2, 0.4, 0.6)
SHUFFLED_AT = 0.5


class _Look:
    """One held-out batch through the networks."""

    def __init__(self, method: Method, batch: Batch, resources: Resources, noise: NoiseSource) -> None:
        self.method, self.batch = method, batch
        device, dtype = method.device, method.embedding_VD.dtype
        self.cut: Segments = segments_of(batch)
        real_SL = self.cut.real_SL.to(device)
        self.real_SL, self.padding_SL = real_SL, None if self.cut.is_full else real_SL
        self.ids_SL = self.cut.slots(batch.input_ids_BL).to(device)
        stored_SLD = method.stored_states(batch, self.cut.row_S, self.cut.position_SL, resources)
        self.states_SLD = method.standardise(stored_SLD).masked_fill(~real_SL[..., None], 0.0)
        self.latents_SLK = method.networks.encode(self.states_SLD, self.padding_SL)
        prompt_SPD, visible_SP = method.prompts_of(batch, self.cut, resources)
        self.prefix: Prefix | None = method.networks.prompt(
            None if prompt_SPD is None else prompt_SPD.to(device), None if visible_SP is None else visible_SP.to(device)
        )
        shape = (batch.length, method.networks.latent_dim)
        drawn = {name: noise.normal(batch, f"health {name}", shape) for name in ("diffusion", "decoder")}
        self.noise = {n: self.cut.slots(v).to(device=device, dtype=dtype) for n, v in drawn.items()}

    def mean(self, per_slot_SL: Tensor) -> float:
        """Return the mean over real slots."""
        return float(per_slot_SL.double()[self.real_SL].mean())

    def accuracy(self, latents_SLK: Tensor) -> float:
        """Return how many tokens come back from latents."""
        return self.mean(self.method.decode(latents_SLK, self.padding_SL) == self.ids_SL)

    def prediction(self, t: float, latents_SLK: Tensor) -> Tensor:
        """Return x0_hat of noised latents as sampling would have it: a second pass that knows the first."""
        time_S = torch.full((len(latents_SLK),), t, device=latents_SLK.device)
        noisy_SLK = diffuse(latents_SLK, self.noise["diffusion"], time_S, self.method.schedule)
        first_SLK = self.method.networks.denoise(noisy_SLK, time_S, None, self.prefix, self.padding_SL)
        return self.method.networks.denoise(noisy_SLK, time_S, first_SLK, self.prefix, self.padding_SL)

    def error(self, predicted_SLK: Tensor, latents_SLK: Tensor) -> float:
        """Return the mean squared error per dimension over real slots."""
        return self.mean((predicted_SLK.double() - latents_SLK.double()).square().mean(-1))

    def shuffled(self, latents_SLK: Tensor, noise: NoiseSource) -> Tensor:
        """Return the latents of every segment in another order."""
        rows = []
        for s, row in enumerate(self.cut.row_S.tolist()):
            generator = noise.generator(self.batch.sample_ids[row], s, "health shuffle")
            count = int(self.cut.real_SL[s].sum())
            order = torch.cat((torch.randperm(count, generator=generator), torch.arange(count, latents_SLK.shape[1])))
            rows.append(latents_SLK[s, order.to(latents_SLK.device)])
        return torch.stack(rows)


@torch.no_grad()
def health(method: Method, batch: Batch, resources: Resources, noise: NoiseSource) -> dict[str, Any]:
    """Return figures of health, JSON-able; noise levels are keyed by their text.

    decode_accuracy_true_states: tokens that D_w reads out of the true states. reconstruction_accuracy: through E_z and
    D_z without noise; `_noisy` with the decoder's training noise. decode_accuracy_from_x0_hat: from the denoiser's
    prediction. diffusion_mse per dimension, `_relative` to predicting the mean latent of these sequences.
    latent_variance: mean over dimensions; latent_effective_rank: exp of the entropy of the covariance's spectrum.
    shuffle_test: the error at t = .5 on latents as they are and with their positions shuffled. decoder_margin_nats:
    mean log-probability of the best token minus that of the second, from noise-free latents.
    """
    look = _Look(method, batch, resources, noise)
    z_SLK = look.latents_SLK
    states_accuracy = _best(method, look.states_SLD, look.padding_SL)
    flat_NK = z_SLK[look.real_SL].double()
    centred_NK = flat_NK - flat_NK.mean(0)
    variance_K = centred_NK.square().mean(0)
    predictions = {t: look.prediction(t, z_SLK) for t in TIMES}
    errors = {t: look.error(p, z_SLK) for t, p in predictions.items()}
    mixed_SLK = look.shuffled(z_SLK, noise)
    noisy_SLK = z_SLK + method.decoder_noise * look.noise["decoder"]
    return {
        "decode_accuracy_true_states": look.mean(states_accuracy == look.ids_SL),
        "reconstruction_accuracy": look.accuracy(z_SLK),
        "reconstruction_accuracy_noisy": look.accuracy(noisy_SLK),
        "decode_accuracy_from_x0_hat": {f"{t:g}": look.accuracy(predictions[t]) for t in DECODED_AT},
        "diffusion_mse": {f"{t:g}": e for t, e in errors.items()},
        "diffusion_mse_relative": {f"{t:g}": e / float(variance_K.mean()) for t, e in errors.items()},
        "latent_variance": float(variance_K.mean()),
        "latent_effective_rank": effective_rank(centred_NK),
        "shuffle_test": {
            "plain": errors[SHUFFLED_AT],
            "shuffled": look.error(look.prediction(SHUFFLED_AT, mixed_SLK), mixed_SLK),
        },
        "decoder_margin_nats": _margin(method, look, z_SLK),
        "adaptive_bin_losses": [v for v in method.times.bin_losses().tolist() if v == v],
    }


def effective_rank(centred_NK: Tensor) -> float:
    """Return exp(H(p)), p the eigenvalues of the covariance divided by their sum; at most K."""
    values_K = torch.linalg.eigvalsh(centred_NK.T @ centred_NK / len(centred_NK)).clamp(min=0)
    share_K = values_K / values_K.sum().clamp(min=1e-300)
    return float(torch.special.entr(share_K).sum().exp())


def _best(method: Method, states_SLD: Tensor, padding_SL: Tensor | None) -> Tensor:
    outputs_SLD = method.networks.token_decoder(states_SLD, padding_SL)
    found = token_stats.stats(outputs_SLD.flatten(0, 1), method.head_VD, second=False)
    return found.argmax_M.view(states_SLD.shape[:2])


def _margin(method: Method, look: _Look, latents_SLK: Tensor) -> float:
    outputs_SLD = method.token_outputs(latents_SLK, look.padding_SL)
    found = token_stats.stats(outputs_SLD[look.real_SL], method.head_VD)
    assert found.second_logprob_M is not None
    return float((found.top_logprob_M - found.second_logprob_M).double().mean())
