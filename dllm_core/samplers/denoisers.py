"""How a pass over the canvas is made: whole, or in part behind keys and values that are kept.

A denoiser gets the canvas and where each row works, and returns the hidden states that predict the candidates. Rules,
drafting and scheduling know nothing of it. `FullCanvas` is the reference; `CachedCanvas` runs, of every row, one
stretch of positions, and a `policy` says which.

B batch, C canvas length, L positions run in a pass, M predicted positions (of a mask: visible keys), D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dllm_core.backbone import masks
from dllm_core.backbone.passes.choice import pass_for
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.errors import DllmError
from dllm_core.samplers.blocks import Span
from dllm_core.samplers.policies import Policy, Stretch, policy_for

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.samplers.cache_settings import CacheConfig


@dataclass(frozen=True)
class Shape:
    """What the model is run on.

    Attributes:
        lengths: tokens of each row, what lies beyond is padding.
        length: C.
    """

    lengths: tuple[int, ...]
    length: int

    @property
    def is_padded(self) -> bool:
        """Whether a row is shorter than the canvas."""
        return any(n < self.length for n in self.lengths)

    def real_BC(self, device: torch.device) -> Tensor:
        """Bool; True where a row has a token."""
        return torch.arange(self.length, device=device) < torch.tensor(self.lengths, device=device)[:, None]


class Denoiser(Protocol):
    """One way to make a pass.

    Attributes:
        head_WD: see `DecoderPass`.
    """

    head_WD: Tensor

    def predict(self, canvas_BC: Tensor, spans: Sequence[Span | None], where_M: Tensor) -> Tensor:
        """Return hidden_MD, the states that predict given positions.

        Args:
            canvas_BC: int64; the present canvas.
            spans: where each row works; None for rows that are done and predict nothing.
            where_M: int64; flat indices b * C + c of the positions to predict, all inside their row's span.
        """


def model_block_size(backbone: Backbone) -> int | None:
    """Return the tokens of a block of a block-causal model; None where every token sees the whole canvas."""
    contract = backbone.contract
    if contract.attention != "block_causal":
        return None
    assert contract.block_size is not None, "a block-causal contract names its block size"
    return contract.block_size


def shift_of(backbone: Backbone) -> int:
    """Return how far before a token the state stands that predicts it."""
    return 1 if backbone.contract.alignment == "shifted" else 0


class FullCanvas:
    """Every position in every pass: what caches are measured against.

    Args:
        backbone: the model.
        shape: of the canvas.
        quick: with kernels made for decoding, where there are any for the model.
        compiling: `compile` of the settings.
    """

    def __init__(self, backbone: Backbone, shape: Shape, *, quick: bool = True, compiling: str = "never") -> None:
        self.shift, self.run = shift_of(backbone), pass_for(backbone, quick=quick, compiling=compiling)
        self.head_WD = self.run.head_WD
        self.attention_mask_B1CC = None
        block_size = model_block_size(backbone)
        if shape.is_padded or block_size:
            real_BC = shape.real_BC(backbone.device) if shape.is_padded else None
            self.attention_mask_B1CC = canvas_mask(real_BC, shape.length, block_size, backbone.device)

    def predict(self, canvas_BC: Tensor, spans: Sequence[Span | None], where_M: Tensor) -> Tensor:
        """Return hidden_MD; see `Denoiser`."""
        return self.run(canvas_BC, row_M=where_M - self.shift, attention_mask_B1LM=self.attention_mask_B1CC)


def canvas_mask(real_BC: Tensor | None, length: int, block_size: int | None, device: torch.device) -> Tensor:
    """Return [B or 1, 1, C, C], True where query sees key: real tokens, of no later block where there are blocks.

    Padding sees nobody but itself.
    """
    mask = None if real_BC is None else masks.document_mask(real_BC.long() - 1, causal=False)
    if block_size is None:
        assert mask is not None
        return mask
    block_C = torch.arange(length, device=device) // block_size
    blocks_11CC = (block_C[:, None] >= block_C)[None, None]
    return blocks_11CC if mask is None else mask & blocks_11CC


class CachedCanvas:
    """One stretch of each row per pass, the rest from the cache.

    A row's stretch depends on the row alone, so that rows of a batch decode as they would alone. Where stretches
    differ, they are laid side by side and padded; what the padding writes goes to one more slot that nobody sees.

    Args:
        backbone: the model.
        shape: of the canvas.
        policy: says which stretch of a row a pass runs.
        block_size: of a block-causal model, else None.
        compiling: `compile` of the settings.
    """

    def __init__(
        self, backbone: Backbone, shape: Shape, policy: Policy, block_size: int | None, *, compiling: str = "never"
    ) -> None:
        backbone.check_length(shape.length)
        self.shape, self.policy, self.block_size = shape, policy, block_size
        self.shift, self.device = shift_of(backbone), backbone.device
        self.run = pass_for(backbone, compiling=compiling)
        self.head_WD = self.run.head_WD
        self.cache = SlotCache(backbone.num_layers, shape.length + 1)
        self.real_BC = shape.real_BC(self.device) if shape.is_padded else None
        self.edge_B1D: Tensor | None = None

    def predict(self, canvas_BC: Tensor, spans: Sequence[Span | None], where_M: Tensor) -> Tensor:
        """Return hidden_MD; see `Denoiser`."""
        stretches = self._stretches(spans)
        width = max(s.stop - s.start for s in stretches)
        states_BLD = self._run(canvas_BC, stretches, width)
        first_B = torch.tensor([s.start for s in stretches]).to(self.device, non_blocking=True)
        if self.block_size is not None:
            # the state before a block predicts its first token, and is final with the block before: it is kept
            edge_B1D = torch.zeros_like(states_BLD[:, :1]) if self.edge_B1D is None else self.edge_B1D
            states_BLD = torch.cat((edge_B1D, states_BLD), 1)
            at_B = torch.tensor([s.final - s.start for s in stretches]).to(self.device, non_blocking=True)
            self.edge_B1D = states_BLD.gather(1, at_B[:, None, None].expand_as(edge_B1D))
            first_B = first_B - 1
        row_M = where_M // self.shape.length
        place_M = where_M - row_M * self.shape.length - self.shift - first_B[row_M]
        return states_BLD.flatten(0, 1).index_select(0, row_M * states_BLD.shape[1] + place_M)

    def _stretches(self, spans: Sequence[Span | None]) -> list[Stretch]:
        """Return the stretch of each row; rows that are done take another's, which costs nothing more."""
        found = [
            None if span is None else self.policy.stretch(row, span, self.shape.lengths[row])
            for row, span in enumerate(spans)
        ]
        some = next(stretch for stretch in found if stretch is not None)
        return [some if stretch is None else stretch for stretch in found]

    def _run(self, canvas_BC: Tensor, stretches: list[Stretch], width: int) -> Tensor:
        start, length = stretches[0].start, self.shape.length
        visible = max(s.stop for s in stretches) if self.block_size is not None else length
        if all((s.start, s.stop) == (start, start + width) for s in stretches):
            slots_L = torch.arange(start, start + width, device=self.device)
            mask = self._mask(slots_L[None], visible, stretches)
            return self.run(
                canvas_BC[:, start : start + width],
                position_BL=slots_L[None],
                attention_mask_B1LM=mask,
                cache=self.cache.at(start, visible=visible),
            )
        ends_2B1 = torch.tensor([[s.start for s in stretches], [s.stop for s in stretches]])[..., None]
        start_B1, stop_B1 = ends_2B1.to(self.device, non_blocking=True)
        position_BL = start_B1 + torch.arange(width, device=self.device)
        slot_BL = torch.where(position_BL < stop_B1, position_BL, length)
        position_BL = position_BL.clamp(max=length - 1)
        return self.run(
            canvas_BC.gather(1, position_BL),
            position_BL=position_BL,
            attention_mask_B1LM=self._mask(position_BL, visible, stretches),
            cache=self.cache.at(slot_BL, visible=visible),
        )

    def _mask(self, position_BL: Tensor, visible: int, stretches: list[Stretch]) -> Tensor | None:
        """Return what queries see of the visible slots, [B or 1, 1, L, M]; None for all."""
        real_B11M = None if self.real_BC is None else self.real_BC[:, None, None, :visible]
        size = self.block_size
        if size is None or all(s.start // size == (visible - 1) // size for s in stretches):
            # masks of one query row are for the kernels to spread; a mask of one key would mean something else
            return None if real_B11M is None else real_B11M.expand(-1, -1, position_BL.shape[1], -1)
        key_M = torch.arange(visible, device=self.device) // size
        earlier_B1LM = (position_BL[..., None] // size >= key_M)[:, None]
        return earlier_B1LM if real_B11M is None else earlier_B1LM & real_B11M


class GuidedCanvas:
    """The canvas and, in the same batch, the canvas with all given tokens masked.

    Args:
        inner: a denoiser for twice the rows.
        given_BC: bool; tokens that the second half does not see.
        mask_token_id: what stands there instead.
    """

    def __init__(self, inner: Denoiser, given_BC: Tensor, mask_token_id: int) -> None:
        self.inner, self.given_BC, self.mask_token_id = inner, given_BC, mask_token_id
        self.head_WD = inner.head_WD

    def predict(self, canvas_BC: Tensor, spans: Sequence[Span | None], where_M: Tensor) -> Tensor:
        """Return hidden_MD twice, one behind the other: with and without the given tokens."""
        without_BC = canvas_BC.masked_fill(self.given_BC, self.mask_token_id)
        where_2M = torch.cat((where_M, where_M + canvas_BC.numel()))
        return self.inner.predict(torch.cat((canvas_BC, without_BC)), (*spans, *spans), where_2M)


def denoiser_for(
    backbone: Backbone, shape: Shape, cache: CacheConfig, *, quick: bool = True, compiling: str = "never"
) -> Denoiser:
    """Return the denoiser that the settings ask for.

    Args:
        backbone: the model.
        shape: of the canvas.
        cache: keys and values to keep.
        quick: see `FullCanvas`; caches are always run that way.
        compiling: see `FullCanvas`.

    Raises:
        DllmError: a cache that the model's attention does not allow, or a canvas longer than the model.
    """
    if cache.kind == "none":
        return FullCanvas(backbone, shape, quick=quick, compiling=compiling)
    block_size = model_block_size(backbone)
    if cache.kind == "exact" and block_size is None:
        raise DllmError(
            "cache='exact' needs a block-causal model; in this one every token sees the whole canvas, so that no key "
            "or value stays right.",
            "Decode a block_causal cell, or give cache='prefix', 'dual' or 'delayed', which are approximate.",
        )
    if cache.is_approximate and block_size is not None:
        raise DllmError(
            f"cache='{cache.kind}' approximates what a block-causal model gives exactly.", "Give cache='exact'."
        )
    policy = policy_for(cache, len(shape.lengths), shift_of(backbone), block_size)
    return CachedCanvas(backbone, shape, policy, block_size, compiling=compiling)
