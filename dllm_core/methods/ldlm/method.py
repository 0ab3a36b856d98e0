"""LDLM: diffusion on latents that an autoencoder of frozen hidden states is trained for at the same time.

After arXiv:2605.07933. B batch, S segments (one document's response each), L slots, P prompt tokens, K latent
dimension, D width of the frozen states, V vocabulary. The language model itself is not in memory: its states come
from the anchor cache, and generating needs only its embedding table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dllm_core.corruption.adaptive_time import AdaptiveTimes
from dllm_core.corruption.gaussian import TanSchedule
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.kernels import token_stats
from dllm_core.methods.closed_forms import Statistics
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.latent_keeping import CellForm
from dllm_core.methods.latent_method import LatentMethod
from dllm_core.methods.ldlm import fast, generation, objective, start
from dllm_core.methods.ldlm.draws import draw, weight_totals
from dllm_core.methods.ldlm.networks import LatentNetworks
from dllm_core.methods.ldlm.options import Options
from dllm_core.methods.protocol import (
    Corrupted,
    GenerationOutput,
    LossOutput,
    Resources,
    SamplingRequest,
    StepInfo,
)
from dllm_core.methods.segments import Segments, segments_of
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.training.gradient_gate import encoder_gate

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

POOL = 100.0
"""Samples that make the mean loss of a stretch of times trustworthy, where a run has so many."""
REFRESH_STEPS = 1000
"""Steps between refreshes of the time density until the run's length is known."""


class Method(LatentMethod):
    """The room's method.

    Attributes:
        embedding_VD: frozen token embeddings at unit length, a parameter that is not trained. Nothing reads more of
            them than their direction.
        head_VD: rows along which tokens are read out: the embeddings, or an own matrix.
        decoder_noise: standard deviation of the noise on the latent decoder's input in training.
        times: density of the training times.
    """

    FORM = CellForm("ldlm", "an LDLM", training_alone=("ema.",), added=("networks.token_decoder.intercept_D",))
    options: Options
    networks: LatentNetworks

    def __init__(self, backbone: Backbone | None, options: Options, *, base: Base | None = None) -> None:
        super().__init__(backbone, options, base=base)
        vocab = self.base.contract.num_tokens
        self.networks = LatentNetworks(options.sizes, self.base.hidden, vocab, normalise=options.normalise == "rms")
        self.embedding_VD = self.base.unit_embeddings()
        self.schedule = TanSchedule(options.schedule_d)
        self.decoder_noise = options.noise_level(self.networks.latent_dim)
        self.times = AdaptiveTimes(REFRESH_STEPS)
        self.start_averages()
        self._fast: fast.FastSampler | None = None

    @property
    def head_VD(self) -> Tensor:  # type: ignore[override]
        """Rows of the token head, [V, D]."""
        own = self.networks.token_head_VD
        return self.embedding_VD if own is None else own

    def start_linear(self, found: Statistics, states_ND: Tensor, ids_N: Tensor, head_VD: Tensor) -> None:
        """Set the straight paths to principal components and ridge regressions; see `ldlm.start`."""
        start.start_linear(self.networks, found, (states_ND, ids_N), head_VD, self.decoder_noise)

    # -- training -----------------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw times, noises and coins of the global batch; tokens stay as they are."""
        self.times.refresh_every = max(1, round(self.options.adaptive_refresh * info.total_steps))
        self.times.memory = self.times.refresh_every
        # short runs see few samples between two refreshes: the density still rests on eight groups of them
        self.times.pool = min(POOL, self.times.memory * info.batch_size / 8)
        extras = draw(batch, info, noise, self.options, self.times, self.networks.latent_dim)
        return Corrupted(batch, batch.input_ids_BL, batch.response_BL, extras)

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the tokens of the batch, and those whose token loss reads true or decoded states."""
        return weight_totals(corrupted.masked_BL, corrupted.extras)

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss."""
        cut = segments_of(corrupted.clean)
        if len(cut) == 0:
            return LossOutput(torch.zeros((), device=self.device, requires_grad=True), {})
        inputs = self._inputs(corrupted, cut, info, resources)
        tokens = max(1.0, totals["tokens"])
        found, prefix = objective.terms(
            self.networks, inputs, self.head_VD, self.schedule, self.decoder_noise, totals["tokens"]
        )
        diffusion, states = found.diffusion_S.sum() / tokens, found.states_S.sum() / tokens
        loss = diffusion + states + self.options.token_weight * found.tokens.total
        parts: dict[str, Tensor | float] = {
            "diffusion_mse": diffusion.detach(),
            "state_mse": states.detach(),
            "token_nats": found.tokens.total.detach(),
            "gate": inputs.gamma * len(corrupted.clean) / totals["samples"],
        }
        read = (("decode_true", found.true_M, "true_tokens"), ("reconstruction_noisy", ~found.true_M, "decoded_tokens"))
        for name, of_M, total in read:
            if totals[total]:  # in a small batch every coin may fall the same way
                parts[f"{name}_accuracy"] = (found.weight_M * found.correct_M)[of_M].sum() / totals[total]
        if self.options.consistency:
            gap = self._consistency(inputs, found, prefix).sum() / tokens
            loss = loss + self.options.consistency * gap
            parts["consistency_mse"] = gap.detach()
        if self.training:
            per_slot_S = found.diffusion_S.detach() / cut.real_SL.sum(1)
            self.times.observe(inputs.time_S, per_slot_S)
        if self._looks(info):
            correct = self._reconstructed(inputs, found.latents_SLK)
            parts["reconstruction_accuracy"] = correct.sum() / tokens
        positions = int(cut.real_SL.numel())
        prompt = cut.prompt_SP.numel()
        flops = self.options.step_flops(self.base.shape, positions, prompt, sequences=len(cut))
        return LossOutput(loss, parts, flops=flops, positions=positions)

    def _inputs(self, corrupted: Corrupted, cut: Segments, info: StepInfo, resources: Resources) -> objective.Inputs:
        batch, extras = corrupted.clean, corrupted.extras
        stored_SLD = self.stored_states(batch, cut.row_S, cut.position_SL, resources)
        states_SLD = self.standardise(stored_SLD).masked_fill(~cut.real_SL[..., None], 0.0)
        dropped_S1 = cut.of_rows(extras["drop_prompt_B"])[:, None]
        prompt_SPD, visible_SP = self.prompts_of(batch, cut, resources)
        dtype = states_SLD.dtype
        return objective.Inputs(
            states_SLD=states_SLD,
            ids_SL=cut.slots(batch.input_ids_BL),
            real_SL=cut.real_SL,
            prompt_SPD=prompt_SPD,
            visible_SP=None if visible_SP is None else visible_SP & ~dropped_S1,
            time_S=cut.of_rows(extras["time_B"]),
            noise_SLK=cut.slots(extras["noise_BTK"]).to(dtype),
            decoder_noise_SLK=cut.slots(extras["decoder_noise_BTK"]).to(dtype),
            self_condition_S=cut.of_rows(extras["self_condition_B"]),
            true_states_S=cut.of_rows(extras["true_states_B"]),
            token_weight_SL=cut.slots(extras["token_weight_BT"]) * cut.real_SL,
            gamma=self._gate(info),
        )

    def _gate(self, info: StepInfo) -> float:
        warmup_steps = math.ceil(self.options.gate_warmup * info.total_steps)
        return self.options.gate_ceiling * encoder_gate(info.step, warmup_steps, floor=self.options.gate_floor)

    def prompts_of(self, batch: Batch, cut: Segments, resources: Resources) -> tuple[Tensor | None, Tensor | None]:
        """Return what the prompt encoder reads [S, P, D], and which of it is there."""
        if cut.prompt_SP.shape[1] == 0:
            return None, None
        if self.options.prompt_encoder == "embedding":
            return self.embedding_VD[cut.prompts(batch.input_ids_BL)], cut.prompt_real_SP
        stored_SPD = self.stored_states(batch, cut.row_S, cut.prompt_SP, resources)
        # the first position of a document is an outlier of a hundred times the norm
        visible_SP = cut.prompt_real_SP & (cut.prompts(batch.position_BL) > 0)
        return self.standardise(stored_SPD), visible_SP

    def _consistency(self, inputs: objective.Inputs, found: objective.Terms, prefix: Any) -> Tensor:
        from dllm_core.methods.ldlm.consistency import gap

        return gap(self.networks, self.ema, inputs, found, prefix, self.schedule)

    def _looks(self, info: StepInfo) -> bool:
        every = max(1, round(self.options.health_every * info.total_steps))
        return info.step % every == 0 or info.step == info.total_steps - 1

    @torch.no_grad()
    def _reconstructed(self, inputs: objective.Inputs, latents_SLK: Tensor) -> Tensor:
        """Return bool [tokens]: the token comes back from its latent without noise."""
        ids = self.decode(latents_SLK, inputs.padding_SL)
        return (ids == inputs.ids_SL)[inputs.real_SL]

    def on_step_end(self, info: StepInfo) -> None:
        """Move the averaged weights and the time density on."""
        self.ema.update(self.networks.named_parameters())
        self.times.end_step()

    # -- reading out --------------------------------------------------------------------------------------------------

    def token_outputs(self, latents_BLK: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """Return [B, L, D], which times the head's rows gives logits, of clean latents."""
        states_BLD = self.networks.latent_decoder(latents_BLK, real_BL)
        outputs_BLD: Tensor = self.networks.token_decoder(states_BLD, real_BL)
        return outputs_BLD

    def decode(self, latents_BLK: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """Return the most probable token of every slot, int64 [B, L]."""
        outputs_BLD = self.token_outputs(latents_BLK, real_BL)
        best = token_stats.stats(outputs_BLD.flatten(0, 1), self.head_VD, second=False)
        return best.argmax_M.view(latents_BLK.shape[:2])

    def diagnose(self, batch: Batch, resources: Resources, noise: NoiseSource) -> dict[str, Any]:
        """Return the health of the autoencoder and of the denoiser; see `dllm_core.methods.ldlm.health`."""
        from dllm_core.methods.ldlm.health import health

        return health(self, batch, resources, noise)

    def sample(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Generate a response for each prompt; see `Method.sample`. Nothing is streamed: all tokens come at once."""
        config = DiffusionGenerationConfig.from_request(request)
        return self.generate(list(prompts), config, sample_ids=request.sample_ids)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        generation_config: DiffusionGenerationConfig | None = None,
        *,
        lengths: Sequence[int] | None = None,
        sample_ids: Sequence[int] | None = None,
        solver: Literal["ddim", "ddpm", "sde"] | None = None,
        guidance: float | None = None,
        path: fast.PathName = "auto",
    ) -> GenerationOutput:
        """Generate with the averaged weights, in the dialect of transformers.

        Args:
            input_ids: prompts, int64 [B, P] without padding, or a list of 1-D tensors of any lengths.
            generation_config: `max_new_tokens`, `max_denoising_steps`, `temperature`, `top_k`, `top_p`, `seed` and the
                end of text are used; rules and blocks belong to token-space decoding.
            lengths: new tokens of each prompt, in place of one number for all.
            sample_ids: one id per prompt, which with the seed keys its noise; None means 0..B-1.
            solver: in place of the cell's.
            guidance: in place of the cell's.
            path: `auto` takes the fast path where there is one (`fast.refusal`), but not in training mode, whose
                weights change between calls; `fast` is an error where there is none; see `fast.generate`.

        Returns:
            Sequences on the CPU, prompt included. `num_forwards` counts every network. All noise is drawn on the CPU
            and then moved, so that seed and sample id give the same noise on every device.

        Raises:
            DllmError: an empty prompt, lists of different lengths, or no fast path where it was insisted on.
        """
        config = generation_config or DiffusionGenerationConfig()
        job = generation.job_of(
            self,
            list(input_ids),
            config,
            lengths=lengths,
            sample_ids=sample_ids,
            solver=solver,
            guidance=guidance,
        )
        if not self.training and not int(self.ema.num_updates):  # a loaded cell's weights are its averages
            return fast.generate(self, job, path)
        with self.generating():
            return generation.generate(self, job)
