"""Cola DLM on frozen states: first a text autoencoder, then a block-causal flow on its latents.

After arXiv:2605.06548. B batch, S spans (documents), T slots (one latent a token), N noisy slots, K latent dimension, D
width of the frozen states. The language model is not in memory while this trains: its states come from the anchor
cache. Generating needs it once, to read the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.cola import generation, objective
from dllm_core.methods.cola.draws import PRIOR, VAE, draw
from dllm_core.methods.cola.model import Model
from dllm_core.methods.cola.networks import Posterior
from dllm_core.methods.cola.spans import Spans, spans_of
from dllm_core.methods.protocol import (
    Corrupted,
    GenerationOutput,
    LossOutput,
    Phase,
    Resources,
    SamplingRequest,
    StepInfo,
)
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.streaming import OnDraft, Streamer

_LEAST_STD = 1e-4


class Method(Model):
    """The room's method: two phases, generation block by block."""

    # -- training -----------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """Return the autoencoder's phase and the prior's."""
        share = self.options.vae_share
        return Phase(VAE, share), Phase(PRIOR, 1.0 - share)

    def settles(self, info: StepInfo) -> bool:
        """Return whether the encoder stands still at this step of the first phase: at least at its last one."""
        last = max(1, math.ceil(self.options.settle * info.phase_steps))
        return info.phase == VAE and info.phase_step >= info.phase_steps - last

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw what the phase needs for the global batch; tokens stay as they are."""
        return Corrupted(batch, batch.input_ids_BL, batch.response_BL, draw(batch, info, noise, self.options))

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the response tokens, those that the masked view hides, and those with a flow loss."""
        extras, response_BT = corrupted.extras, corrupted.masked_BL
        found = {"tokens": float(response_BT.sum())}
        if "masked_BT" in extras:
            found["masked_tokens"] = float(extras["masked_BT"].sum())
        if "known_BT" in extras:
            found["flow_tokens"] = float((response_BT & ~extras["known_BT"].to(response_BT.device)).sum())
        return found

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss of the phase."""
        cut = spans_of(corrupted.clean)
        if len(cut) == 0:
            return LossOutput(torch.zeros((), device=self.device, requires_grad=True), {})
        states_STD = self.states_of(corrupted.clean, cut, resources)
        if info.phase == VAE:
            moves = not self.settles(info)
            loss, parts, q = self._vae_loss(corrupted, cut, states_STD, totals, moves=moves)
            if not moves and self.training:
                self._gather(q, cut.response_ST)
            flops = self.options.vae_flops(
                self.base.shape,
                cut.real_ST.numel(),
                moves=moves,
                responses=int(cut.response_ST.sum()),
                documents=len(cut),
            )
            return LossOutput(loss, parts, flops=flops, positions=cut.real_ST.numel())
        return self._prior_loss(corrupted, cut, states_STD, totals)

    def _vae_loss(
        self, corrupted: Corrupted, cut: Spans, states_STD: Tensor, totals: dict[str, float], *, moves: bool
    ) -> tuple[Tensor, objective.Parts, Posterior]:
        extras, dtype = corrupted.extras, states_STD.dtype
        masked = "masked_BT" in extras
        inputs = objective.VaeInputs(
            states_STD=states_STD,
            ids_ST=cut.slots(corrupted.clean.input_ids_BL),
            response_ST=cut.response_ST,
            noise_STK=cut.slots(extras["posterior_BTK"]).to(dtype),
            weight_ST=cut.slots(extras["token_weight_BT"]) * cut.response_ST,
            masked_ST=cut.slots(extras["masked_BT"]) & cut.response_ST if masked else None,
            masked_noise_STK=cut.slots(extras["masked_posterior_BTK"]).to(dtype) if masked else None,
        )
        return objective.vae_loss(self.networks, inputs, self.head_VD, totals, self.options, moves=moves)

    def _prior_loss(self, corrupted: Corrupted, cut: Spans, states_STD: Tensor, totals: dict[str, float]) -> LossOutput:
        options, tokens = self.options, totals["tokens"]
        parts: objective.Parts = {}
        loss = states_STD.new_zeros(())
        if options.joint:
            loss, parts, q = self._vae_loss(corrupted, cut, states_STD, totals, moves=True)
            loss = options.vae_weight * loss
            if options.reference_weight:
                drift = objective.kl_between(q, self._reference_posterior(states_STD)).mean(-1)
                drift = objective.mean_over(drift, cut.response_ST, tokens)
                loss = loss + options.reference_weight * drift
                parts["reference_kl_per_dimension"] = drift.detach()
            q = q.detach()
        else:
            with torch.no_grad():
                q = self.networks.encoder(states_STD)
        inputs = self._flow_inputs(corrupted, cut, q)
        error_SN, counted_SN = objective.flow_error(self.networks.prior, inputs)
        flow = objective.mean_over(error_SN, counted_SN, totals["flow_tokens"])
        parts["flow_mse"] = flow.detach()
        clean, noisy = len(cut) * inputs.num_clean, error_SN.numel()
        flops = options.prior_flops(
            self.base.shape,
            cut.real_ST.numel(),
            clean,
            noisy,
            responses=int(cut.response_ST.sum()),
            documents=len(cut),
        )
        return LossOutput(loss + options.flow_weight * flow, parts, flops=flops, positions=clean + noisy)

    def _flow_inputs(self, corrupted: Corrupted, cut: Spans, q: Posterior) -> objective.FlowInputs:
        extras, dtype = corrupted.extras, q.mean.dtype
        num_clean, first = cut.halves(self.options.block_size)
        latents_STK = q.sample(cut.slots(extras["posterior_BTK"]).to(dtype))
        return objective.FlowInputs(
            latents_STK=self.to_prior(latents_STK),
            noise_STK=cut.slots(extras["flow_BTK"]).to(dtype),
            time_S=cut.of_rows(extras["time_B"]),
            real_ST=cut.real_ST,
            known_ST=cut.slots(extras["known_BT"]),
            alone_ST=cut.slots(extras["alone_BT"]),
            num_clean=num_clean,
            first=first,
        )

    @torch.no_grad()
    def _reference_posterior(self, states_STD: Tensor) -> Posterior:
        kept = {name: value.to(states_STD.dtype) for name, value in self.reference.averages().items()}
        found: Posterior = torch.func.functional_call(self.networks.encoder, kept, (states_STD,))
        return found

    @torch.no_grad()
    def _gather(self, q: Posterior, response_ST: Tensor) -> None:
        """Add up the moments of sampled latents, the noise's share in closed form."""
        mean_MK, log_variance_MK = q.mean[response_ST].float(), q.log_variance[response_ST].float()
        self.gathered_count += len(mean_MK)
        self.gathered_K += mean_MK.sum(0)
        self.gathered_square_K += (mean_MK.square() + log_variance_MK.exp()).sum(0)

    @torch.no_grad()
    def on_step_end(self, info: StepInfo) -> None:
        """Between the phases freeze the statistics (and keep the encoder); in the second, average the prior."""
        if info.phase == PRIOR:
            self.ema.update(self.networks.prior.named_parameters())
        elif info.phase_step == info.phase_steps - 1:
            mean_K = self.gathered_K / self.gathered_count
            variance_K = self.gathered_square_K / self.gathered_count - mean_K.square()
            self.latent_mean_K.copy_(mean_K)
            self.latent_std_K.copy_(variance_K.clamp(min=_LEAST_STD**2).sqrt())
            if self.options.joint:
                self.reference.update(self.networks.encoder.named_parameters())

    # -- measuring and generating -------------------------------------------------------------------------------------

    def diagnose(self, batch: Batch, resources: Resources, noise: NoiseSource) -> dict[str, Any]:
        """Return the health of autoencoder and prior; see `dllm_core.methods.cola.health`."""
        from dllm_core.methods.cola.health import health

        return health(self, batch, resources, noise)

    def sample(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Generate a response for each prompt; see `Method.sample`. Blocks are the cell's own, not the request's."""
        config = DiffusionGenerationConfig.from_request(request)
        return self.generate(list(prompts), config, sample_ids=request.sample_ids, on_draft=on_draft)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        generation_config: DiffusionGenerationConfig | None = None,
        *,
        lengths: Sequence[int] | None = None,
        sample_ids: Sequence[int] | None = None,
        guidance: float | None = None,
        cached: bool = True,
        streamer: Streamer | None = None,
        on_draft: OnDraft | None = None,
    ) -> GenerationOutput:
        """Generate block by block with the averaged prior, in the dialect of transformers.

        Args:
            input_ids: prompts, int64 [B, P] without padding, or a list of 1-D tensors of any lengths.
            generation_config: `max_new_tokens`, `max_denoising_steps` (Euler steps of the whole response), temperature,
                `top_k`, `top_p`, `seed`, `record_history` and the end of text are used; acceptance rules and
                `block_size` belong to token-space decoding.
            lengths: new tokens of each prompt, in place of one number for all.
            sample_ids: one id per prompt, which with the seed keys its noise; None means 0..B-1.
            guidance: in place of the cell's.
            cached: False computes everything anew in every pass; the result is the same.
            streamer: transformers' streamer protocol, one row alone; gets each block once it is final.
            on_draft: called after each block with (canvas, committed); the mask token stands where nothing does yet.

        Returns:
            Sequences on the CPU, prompt included. `num_forwards` counts every network.

        Raises:
            DllmError: an empty prompt, lists of different lengths, or the language model is not at hand.
        """
        config = generation_config or DiffusionGenerationConfig()
        job = generation.job_of(
            self, list(input_ids), config, lengths=lengths, sample_ids=sample_ids, guidance=guidance, cached=cached
        )
        with self.generating():
            return generation.generate(self, job, streamer, on_draft)
