"""The networks of the latent diffusion language model (arXiv:2605.07933).

B batch, L slots (one latent per response token), P prompt tokens, D width of the frozen model's states, K latent
dimension, W width of a network, V vocabulary. Every autoencoder network is a straight linear path plus a Perceiver or
transformer whose last matrix starts at zero: with a straight path from a closed form it starts as the best linear map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.layers.attention import NORM_EPS, key_mask, rotation
from dllm_core.layers.dit import DiT, Modulations, Prefix
from dllm_core.layers.perceiver import Perceiver
from dllm_core.layers.transformer import Transformer
from dllm_core.methods.ldlm.shapes import Shape

QUERY_STD = 0.02


def on_sphere(z_BLK: Tensor) -> Tensor:
    """Return latents scaled to norm sqrt(K)."""
    return F.rms_norm(z_BLK, z_BLK.shape[-1:], eps=NORM_EPS)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class LatentMap(nn.Module):
    """E_z or D_z: a linear path plus a Perceiver with one latent query per slot.

    A query starts as a learned vector plus the slot's own input, so that slots need not find their tokens first.

    Args:
        inputs: width of what comes in.
        outputs: width of what goes out.
        width, depth, num_heads: of the Perceiver.
    """

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.straight = nn.Linear(inputs, outputs, bias=False)
        self.to_width = nn.Linear(inputs, width, bias=False)
        self.query_W = nn.Parameter(QUERY_STD * torch.randn(width))
        self.perceiver = Perceiver(width, depth, num_heads)
        self.out = _zero(nn.Linear(width, outputs, bias=False))

    def forward(self, x_BLI: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """Return [B, L, outputs].

        Args:
            x_BLI: input, one row per slot.
            real_BL: bool; slots that are no padding (None: all).
        """
        position_L = torch.arange(x_BLI.shape[1], device=x_BLI.device)
        x_BLW = self.to_width(x_BLI)
        latents_BLW = self.perceiver(x_BLW, x_BLW + self.query_W, position_L, position_L, real_BL, real_BL)
        return self.straight(x_BLI) + self.out(latents_BLW)


class TokenDecoder(nn.Module):
    """D_w: states to the rows that read tokens out, y = straight(h) + b + out(transformer(h)), times a learned scale.

    The intercept b starts at zero; cells that were saved before there was one load as with zero.

    Args:
        hidden: D.
        width, depth, num_heads: of the transformer.
    """

    def __init__(self, hidden: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.straight = nn.Linear(hidden, hidden, bias=False)
        self.intercept_D = nn.Parameter(torch.zeros(hidden))
        self.to_width = nn.Linear(hidden, width, bias=False)
        self.transformer = Transformer(width, depth, num_heads)
        self.out = _zero(nn.Linear(width, hidden, bias=False))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, h_BLD: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """Return what is multiplied with the head's rows, [B, L, D]."""
        position_L = torch.arange(h_BLD.shape[1], device=h_BLD.device)
        inner_BLW = self.transformer(self.to_width(h_BLD), position_L, key_mask(real_BL))
        return self.log_scale.exp() * (self.straight(h_BLD) + self.intercept_D + self.out(inner_BLW))


class PromptEncoder(nn.Module):
    """Prompt tokens (frozen embeddings, or states of the language model) to conditioning rows.

    Args:
        hidden: D.
        width, depth, num_heads: of the transformer.
    """

    def __init__(self, hidden: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.to_width = nn.Linear(hidden, width, bias=False)
        self.transformer = Transformer(width, depth, num_heads)

    def forward(self, x_BPD: Tensor, visible_BP: Tensor | None = None) -> Tensor:
        """Return [B, P, W]; prompts are read both ways and end at position -1.

        Args:
            x_BPD: one row a token, any scale.
            visible_BP: bool; tokens that are no padding (None: all).
        """
        position_P = prompt_positions(x_BPD.shape[1], x_BPD.device)
        normed_BPD = F.rms_norm(x_BPD, x_BPD.shape[-1:], eps=NORM_EPS)
        return self.transformer(self.to_width(normed_BPD), position_P, key_mask(visible_BP))


def prompt_positions(length: int, device: torch.device) -> Tensor:
    """Return -P..-1: the first response slot is 0, however long the prompt."""
    return torch.arange(-length, 0, device=device)


class Denoiser(nn.Module):
    """The DiT on latents: predicts x_0 from the noisy latent and the prediction before (self-conditioning).

    Args:
        latent: K.
        width, depth, num_heads: of the DiT.
    """

    def __init__(self, latent: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.from_noisy = nn.Linear(latent, width, bias=False)
        self.from_before = _zero(nn.Linear(latent, width, bias=False))
        self.dit = DiT(width, depth, num_heads)
        self.out = _zero(nn.Linear(width, latent))

    def forward(
        self,
        x_BLK: Tensor,
        modulations: Modulations,
        before_BLK: Tensor | None,
        prefix: Prefix | None,
        real_BL: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted clean latents [B, L, K].

        Args:
            x_BLK: noisy latents.
            modulations: of each row's time, `self.dit.modulations(t_B[:, None])`.
            before_BLK: prediction before this one; None stands for zeros.
            prefix: conditioning, `self.dit.prefix(...)`.
            real_BL: bool; slots that are no padding (None: all).
        """
        inner_BLW = self.from_noisy(x_BLK)
        if before_BLK is not None:
            inner_BLW = inner_BLW + self.from_before(before_BLK)
        by = rotation(torch.arange(x_BLK.shape[1], device=x_BLK.device), self.dit.head_width)
        return self.out(self.dit(inner_BLW, modulations, by, prefix, real_BL))


class LatentNetworks(nn.Module):
    """All that is trained.

    Args:
        shape: sizes.
        hidden: D.
        vocab: rows of an own token head.
        normalise: latents lie on a sphere.
    """

    def __init__(self, shape: Shape, hidden: int, vocab: int, *, normalise: bool = True) -> None:
        super().__init__()
        self.shape, self.hidden, self.latent_dim, self.normalise = shape, hidden, shape.latent(hidden), normalise
        self.latent_encoder = LatentMap(hidden, self.latent_dim, *shape.of("encoder"))
        self.latent_decoder = LatentMap(self.latent_dim, hidden, *shape.of("decoder"))
        self.denoiser = Denoiser(self.latent_dim, *shape.of("denoiser"))
        width = shape.denoiser_width
        self.prompt_encoder = PromptEncoder(hidden, width, shape.prompt_depth, shape.heads(width))
        self.token_decoder = TokenDecoder(hidden, *shape.of("token"))
        own = shape.token_head == "own"
        self.token_head_VD = nn.Parameter(QUERY_STD * torch.randn(vocab, hidden)) if own else None

    def encode(self, h_BLD: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """Return latents z_BLK of standardised states."""
        z_BLK = self.latent_encoder(h_BLD, real_BL)
        return on_sphere(z_BLK) if self.normalise else z_BLK

    def prompt(self, x_BPD: Tensor | None, visible_BP: Tensor | None = None) -> Prefix | None:
        """Return the conditioning that the denoiser sees; None without a prompt."""
        if x_BPD is None or x_BPD.shape[1] == 0:
            return None
        context_BPW = self.prompt_encoder(x_BPD, visible_BP)
        position_P = prompt_positions(x_BPD.shape[1], x_BPD.device)
        return self.denoiser.dit.prefix(context_BPW, position_P, visible_BP)

    def denoise(
        self,
        x_BLK: Tensor,
        t_B: Tensor,
        before_BLK: Tensor | None,
        prefix: Prefix | None,
        real_BL: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted clean latents, each row at its own time."""
        return self.denoiser(x_BLK, self.denoiser.dit.modulations(t_B[:, None]), before_BLK, prefix, real_BL)
