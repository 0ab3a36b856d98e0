"""Statistics of the frozen states, and closed forms to start from. N tokens, D hidden, K latent size, V vocabulary.

All sums are float64 over tokens in a fixed order, so that they do not depend on how the data are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.methods.ldlm.networks import LatentNetworks

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
        num_tokens: tokens they come from.
    """

    mean_D: Tensor
    std_D: Tensor
    covariance_DD: Tensor
    with_head_DD: Tensor
    num_tokens: int


def gather_statistics(parts: Iterable[tuple[Tensor, Tensor]], head_VD: Tensor) -> Statistics:
    """Return moments over (states [N, D], token ids [N]) parts.

    Raises:
        ValueError: fewer than two tokens.
    """
    hidden = head_VD.shape[1]
    count, first_D = 0, torch.zeros(hidden, dtype=torch.float64)
    second_DD, cross_DD = torch.zeros(hidden, hidden, dtype=torch.float64), torch.zeros(hidden, hidden).double()
    rows_D = torch.zeros(hidden, dtype=torch.float64)
    for states_ND, ids_N in parts:
        states_ND, rows_ND = states_ND.double(), head_VD[ids_N].double()
        count += len(ids_N)
        first_D += states_ND.sum(0)
        rows_D += rows_ND.sum(0)
        second_DD += states_ND.T @ states_ND
        cross_DD += states_ND.T @ rows_ND
    if count < 2:
        raise ValueError(f"statistics of {count} tokens")
    mean_D = first_D / count
    covariance_DD = second_DD / count - mean_D[:, None] * mean_D
    std_D = covariance_DD.diagonal().clamp(min=0).sqrt()
    std_D = torch.where(std_D > 1e-6 * std_D.max(), std_D, 1.0)
    standard_DD = covariance_DD / std_D[:, None] / std_D
    with_head_DD = (cross_DD / count - mean_D[:, None] * (rows_D / count)) / std_D[:, None]
    return Statistics(mean_D.float(), std_D.float(), standard_DD, with_head_DD, count)


def principal_map(statistics: Statistics, latent_dim: int) -> Tensor:
    """Return the [K, D] matrix onto the K leading principal components, scaled to unit mean variance.

    Components beyond D (a latent wider than the states) stay zero.
    """
    values_D, vectors_DD = torch.linalg.eigh(statistics.covariance_DD)
    kept = min(latent_dim, len(values_D))
    leading_KD = vectors_DD.flip(1).T[:kept]
    variance = values_D.flip(0)[:kept].clamp(min=0).sum() / latent_dim
    map_KD = torch.zeros(latent_dim, len(values_D), dtype=torch.float64)
    map_KD[:kept] = leading_KD / variance.clamp(min=1e-12).sqrt()
    return map_KD.float()


def best_decoder(statistics: Statistics, map_KD: Tensor, noise: float) -> Tensor:
    """Return the [D, K] matrix that best restores states from `map h + noise * eps` in the mean square.

    C M^T (M C M^T + noise^2 I)^-1, the linear Wiener solution.
    """
    m_KD, c_DD = map_KD.double(), statistics.covariance_DD
    seen_KK = m_KD @ c_DD @ m_KD.T
    eye_KK = torch.eye(len(seen_KK), dtype=torch.float64)
    return torch.linalg.solve(seen_KK + (noise**2 + RIDGE) * eye_KK, m_KD @ c_DD).T.float()


def head_map(statistics: Statistics) -> Tensor:
    """Return the [D, D] matrix (rows: outputs) of the ridge regression from states to head rows of their tokens."""
    eye_DD = torch.eye(len(statistics.covariance_DD), dtype=torch.float64)
    return torch.linalg.solve(statistics.covariance_DD + RIDGE * eye_DD, statistics.with_head_DD).T.float()


def best_log_scale(outputs_ND: Tensor, ids_N: Tensor, head_VD: Tensor) -> float:
    """Return the log of the scale (one of a few) at which scale * (outputs . head rows) has the least cross-entropy."""
    outputs_ND, ids_N = outputs_ND[:SCALE_TOKENS], ids_N[:SCALE_TOKENS]
    scores_NV = outputs_ND.float() @ head_VD.float().T
    losses = {s: float(torch.nn.functional.cross_entropy(s * scores_NV, ids_N)) for s in SCALES}
    return math.log(min(losses, key=lambda s: losses[s]))


@torch.no_grad()
def start_linear(
    networks: LatentNetworks, found: Statistics, sample: tuple[Tensor, Tensor], head_VD: Tensor, noise: float
) -> None:
    """Set the straight paths, and the scale of the logits, to closed forms.

    Args:
        networks: whose paths are set.
        found: moments over the training data.
        sample: states [N, D] and token ids [N] to find the scale with.
        head_VD: rows of the token head.
        noise: of the latent decoder's input.
    """
    map_KD = principal_map(found, networks.latent_dim)
    networks.latent_encoder.straight.weight.copy_(map_KD)
    networks.latent_decoder.straight.weight.copy_(best_decoder(found, map_KD, noise))
    if networks.token_head_VD is None:
        to_head_DD = head_map(found)
        networks.token_decoder.straight.weight.copy_(to_head_DD)
        states_ND = ((sample[0] - found.mean_D) / found.std_D) @ to_head_DD.T
        networks.token_decoder.log_scale.fill_(best_log_scale(states_ND, sample[1], head_VD))
