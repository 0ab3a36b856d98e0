"""A gated decoder's weights for few launches: matrices that read the same states are one matrix, until they change.

On a GPU queries, keys and values are one product and so are gate and up: for Qwen3-1.7B copies of 1.9 GB in bf16 beside
3.4 GB of weights. Where that is more than `LARGEST_COPY` or a quarter of the memory that is free, the model's own
matrices are multiplied one by one. On a CPU matrices are reordered for oneDNN besides.

D hidden, O outputs, I inputs, N query heads, K key heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dllm_core.backbone.passes.quick_weights import bits
from dllm_core.backbone.passes.rotation import Rotations
from dllm_core.layers.packed_linear import Layout, Product, layout, products, reorders

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

LARGEST_COPY = {"cpu": 2**31, "cuda": 2**33}
"""Bytes of matrices up to which copies of them are kept beside a model."""
LARGEST_SHARE = 4
"""One part in so many of a GPU's free memory is the most that copies may take."""
TYPICAL_ROWS = 160
PROBED = 256
"""So many of a copied weight's numbers tell whether it was written to behind autograd's back."""


class NormWeight(NamedTuple):
    """A root-mean-square norm's weight and what is added to the mean square."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> NormWeight:
        """Take a module's weight."""
        return cls(module.weight.detach(), float(module.variance_epsilon))


class JoinedBlock(NamedTuple):
    """Of one block.

    Attributes:
        heads: queries, keys and values: one product, or three.
        head_norms: weights of the norms of queries and keys, [N + K, H] where the product is one, else [H] twice;
            empty where the family has none.
        inner: gate and up: one product, or two.
    """

    input_norm: NormWeight
    heads: tuple[Product, ...]
    head_norms: tuple[Tensor, ...]
    head_eps: float
    out: Product
    inner_norm: NormWeight
    inner: tuple[Product, ...]
    down: Product

    @classmethod
    def of(cls, block: Any, lay: Layout, *, join_heads: bool, join_inner: bool) -> JoinedBlock:
        """Take a block's weights."""
        heads, mlp = block.self_attn, block.mlp
        norms: tuple[Tensor, ...] = ()
        if hasattr(heads, "q_norm"):
            norms = (heads.q_norm.weight.detach(), heads.k_norm.weight.detach())
            if join_heads:
                counts = [m.out_features // heads.head_dim for m in (heads.q_proj, heads.k_proj)]
                norms = (torch.cat([w.expand(n, -1) for w, n in zip(norms, counts, strict=True)]),)
        (out,), (down,) = (products([m], lay, join=False) for m in (heads.o_proj, mlp.down_proj))
        return cls(
            NormWeight.of(block.input_layernorm),
            products((heads.q_proj, heads.k_proj, heads.v_proj), lay, join=join_heads),
            norms,
            float(heads.q_norm.variance_epsilon) if norms else 0.0,
            out,
            NormWeight.of(block.post_attention_layernorm),
            products((mlp.gate_proj, mlp.up_proj), lay, join=join_inner),
            down,
        )


class Joined:
    """A decoder's weights as `joined` reads them. What is not copied is the model's own storage.

    Args:
        backbone: a model that `obstacle` has nothing against.

    Attributes:
        rotations: of its heads.
        width: H.
        groups: query heads that share a key head.
        scale: of attention scores.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, backbone: Backbone) -> None:
        first: Any = backbone.layers[0]
        heads = first.self_attn
        self.device, self.dtype = backbone.device, heads.q_proj.weight.dtype
        packs = self.device.type == "cpu" and reorders(self.dtype)
        copied = list(_copied(backbone, everything=packs))
        size = sum(weight.numel() * weight.element_size() for weight in copied)
        join = size <= _room(self.device)
        packs = packs and join
        lay: Layout = layout(self.device, self.dtype, TYPICAL_ROWS) if packs else torch.Tensor.detach
        self.blocks = [
            # gate and up are one operation for oneDNN as they are
            JoinedBlock.of(block, lay, join_heads=join, join_inner=join and not packs)
            for block in backbone.layers
        ]
        self.final_norm = NormWeight.of(getattr(backbone.decoder, backbone.family.norm))
        self.embedding: Any = backbone.model.get_input_embeddings()
        self.rotations = Rotations(backbone)
        self.width, self.scale = int(heads.head_dim), float(heads.scaling)
        self.num_heads = heads.q_proj.out_features // self.width
        self.num_key_heads = heads.k_proj.out_features // self.width
        self.groups = self.num_heads // self.num_key_heads
        self._parameters = list(backbone.decoder.parameters())
        # writing through `.data` counts nowhere; what is read in the model's own storage shows by itself
        self._probed = [weight.detach().flatten()[:PROBED] for weight in copied] if join else []
        self._state, self._probe = self._places_and_counts(), self._probe_now()

    def is_current(self, backbone: Backbone) -> bool:
        """Whether the model's weights are where and what they were. Reads one number back from the device."""
        parameters = list(backbone.decoder.parameters())
        if len(parameters) != len(self._parameters):
            return False
        if any(a is not b for a, b in zip(parameters, self._parameters, strict=True)):
            return False
        return self._places_and_counts() == self._state and torch.equal(self._probe_now(), self._probe)

    def _places_and_counts(self) -> list[tuple[int, torch.dtype, int]]:
        weights = [weight.detach() for weight in self._parameters]
        return [(w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights]

    @torch.no_grad()
    def _probe_now(self) -> Tensor:
        probe = torch.cat(self._probed) if self._probed else torch.empty(0, dtype=self.dtype)
        return bits(probe)


def _copied(backbone: Backbone, *, everything: bool) -> Iterator[Tensor]:
    """Yield the weights of which a copy would be kept; `everything`: of every matrix."""
    block: Any
    for block in backbone.layers:
        heads, mlp = block.self_attn, block.mlp
        modules = [heads.q_proj, heads.k_proj, heads.v_proj, mlp.gate_proj, mlp.up_proj]
        modules += [heads.o_proj, mlp.down_proj] if everything else []
        yield from (module.weight for module in modules)
        yield from (module.bias for module in modules if module.bias is not None)
        yield from (getattr(heads, name).weight for name in ("q_norm", "k_norm") if hasattr(heads, name))


def _room(device: torch.device) -> int:
    largest = LARGEST_COPY.get(device.type, 0)
    if device.type != "cuda":
        return largest
    free, _ = torch.cuda.mem_get_info(device)
    return min(largest, free // LARGEST_SHARE)


def obstacle(backbone: Backbone) -> str | None:
    """Return why joined weights would not give what the modules give, None where they do.

    What holds for every pass that leaves the modules out is asked by `choice.obstacle`.
    """
    kinds = {(parameter.dtype, parameter.device) for parameter in backbone.decoder.parameters()}
    if len(kinds) > 1:
        return "its weights differ in dtype or device"
    dtype = next(iter(kinds))[0]
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) and backbone.device.type == "cuda":
        return f"it is not written for {str(dtype).removeprefix('torch.')}"
    rotary: Any = backbone.decoder.rotary_emb
    if rotary.rope_type in ("dynamic", "longrope"):
        return f"positions of type {rotary.rope_type} depend on the length"
    return None
