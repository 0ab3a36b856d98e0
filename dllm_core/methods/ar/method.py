"""The autoregressive reference rows. B batch, L length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.errors import DllmError
from dllm_core.methods.ar.options import Options
from dllm_core.methods.ar.watching import Watcher
from dllm_core.methods.protocol import (
    Corrupted,
    GenerationOutput,
    LossOutput,
    Resources,
    SamplingRequest,
    ScoredTokens,
    StepInfo,
)
from dllm_core.methods.single_network import FORWARD_AND_BACKWARD, SingleNetworkMethod, gather_rows
from dllm_core.methods.token_space import per_row_mean
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.streaming import OnDraft, Streamer

_OF_DIFFUSION = (
    "sampler_config",
    "cache",
    "guidance_scale",
    "t_max",
    "top_p",
    "top_k",
    "block_size",
    "multi_block",
    "stability_threshold",
    "eos_token_id",
    "record_passes",
    "verify",
)
"""Settings of `DiffusionGenerationConfig` that a left-to-right decode does not have."""


class Method(SingleNetworkMethod):
    """The model with its causal attention: as it was, or fine-tuned on the tokens that the cells are scored on.

    Loss: mean cross-entropy over the response tokens of a sequence, then over the sequences of the global batch.
    """

    options: Options
    causal = True

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Corrupt nothing: every response token is to be predicted from what precedes it."""
        return Corrupted(batch, batch.input_ids_BL, batch.response_BL)

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the number of sequences that carry a loss."""
        return {"sequences": float(corrupted.masked_BL.any(1).sum())}

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss."""
        from dllm_core.kernels.masked_ce import token_losses

        batch, scored_BL = corrupted.clean, corrupted.masked_BL
        if not bool(scored_BL.any()):
            return LossOutput(torch.zeros((), device=self.backbone.device, requires_grad=True), {})
        weight_M = (per_row_mean(scored_BL) / max(1.0, totals["sequences"]))[scored_BL]
        losses = token_losses(
            gather_rows(self.run(batch, batch.input_ids_BL), self.predictor_rows(scored_BL)),
            self.backbone.head_weight_VD,
            batch.input_ids_BL[scored_BL],
            ce_M=weight_M,
            blocked_V=self.backbone.blocked_V,
        )
        rows, length = scored_BL.shape
        parts: dict[str, Tensor | float] = {
            "ce_nats": (weight_M * losses.nll_M).sum(),
            "accuracy": (weight_M * losses.correct_M).sum(),
        }
        flops = FORWARD_AND_BACKWARD * self.backbone.flops_forward(rows * length, length, len(weight_M))
        return LossOutput(losses.total, parts, flops=flops, positions=rows * length)

    def token_nll(self, batch: Batch) -> ScoredTokens:
        """Return the exact -log p of the response tokens, in nats, fp32: the token set that the bounds are given on."""
        return self.score(batch, batch.input_ids_BL, batch.response_BL)

    def sample(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Decode left to right with a key-value cache; see `Method.sample`. A token is final once it is drawn."""
        return self._decode(prompts, request, on_draft=on_draft)

    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        generation_config: DiffusionGenerationConfig | None = None,
        *,
        streamer: Streamer | None = None,
        on_draft: OnDraft | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> GenerationOutput:
        """Decode left to right, called as the rows that are compared with it are.

        Args:
            input_ids: prompts, int64 [B, C] without padding, or a list of 1-D tensors of any lengths.
            generation_config: `max_new_tokens`, `temperature`, `seed`, `stop_at_eos` and `record_history` are used.
                `max_denoising_steps` has no meaning: there is a pass for every token.
            streamer: transformers' streamer protocol, one prompt only; gets every token as it comes.
            on_draft: called after each pass with (canvas, committed); the mask token stands where nothing does yet.
            sample_ids: one id per prompt, which with the seed keys its draws; None means 0..B-1.

        Returns:
            Sequences on the CPU, prompt included.

        Raises:
            DllmError: a setting that only diffusion has, or more tokens than the model has positions for.
        """
        config = generation_config or DiffusionGenerationConfig()
        default = DiffusionGenerationConfig()
        for name in _OF_DIFFUSION:
            if getattr(config, name) != getattr(default, name):
                raise DllmError(
                    f"{name} is a setting of diffusion, and this row writes token by token.",
                    f"Leave {name} out, or take a token-space cell.",
                )
        request = SamplingRequest(
            max_new_tokens=config.max_new_tokens,
            num_steps=config.max_denoising_steps,
            temperature=config.temperature,
            seed=config.seed,
            sample_ids=None if sample_ids is None else tuple(sample_ids),
            stop_at_eos=config.stop_at_eos,
            record_history=config.record_history,
        )
        return self._decode(list(input_ids), request, on_draft=on_draft, streamer=streamer)

    def _decode(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        *,
        on_draft: OnDraft | None = None,
        streamer: Streamer | None = None,
    ) -> GenerationOutput:
        from dllm_core.backbone.ar_decode import decode

        with self.measuring():
            if on_draft is None and streamer is None:
                return decode(self.backbone, prompts, request)
            watcher = Watcher(self.backbone, prompts, request.max_new_tokens, on_draft=on_draft, streamer=streamer)
            output = decode(self.backbone, prompts, request, on_token=watcher.on_token)
        watcher.finish()
        return output
