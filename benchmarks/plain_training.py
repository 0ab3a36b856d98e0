"""The training loop a peer would write over a plain transformers model: what ours is measured against.

fp32 weights under bf16 autocast, torch's AdamW, logits of every row, cross-entropy of the masked ones; with a live
teacher also a second forward and all hidden states. Same objective, batch and masks as the library's cells.
B batch, L length, M masked, D hidden.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM


class PlainLoop:
    """One model and its optimiser.

    Args:
        directory: a converted checkpoint (its config makes attention bidirectional).
        device: where.
        lr: learning rate.
        weight: lambda of the alignment with the live teacher.
    """

    def __init__(self, directory: Path, device: str, lr: float = 1e-4, weight: float = 10.0) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).to(device).train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.01)
        self.mask_id = int(self.model.config.dllm["mask_token_id"])
        self.weight, self.device = weight, device
        self._teacher: torch.nn.Module | None = None

    @property
    def teacher(self) -> torch.nn.Module:
        """The frozen model, causal."""
        if self._teacher is None:
            self._teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        return self._teacher

    def step(self, input_ids_BL: Tensor, masked_BL: Tensor, *, live_teacher: bool = False) -> float:
        """Do one optimiser step and return the loss."""
        input_ids_BL, masked_BL = input_ids_BL.to(self.device), masked_BL.to(self.device)
        noisy_BL = input_ids_BL.masked_fill(masked_BL, self.mask_id)
        with torch.autocast(self.device, torch.bfloat16):
            out = self.model(input_ids=noisy_BL, is_causal=False, use_cache=False, output_hidden_states=live_teacher)
            predicts_BL = masked_BL[:, 1:]
            targets_M = input_ids_BL[:, 1:][predicts_BL]
            nll_M = F.cross_entropy(out.logits[:, :-1][predicts_BL].float(), targets_M, reduction="none")
            count_BL = masked_BL.sum(1, keepdim=True).clamp(min=1).expand_as(masked_BL)
            weight_M = 1.0 / (count_BL[:, 1:][predicts_BL] * len(masked_BL))
            loss = (weight_M * (1.0 + torch.exp(-nll_M.detach())) * nll_M).sum()
            if live_teacher:
                loss = loss + self.weight * self._alignment(input_ids_BL, out.hidden_states, predicts_BL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(loss)

    def _alignment(self, input_ids_BL: Tensor, student: tuple[Tensor, ...], predicts_BL: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.teacher(input_ids=input_ids_BL, is_causal=True, use_cache=False, output_hidden_states=True)
        total = torch.zeros((), device=self.device)
        for ours_BLD, theirs_BLD in zip(student, out.hidden_states, strict=True):
            ours_MD, theirs_MD = ours_BLD[:, :-1][predicts_BL].float(), theirs_BLD[:, :-1][predicts_BL].float()
            total = total + (1.0 - F.cosine_similarity(ours_MD, theirs_MD, dim=-1)).mean()
        return total / len(student)
