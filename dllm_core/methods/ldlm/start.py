"""Closed forms for LDLM's straight paths to start from. N tokens, D hidden, K latent size, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.methods.closed_forms import RIDGE, Statistics, best_log_scale, head_map
from dllm_core.methods.ldlm.networks import LatentNetworks


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
        to_head_DD, decoder = head_map(found), networks.token_decoder
        decoder.straight.weight.copy_(to_head_DD)
        decoder.intercept_D.copy_(found.mean_row_D)
        rows_ND = ((sample[0] - found.mean_D) / found.std_D) @ to_head_DD.T + found.mean_row_D
        decoder.log_scale.fill_(best_log_scale(rows_ND, sample[1], head_VD))
