"""Closed forms for the autoencoder to start from. D hidden, K latent size, V vocabulary, N tokens.

Reduced-rank regression: of all maps of states through K numbers, the one whose prediction of the tokens' head rows has
the least squared error. With A the full regression and C the states' covariance, the K leading eigenvectors U of
A C A^T give the encoder U^T A, here with its outputs scaled to variance 1, and the decoder back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.methods.closed_forms import RIDGE, Statistics, head_map

STATE_LIMIT = 8.0
"""Standardised states are cut off here: a document's first position is an outlier in a few dimensions."""


@dataclass(frozen=True)
class ClosedForm:
    """The best linear autoencoder.

    Attributes:
        encoder_KD: standardised states to latents of mean 0 and variance 1.
        decoder_DK: latents with the posterior's noise back to head rows (the Wiener solution).
    """

    encoder_KD: Tensor
    decoder_DK: Tensor


def closed_form(statistics: Statistics, latent_dim: int, noise_variance: float) -> ClosedForm:
    """Return the reduced-rank regression from states to head rows through K noisy numbers.

    Dimensions beyond D (a latent wider than the states) stay zero.

    Args:
        statistics: moments of states and head rows.
        latent_dim: K.
        noise_variance: of the posterior at the start.
    """
    covariance_DD = statistics.covariance_DD
    full_DD = head_map(statistics).double()
    values_D, vectors_DD = torch.linalg.eigh(full_DD @ covariance_DD @ full_DD.T)
    kept = min(latent_dim, len(values_D))
    leading_kD = vectors_DD.flip(1).T[:kept]
    encoder_KD = torch.zeros(latent_dim, len(values_D), dtype=torch.float64)
    deviation_k = values_D.flip(0)[:kept].clamp(min=RIDGE * float(values_D.max().clamp(min=1e-12))).sqrt()
    encoder_KD[:kept] = (leading_kD @ full_DD) / deviation_k[:, None]
    seen_KK = encoder_KD @ covariance_DD @ encoder_KD.T + (noise_variance + RIDGE) * torch.eye(latent_dim).double()
    decoder_DK = torch.linalg.solve(seen_KK, encoder_KD @ statistics.with_head_DD).T
    return ClosedForm(encoder_KD.float(), decoder_DK.float())
