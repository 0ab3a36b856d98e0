"""The alignment term. R forwarded rows, L length, B sequences, M aligned tokens, D hidden."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.methods.single_network import gather_rows


def alignment_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    *,
    student_rows: tuple[Tensor, Tensor],
    teacher_rows: tuple[Tensor, Tensor],
    weight_M: Tensor,
) -> Tensor:
    """Return the sum over tokens m of weight_m times the mean over layers of 1 - cos(student, sg(teacher)), fp32.

    Args:
        student: layer name -> states [R, L, D], with gradient.
        teacher: the same layers -> states [B, L, D]; may lie on another device, only the rows needed are moved.
        student_rows: (row, position) [M] of the student's states.
        teacher_rows: (row, position) [M] of the teacher's.
        weight_M: share of each token in the global mean.
    """
    total = torch.zeros((), device=weight_M.device)
    for name, target_BLD in teacher.items():
        rows = (teacher_rows[0].to(target_BLD.device), teacher_rows[1].to(target_BLD.device))
        target_MD = gather_rows(target_BLD.detach(), rows).to(weight_M.device).float()
        cosine_M = F.cosine_similarity(gather_rows(student[name], student_rows).float(), target_MD, dim=-1)
        total = total + (weight_M * (1.0 - cosine_M)).sum()
    return total / max(1, len(teacher))
