"""Masked diffusion over tokens: what its rooms share. B batch, L length, R forwarded rows, M masked, D hidden.

A room turns a corrupted micro-batch into a `View`: the rows to forward, and one weight per masked token for every
term of its loss. Weights already hold the global denominators, so a contribution is a plain weighted sum and splitting
the batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import GenerationOutput, LossOutput, SamplingRequest, ScoredTokens
from dllm_core.methods.single_network import FORWARD_AND_BACKWARD, SingleNetworkMethod, gather_rows

if TYPE_CHECKING:
    from dllm_core.kernels.masked_ce import TokenLosses
    from dllm_core.samplers.config import DiffusionGenerationConfig
    from dllm_core.samplers.streaming import Streamer


@dataclass
class View:
    """Rows to forward and what to charge for each masked token.

    Attributes:
        batch: the clean rows, one per forwarded row (a sequence may appear more than once).
        source_R: int64; row of the micro-batch that each forwarded row comes from.
        noisy_RL: token ids with mask tokens in place, int64.
        masked_RL: bool; tokens to predict. Mask tokens outside it carry no loss.
        ce_RL: weight of the cross-entropy of a token.
        log_RL: weight of a token in the logged cross-entropy and accuracy: a plain mean, whatever the loss does.
        path_RL: weight of sg(p) * cross-entropy; None for rooms or settings without it.
        entropy_RL: weight of the entropy on tokens that are right; None for rooms without it.
        entropy_temperature: of that entropy.
        align_RL: weight of 1 - cos, lambda left out; 0 at positions that are not aligned. None for rooms without it.
    """

    batch: Batch
    source_R: Tensor
    noisy_RL: Tensor
    masked_RL: Tensor
    ce_RL: Tensor
    log_RL: Tensor
    path_RL: Tensor | None = None
    entropy_RL: Tensor | None = None
    entropy_temperature: float = 1.0
    align_RL: Tensor | None = None


def per_row_mean(masked_BL: Tensor) -> Tensor:
    """Return weight_BL, fp32: 1 / (masked tokens of the row) at masked tokens, 0 elsewhere (also in empty rows)."""
    masked_BL = masked_BL.float()
    return masked_BL / masked_BL.sum(1, keepdim=True).clamp(min=1.0)


class TokenSpaceMethod(SingleNetworkMethod):
    """A bidirectional denoiser: predicts masked tokens, decodes by unmasking step by step."""

    causal = False

    def mask(self, batch: Batch, masked_BL: Tensor) -> Tensor:
        """Return the ids of `batch` with the mask token at `masked_BL`."""
        return batch.input_ids_BL.masked_fill(masked_BL, self.backbone.contract.mask_token_id)

    # -- training -----------------------------------------------------------------------------------------------------

    def token_terms(self, view: View, hidden_RLD: Tensor) -> tuple[TokenLosses, dict[str, Tensor | float]]:
        """Return the token losses of a view and the parts to log, each a contribution to a global mean.

        Only rows that predict a masked token go through the head.
        """
        from dllm_core.kernels.masked_ce import token_losses

        masked_RL = view.masked_RL
        ce_M = view.ce_RL[masked_RL]
        path_M = None if view.path_RL is None else view.path_RL[masked_RL]
        entropy_M = None if view.entropy_RL is None else view.entropy_RL[masked_RL]
        log_M = view.log_RL[masked_RL]
        losses = token_losses(
            gather_rows(hidden_RLD, self.predictor_rows(masked_RL)),
            self.backbone.head_weight_VD,
            view.batch.input_ids_BL[masked_RL],
            ce_M=ce_M,
            path_M=path_M,
            entropy_M=entropy_M,
            entropy_temperature=view.entropy_temperature,
            blocked_V=self.backbone.blocked_V,
        )
        parts: dict[str, Tensor | float] = {
            "ce_nats": (log_M * losses.nll_M).sum(),
            "masked_accuracy": (log_M * losses.correct_M).sum(),
        }
        if path_M is not None:
            parts["path_nats"] = (path_M * torch.exp(-losses.nll_M) * losses.nll_M).sum()
        if entropy_M is not None and losses.entropy_M is not None:
            parts["entropy_nats"] = (entropy_M * losses.correct_M * losses.entropy_M).sum()
        return losses, parts

    def empty_loss(self) -> LossOutput:
        """Return the contribution of rows in which nothing is masked: a zero that backward accepts."""
        return LossOutput(torch.zeros((), device=self.backbone.device, requires_grad=True), {})

    def training_flops(self, view: View) -> float:
        """Return the operations of one forward and backward over a view."""
        rows, length = view.masked_RL.shape
        return FORWARD_AND_BACKWARD * self.backbone.flops_forward(rows * length, length, int(view.masked_RL.sum()))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def masked_nll(self, batch: Batch, masked_BL: Tensor) -> ScoredTokens:
        """Return -log p(token | the unmasked ones) at `masked_BL`, in nats, fp32. One forward.

        Args:
            batch: clean sequences on the backbone's device.
            masked_BL: bool; tokens to hide; those of them in `batch.response_BL` are scored. Rows may be empty.
        """
        return self.score(batch, self.mask(batch, masked_BL), masked_BL & batch.response_BL)

    # -- generating ---------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Generate a response for each prompt by confidence unmasking; see `Method.sample`.

        Keys and values are kept where that changes nothing: in block-causal models. There every block gets at least
        one pass, also where `request.num_steps` is less, and `request.block_size` divides the model's blocks further.
        """
        from dllm_core.samplers.config import DiffusionGenerationConfig

        places = [range(len(p), len(p) + request.max_new_tokens) for p in prompts]
        request = replace(request, num_steps=max(request.num_steps, self.most_blocks(places, request.block_size)))
        cache = "exact" if self.backbone.contract.attention == "block_causal" else "none"
        config = DiffusionGenerationConfig.from_request(request, cache=cache)
        return self.generate(list(prompts), config, sample_ids=request.sample_ids, on_draft=on_draft)

    def most_blocks(self, places: Sequence[Sequence[int]], block_size: int | None) -> int:
        """Return the blocks of the row that has most, in a block-causal model: each takes a pass, no fewer steps do.

        Args:
            places: of each row, the positions to fill.
            block_size: what divides the model's own blocks further; None nothing.

        Returns:
            0 for a bidirectional model, which has no blocks of its own.
        """
        from dllm_core.samplers.blocks import split_blocks

        contract = self.backbone.contract
        if contract.attention != "block_causal":
            return 0
        return max(len(split_blocks(p, block_size, contract.block_size)) for p in places)

    def fill(
        self,
        texts: Sequence[Tensor],
        masks: Sequence[Tensor],
        config: DiffusionGenerationConfig,
        *,
        sample_ids: Sequence[int] | None = None,
    ) -> GenerationOutput:
        """Generate tokens in place; see `Method.fill`. In block-causal models every block gets at least one pass."""
        blocks = self.most_blocks([mask.nonzero()[:, 0].tolist() for mask in masks], config.block_size)
        config = replace(config, max_denoising_steps=max(config.max_denoising_steps, blocks))
        return self.generate(list(texts), config, infill_mask=list(masks), sample_ids=sample_ids)

    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        generation_config: DiffusionGenerationConfig | None = None,
        *,
        infill_mask: Tensor | Sequence[Tensor] | None = None,
        streamer: Streamer | None = None,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> GenerationOutput:
        """Generate in the dialect of transformers.

        Args:
            input_ids: prompts, int64 [B, C] without padding, or a list of 1-D tensors of any lengths.
            generation_config: how to decode; the defaults when None.
            infill_mask: bool, shaped as `input_ids`; True where a token is to be generated in place. Nothing is
                appended then.
            streamer: one with transformers' `put` and `end`, and `put_draft` where drafts are wanted; one prompt only.
            on_draft: called after each pass with (canvas [B, C], committed [B, C]).
            sample_ids: one id per prompt, which with the seed keys its noise; None means 0..B-1.

        Returns:
            Sequences on the CPU, prompt included.

        Raises:
            DllmError: rows that cannot be decoded, fewer steps than blocks, or a cache that the model does not allow.
        """
        from dllm_core.samplers.config import DiffusionGenerationConfig
        from dllm_core.samplers.loop import generate

        config = generation_config or DiffusionGenerationConfig()
        device = self.backbone.device
        with self.measuring():
            return generate(
                self.backbone,
                _moved(input_ids, device),
                config,
                infill_mask=None if infill_mask is None else _moved(infill_mask, device),
                sample_ids=sample_ids,
                streamer=streamer,
                on_draft=on_draft,
            )


def _moved(rows: Tensor | Sequence[Tensor], device: torch.device) -> Tensor | Sequence[Tensor]:
    if not isinstance(rows, list | tuple):
        return rows.to(device) if isinstance(rows, Tensor) else rows  # what is no batch is refused where it is read
    return [row.to(device) if isinstance(row, Tensor) else row for row in rows]
