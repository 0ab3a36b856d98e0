"""Statistics of the frozen states, and the regressions that latent rooms start from. N tokens, D hidden, V vocabulary.

All sums are float64 over tokens in a fixed order, so that they do not depend on how the data are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-3
SCALES = (5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0)
SCALE_TOKENS = 1024


@dataclass(frozen=True)
class Statistics:
    """Moments of states and of the tokens' head rows.

    Attributes:
        mean_D, std_D: of each dimension; a dimension that never varies gets std 1.
        covariance_DD: of the standardised states, float64.
        with_head_DD: mean of (standardised state) x (head row of its token), float64.
        mean_row_D: mean head row of the tokens.
        counts_V: how often each token occurs among them, int64.
    """

    mean_D: Tensor
    std_D: Tensor
    covariance_DD: Tensor
    with_head_DD: Tensor
    mean_row_D: Tensor
    counts_V: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens they come from."""
        return int(self.counts_V.sum())


def gather_statistics(parts: Iterable[tuple[Tensor, Tensor]], head_VD: Tensor) -> Statistics:
    """Return moments over (states [N, D], token ids [N]) parts.

    Raises:
        ValueError: fewer than two tokens.
    """
    hidden = head_VD.shape[1]
    counts_V, first_D = torch.zeros(len(head_VD), dtype=torch.long), torch.zeros(hidden, dtype=torch.float64)
    second_DD, cross_DD = torch.zeros(hidden, hidden, dtype=torch.float64), torch.zeros(hidden, hidden).double()
    rows_D = torch.zeros(hidden, dtype=torch.float64)
    for states_ND, ids_N in parts:
        states_ND, rows_ND = states_ND.double(), head_VD[ids_N].double()
        counts_V += torch.bincount(ids_N, minlength=len(counts_V))
        first_D += states_ND.sum(0)
        rows_D += rows_ND.sum(0)
        second_DD += states_ND.T @ states_ND
        cross_DD += states_ND.T @ rows_ND
    count = int(counts_V.sum())
    if count < 2:
        raise ValueError(f"statistics of {count} tokens")
    mean_D = first_D / count
    covariance_DD = second_DD / count - mean_D[:, None] * mean_D
    std_D = covariance_DD.diagonal().clamp(min=0).sqrt()
    std_D = torch.where(std_D > 1e-6 * std_D.max(), std_D, 1.0)
    standard_DD = covariance_DD / std_D[:, None] / std_D
    with_head_DD = (cross_DD / count - mean_D[:, None] * (rows_D / count)) / std_D[:, None]
    mean_row_D = (rows_D / count).float()
    return Statistics(mean_D.float(), std_D.float(), standard_DD, with_head_DD, mean_row_D, counts_V)


def head_map(statistics: Statistics) -> Tensor:
    """Return the [D, D] matrix (rows: outputs) of the ridge regression from states to head rows of their tokens.

    Standardised states have mean zero, so the intercept is `statistics.mean_row_D`.
    """
    eye_DD = torch.eye(len(statistics.covariance_DD), dtype=torch.float64)
    return torch.linalg.solve(statistics.covariance_DD + RIDGE * eye_DD, statistics.with_head_DD).T.float()


def best_log_scale(outputs_ND: Tensor, ids_N: Tensor, head_VD: Tensor) -> float:
    """Return the log of the scale (one of a few) at which scale * (outputs . head rows) has the least cross-entropy."""
    outputs_ND, ids_N = outputs_ND[:SCALE_TOKENS], ids_N[:SCALE_TOKENS]
    scores_NV = outputs_ND.float() @ head_VD.float().T
    losses = {s: float(F.cross_entropy(s * scores_NV, ids_N)) for s in SCALES}
    return math.log(min(losses, key=lambda s: losses[s]))
