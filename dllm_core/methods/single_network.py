"""What rooms with one decoder and nothing else have in common. B batch, L length, M scored tokens, D hidden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dllm_core.methods.protocol import Method, ScoredTokens
from dllm_core.methods.requirements import RoomOptions

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.data.batch import Batch

FORWARD_AND_BACKWARD = 3.0
"""A backward pass costs twice its forward."""


def gather_rows(states_BLD: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """Return states_MD, the states at (b, i)."""
    row_M, position_M = rows
    return states_BLD.flatten(0, 1).index_select(0, row_M * states_BLD.shape[1] + position_M)


class SingleNetworkMethod(Method):
    """A method whose model is the backbone itself, trained whole."""

    causal: bool
    backbone: Backbone

    # -- the network --------------------------------------------------------------------------------------------------

    @property
    def is_shifted(self) -> bool:
        """Whether the hidden state at i-1 predicts token i."""
        return self.causal or self.backbone.contract.alignment == "shifted"

    def predictor_rows(self, masked_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return (b, i), int64 [M] each: the hidden states that predict the masked tokens, in row-major order.

        Under the shifted alignment token j is predicted at i = j - 1, else at i = j. The first token of a row has no
        predictor when shifted, and is never masked.
        """
        row_M, token_M = masked_BL.nonzero(as_tuple=True)
        if not self.is_shifted:
            return row_M, token_M
        if bool((token_M == 0).any()):
            raise AssertionError("the first token of a row has no predictor and cannot be masked")
        return row_M, token_M - 1

    def run(self, batch: Batch, input_ids_BL: Tensor) -> Tensor:
        """Return hidden_BLD of `input_ids_BL` laid out as `batch` (boundaries, positions)."""
        if batch.is_plain:
            return self.backbone.hidden(input_ids_BL, causal=self.causal)
        return self.backbone.hidden(
            input_ids_BL, causal=self.causal, document_BL=batch.document_BL, position_BL=batch.position_BL
        )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Run without gradients in evaluation mode, then restore the mode."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def score(self, batch: Batch, input_ids_BL: Tensor, scored_BL: Tensor) -> ScoredTokens:
        """Return -log p of the clean tokens at `scored_BL` given `input_ids_BL`, in nats, fp32."""
        from dllm_core.kernels.masked_ce import token_losses

        nll_BL = torch.zeros(scored_BL.shape, dtype=torch.float32, device=scored_BL.device)
        correct_BL = torch.zeros_like(scored_BL)
        if bool(scored_BL.any()):
            with self.measuring():
                hidden_MD = gather_rows(self.run(batch, input_ids_BL), self.predictor_rows(scored_BL))
                targets_M = batch.input_ids_BL[scored_BL]
                losses = token_losses(
                    hidden_MD,
                    self.backbone.head_weight_VD,
                    targets_M,
                    ce_M=torch.ones(len(targets_M), device=hidden_MD.device),
                    blocked_V=self.backbone.blocked_V,
                )
            nll_BL[scored_BL] = losses.nll_M.float()
            correct_BL[scored_BL] = losses.correct_M
        return ScoredTokens(nll_BL, correct_BL, scored_BL)

    # -- keeping ------------------------------------------------------------------------------------------------------

    @classmethod
    def contract_fields(cls, options: RoomOptions) -> dict[str, Any]:
        """Return the contract fields that training under this room changes; written at save, required at load."""
        return {}

    def save_pretrained(self, directory: Path) -> None:
        """Write weights and config, with the room's contract fields in it."""
        directory.mkdir(parents=True, exist_ok=True)
        self.backbone.contract = self.backbone.contract.model_copy(update=self.contract_fields(self.options))
        self.backbone.save_pretrained(directory)

    @classmethod
    def from_pretrained(
        cls, directory: Path, options: RoomOptions, *, dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            ContractError: the checkpoint was made under another contract.
        """
        from dllm_core.backbone.backbone import Backbone

        expect = cls.contract_fields(options)
        method = cls(Backbone.from_pretrained(directory, dtype=dtype, device=device, expect=expect), options)
        method.directory = Path(directory)
        return method
