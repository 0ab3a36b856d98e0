"""The alignment term and the teacher's side of it. R forwarded rows, L length, M aligned tokens, D hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.methods.single_network import gather_rows

if TYPE_CHECKING:
    from dllm_core.data.anchors import AnchorStore


def alignment_loss(
    student: Mapping[str, Tensor], rows: tuple[Tensor, Tensor], teacher: Mapping[str, Tensor], weight_M: Tensor
) -> Tensor:
    """Return the sum over tokens m of weight_m times the mean over layers of 1 - cos(student, sg(teacher)), fp32.

    Args:
        student: layer name -> states [R, L, D], with gradient.
        rows: (r, i), int64 [M] each: the student's states to compare.
        teacher: the same layers -> states [M, D]; moved to the student's device.
        weight_M: share of each token in the global mean.
    """
    total = torch.zeros((), device=weight_M.device)
    for name, target_MD in teacher.items():
        target_MD = target_MD.detach().to(weight_M.device).float()
        cosine_M = F.cosine_similarity(gather_rows(student[name], rows).float(), target_MD, dim=-1)
        total = total + (weight_M * (1.0 - cosine_M)).sum()
    return total / max(1, len(teacher))


def read_anchors(
    store: AnchorStore, keys: Sequence[str], layers: Sequence[str], rows: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Return layer -> stored teacher states [M, D] at (b, i), in the order of `rows`; only these rows are read.

    Args:
        store: of the frozen teacher.
        keys: sequence key of each row b.
        layers: what to read.
        rows: (b, i), int64 [M] each.
    """
    row_M, position_M = (index.cpu() for index in rows)
    order_M = torch.argsort(row_M, stable=True)
    wanted = sorted(set(row_M.tolist()))
    stored = store.gather(
        [keys[row] for row in wanted], layers, [position_M[order_M][row_M[order_M] == row] for row in wanted]
    )
    back_M = torch.argsort(order_M)
    return {layer: states_MD.index_select(0, back_M) for layer, states_MD in stored.items()}
