"""The networks of Cola DLM (arXiv:2605.06548): a token-causal text VAE and a block-causal flow on its latents.

S spans, T slots (a token and its latent each), C slots of the clean half, N of the noisy half, M cached positions, D
width of the frozen states, K latent dimension, W width of a network. Slots are numbered from a document's start and
`block = slot // block_size`. Encoder and decoder are a straight linear path plus a causal transformer whose last matrix
starts at zero: with straight paths from closed forms they start as the best linear maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dllm_core.layers.attention import KeysValues, joined, rotation
from dllm_core.layers.block_mask import attention_mask, sees
from dllm_core.layers.dit import DiT, modulated
from dllm_core.layers.transformer import Transformer
from dllm_core.methods.cola.flow import linear_slope
from dllm_core.methods.cola.shapes import Shape

MASK_STD = 0.02
LOG_VARIANCE_RANGE = (-12.0, 6.0)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class Posterior:
    """q(z | h): independent normals, [S, T, K] each.

    Attributes:
        mean: also the mode.
        log_variance: clamped to `LOG_VARIANCE_RANGE`.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise_STK: Tensor) -> Tensor:
        """Return mean + std * noise."""
        return self.mean + (0.5 * self.log_variance).exp() * noise_STK

    def detach(self) -> Posterior:
        """Return it without gradient."""
        return Posterior(self.mean.detach(), self.log_variance.detach())


class Encoder(nn.Module):
    """q: states of tokens 0..i to the posterior of latent i.

    Args:
        hidden: D.
        latent: K.
        width, depth, num_heads: of the transformer.
        log_variance: of the posterior at the start.
    """

    def __init__(
        self, hidden: int, latent: int, width: int, depth: int, num_heads: int, log_variance: float = -3.0
    ) -> None:
        super().__init__()
        self.straight = nn.Linear(hidden, 2 * latent)
        self.mask_D = nn.Parameter(MASK_STD * torch.randn(hidden))
        self.to_width = nn.Linear(hidden, width, bias=False)
        self.transformer = Transformer(width, depth, num_heads)
        self.out = _zero(nn.Linear(width, 2 * latent, bias=False))
        with torch.no_grad():
            self.straight.bias[:latent] = 0.0
            self.straight.bias[latent:] = log_variance
            self.straight.weight[latent:] = 0.0

    def forward(self, h_STD: Tensor, masked_ST: Tensor | None = None) -> Posterior:
        """Return the posterior; padding has to follow what is real, which then never sees it.

        Args:
            h_STD: standardised states.
            masked_ST: bool; rows that are hidden (the masked view). None for none.
        """
        if masked_ST is not None:
            h_STD = torch.where(masked_ST[..., None], self.mask_D.to(h_STD.dtype), h_STD)
        slot_T = torch.arange(h_STD.shape[1], device=h_STD.device)
        inner_STW = self.transformer(self.to_width(h_STD), slot_T, attention_mask(sees(slot_T, slot_T, "up_to")))
        mean, log_variance = (self.straight(h_STD) + self.out(inner_STW)).chunk(2, dim=-1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))


@dataclass(frozen=True)
class Cache:
    """What a causal network keeps of the positions it has seen.

    Attributes:
        keys_values: of each block of the network.
        place_SM: int64; slot (decoder) or block number (prior) of each cached position.
        visible_SM: bool; positions that are no padding.
    """

    keys_values: tuple[KeysValues, ...]
    place_SM: Tensor
    visible_SM: Tensor

    def after(self, before: Cache | None) -> Cache:
        """Return both, `before` first."""
        if before is None:
            return self
        return Cache(
            tuple(joined(a, b) for a, b in zip(before.keys_values, self.keys_values, strict=True)),
            torch.cat((before.place_SM, self.place_SM), dim=1),
            torch.cat((before.visible_SM, self.visible_SM), dim=1),
        )


class Decoder(nn.Module):
    """p(token i | z_0..i): latents to the rows that read tokens out, times a learned scale.

    Args:
        latent: K.
        hidden: D.
        width, depth, num_heads: of the transformer.
    """

    def __init__(self, latent: int, hidden: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.straight = nn.Linear(latent, hidden)
        self.to_width = nn.Linear(latent, width, bias=False)
        self.transformer = Transformer(width, depth, num_heads)
        self.out = _zero(nn.Linear(width, hidden, bias=False))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, z_STK: Tensor) -> Tensor:
        """Return what is multiplied with the head's rows, [S, T, D], of slots 0..T-1; padding has to come last."""
        slot_T = torch.arange(z_STK.shape[1], device=z_STK.device)
        mask = attention_mask(sees(slot_T, slot_T, "up_to"))
        inner_STW, _ = self.transformer.extend(self.to_width(z_STK), slot_T, None, mask)
        return self._read_out(z_STK, inner_STW)

    def extend(self, z_SNK: Tensor, slot_SN: Tensor, visible_SN: Tensor, before: Cache | None) -> tuple[Tensor, Cache]:
        """Return (rows [S, N, D], the cache with these slots in it).

        Args:
            z_SNK: latents of the slots that follow.
            slot_SN: int64; which slots.
            visible_SN: bool; slots that are no padding.
            before: what was returned for the slots before; None at a document's start.
        """
        parts = [sees(slot_SN, slot_SN, "up_to", visible_SN)]
        if before is not None:
            parts.insert(0, sees(slot_SN, before.place_SM, "up_to", before.visible_SM))
        kept = None if before is None else before.keys_values
        inner_SNW, keys_values = self.transformer.extend(self.to_width(z_SNK), slot_SN, kept, attention_mask(*parts))
        place_SM, visible_SM = slot_SN, visible_SN
        if before is not None:
            place_SM = torch.cat((before.place_SM, slot_SN), dim=1)
            visible_SM = torch.cat((before.visible_SM, visible_SN), dim=1)
        return self._read_out(z_SNK, inner_SNW), Cache(keys_values, place_SM, visible_SM)

    def _read_out(self, z_SNK: Tensor, inner_SNW: Tensor) -> Tensor:
        return self.log_scale.exp() * (self.straight(z_SNK) + self.out(inner_SNW))


class Prior(nn.Module):
    """v(z_t of block b, t; clean latents of the blocks before b), a DiT with joint attention over both.

    Args:
        latent: K.
        width, depth, num_heads: of the DiT.
        block_size: tokens per block.
        linear: predict what the best linear guess from the noisy latent alone leaves (`linear_slope`), so that the
            network starts from that guess; False predicts the velocity itself, from 0.
    """

    def __init__(
        self, latent: int, width: int, depth: int, num_heads: int, block_size: int, *, linear: bool = True
    ) -> None:
        super().__init__()
        self.block_size, self.linear = block_size, linear
        self.to_width = nn.Linear(latent, width)
        self.dit = DiT(width, depth, num_heads)
        self.out = _zero(nn.Linear(width, latent))

    def block_of(self, slot: Tensor) -> Tensor:
        """Return the block of each slot."""
        return slot.div(self.block_size, rounding_mode="floor")

    def clean(self, z_SCK: Tensor, slot_SC: Tensor, visible_SC: Tensor, before: Cache | None = None) -> Cache:
        """Return the cache of clean latents (t = 0): each sees its own block and all before it, noise is seen by none.

        Args:
            z_SCK: standardised latents of whole blocks (the last of a document may be ragged).
            slot_SC: int64; which slots.
            visible_SC: bool; slots that are no padding.
            before: cache of earlier blocks.
        """
        block_SC = self.block_of(slot_SC)
        parts = [sees(block_SC, block_SC, "up_to", visible_SC)]
        if before is not None:
            parts.insert(0, sees(block_SC, before.place_SM, "earlier", before.visible_SM))
        mask, by = attention_mask(*parts), rotation(slot_SC, self.dit.head_width)
        times = self.dit.modulations(torch.zeros((), device=z_SCK.device))
        x_SCW, kept = self.to_width(z_SCK), []
        for n, (block, modulation) in enumerate(zip(self.dit.blocks, times.blocks, strict=True)):
            if n == len(self.dit.blocks) - 1:  # of the last block nothing but keys and values is ever looked at
                kept.append(block.prefix(x_SCW, modulation, by))  # type: ignore[operator]
                break
            earlier = None if before is None else before.keys_values[n]
            x_SCW, own = block.extend(x_SCW, modulation, by, earlier, mask)  # type: ignore[operator]
            kept.append(own)
        return Cache(tuple(kept), block_SC, visible_SC)

    def velocity(
        self,
        x_SNK: Tensor,
        t_S: Tensor,
        slot_SN: Tensor,
        visible_SN: Tensor,
        context: Cache | None,
        known_SN: Tensor | None = None,
        alone_SN: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted dx/dt [S, N, K] of noisy blocks, each in the light of the clean blocks before it.

        Args:
            x_SNK: noisy latents; clean ones where `known_SN`.
            t_S: time of each row.
            slot_SN: int64; which slots.
            visible_SN: bool; slots that are no padding.
            context: clean latents; of its blocks each noisy one sees those before it. None for the empty prefix.
            known_SN: bool; slots that are clean already and enter at t = 0.
            alone_SN: bool; slots of blocks that do not see the context.
        """
        block_SN = self.block_of(slot_SN)
        parts = [sees(block_SN, block_SN, "same", visible_SN)]
        if context is not None:
            before = sees(block_SN, context.place_SM, "earlier", context.visible_SM)
            parts.insert(0, before if alone_SN is None else before & ~alone_SN[:, :, None])
        mask, by = attention_mask(*parts), rotation(slot_SN, self.dit.head_width)
        times = self.dit.modulations(t_S[:, None])
        clean = None if known_SN is None else self.dit.modulations(torch.zeros_like(t_S)[:, None])

        def at(own: Tensor, at_zero: Tensor | None) -> Tensor:
            if known_SN is None or at_zero is None:
                return own
            return torch.where(known_SN[:, :, None], at_zero, own)

        x_SNW = self.to_width(x_SNK)
        for n, block in enumerate(self.dit.blocks):
            modulation = at(times.blocks[n], None if clean is None else clean.blocks[n])
            earlier = None if context is None else context.keys_values[n]
            x_SNW = block(x_SNW, modulation, by, earlier, mask)
        shift, scale = at(times.final, None if clean is None else clean.final).chunk(2, dim=-1)
        found: Tensor = self.out(modulated(x_SNW, shift, scale))
        if not self.linear:
            return found
        slope_SN1 = at(linear_slope(t_S)[:, None, None], linear_slope(torch.zeros_like(t_S))[:, None, None])
        return found + slope_SN1.to(x_SNK.dtype) * x_SNK


class ColaNetworks(nn.Module):
    """All that is trained.

    Args:
        shape: sizes.
        hidden: D.
        block_size: tokens per block of the prior.
        log_variance: of the posterior at the start.
        linear: of the prior.
    """

    def __init__(
        self, shape: Shape, hidden: int, block_size: int, log_variance: float = -3.0, *, linear: bool = True
    ) -> None:
        super().__init__()
        self.latent_dim = shape.latent_dim
        self.encoder = Encoder(hidden, shape.latent_dim, *shape.of("encoder"), log_variance)
        self.decoder = Decoder(shape.latent_dim, hidden, *shape.of("decoder"))
        self.prior = Prior(shape.latent_dim, *shape.of("prior"), block_size, linear=linear)
