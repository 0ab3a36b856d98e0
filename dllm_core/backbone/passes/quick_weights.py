"""A gated decoder's weights as `quick` reads them: matrices laid out once for a CPU, until they change.

D hidden, O outputs, I inputs, W ids that stand for tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dllm_core.backbone.passes.protocol import real_head
from dllm_core.layers.packed_linear import Layout, Product, layout, products

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

TYPICAL_ROWS = 160
LARGEST_COPY = 2**31
"""Bytes of a model's matrices up to which reordered copies of them are kept beside it: 1 billion weights in bf16."""
PROBED_EVERY = 32
"""One row in so many tells whether a matrix was written to behind autograd's back."""


class Norm(NamedTuple):
    """A root-mean-square norm (arXiv 1910.07467): weight and what is added to the mean square."""

    weight: Tensor
    eps: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """Take a module's weight."""
        found: Any = module
        weight = found.weight.detach()
        return cls(weight, torch.tensor(found.variance_epsilon, dtype=torch.float32, device=weight.device))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised last dimension; in fp32, rounded before the weight comes in, as transformers does."""
        wide = x.float()
        # squared again, in as few operations as there are: with one row in x, each costs about as much as a norm
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)


class Products(NamedTuple):
    """Products of the same states: one matrix over the other where they are copied anyway, else one after the other.

    Attributes:
        parts: what is multiplied with.
        sizes: outputs of each of the modules.
    """

    parts: tuple[Product, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, modules: Sequence[nn.Linear], lay: Layout, *, joined: bool) -> Products:
        """Take modules' weights; either all of them have a bias or none has."""
        return cls(products(modules, lay, join=joined), tuple(module.out_features for module in modules))

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the product with each module's matrix, with its bias; views of one tensor where they are joined."""
        if len(self.parts) == 1:
            return self.parts[0](x).split(self.sizes, -1)
        return tuple(product(x) for product in self.parts)


class BlockWeights(NamedTuple):
    """Of one block; the attention module says how heads are grouped and scaled."""

    attention: Any
    input_norm: Norm
    query_key_value: Products
    query_norm: Norm | None
    key_norm: Norm | None
    out: Product
    inner_norm: Norm
    gate: Product
    up: Product
    down: Product

    @classmethod
    def of(cls, block: Any, lay: Layout, *, joined: bool) -> BlockWeights:
        """Take a block's weights; those of queries, keys and values one over the other where `joined`."""
        heads, mlp = block.self_attn, block.mlp
        query_norm, key_norm = (
            Norm.of(getattr(heads, name)) if hasattr(heads, name) else None for name in ("q_norm", "k_norm")
        )
        return cls(
            heads,
            Norm.of(block.input_layernorm),
            Products.of((heads.q_proj, heads.k_proj, heads.v_proj), lay, joined=joined),
            query_norm,
            key_norm,
            Product.of(heads.o_proj, lay),
            Norm.of(block.post_attention_layernorm),
            Product.of(mlp.gate_proj, lay),
            Product.of(mlp.up_proj, lay),
            Product.of(mlp.down_proj, lay),
        )


def linears_of(backbone: Backbone) -> Iterator[nn.Module]:
    """Yield the modules whose matrices a pass multiplies with, block by block."""
    block: Any
    for block in backbone.layers:
        heads, mlp = block.self_attn, block.mlp
        yield from (heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


class LaidOut:
    """A decoder's weights as `QuickPass` reads them.

    Args:
        backbone: the model.
        state: from `_state`; what the weights were when they were laid out.

    Attributes:
        blocks, final_norm: of the decoder.
        head_WD: rows of the output head that stand for tokens, which are the first.
    """

    def __init__(self, backbone: Backbone, state: object) -> None:
        self.state = state
        head_WD = real_head(backbone)
        matrices: Any = [*(module.weight for module in linears_of(backbone)), head_WD]
        copied = sum(weight.numel() * weight.element_size() for weight in matrices) <= LARGEST_COPY
        lay: Layout = torch.Tensor.detach
        if copied:
            lay = layout(backbone.device, head_WD.dtype, TYPICAL_ROWS)
        self.blocks = [BlockWeights.of(block, lay, joined=copied) for block in backbone.layers]
        self.head_WD = lay(head_WD)
        self.final_norm = Norm.of(getattr(backbone.decoder, backbone.family.norm))


_kept: WeakKeyDictionary[Backbone, LaidOut] = WeakKeyDictionary()


def laid_out(backbone: Backbone) -> LaidOut:
    """Return a backbone's weights, laid out anew if they have changed in place or been replaced."""
    state, kept = _state(backbone), _kept.get(backbone)
    if kept is None or kept.state != state:
        _kept.pop(backbone, None)  # before the next copy is made
        _kept[backbone] = kept = LaidOut(backbone, state)
    return kept


@torch.no_grad()
def _state(backbone: Backbone) -> object:
    weights = [weight.detach() for weight in backbone.model.parameters()]
    counts = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    # writing through `.data` counts nowhere
    probes = torch.stack([bits(weight[::PROBED_EVERY]).sum() for weight in weights if weight.dim() == 2])
    return counts, probes.tolist()


def bits(numbers: Tensor) -> Tensor:
    """Return floating-point numbers as integers of the same bits, for which a NaN equals itself."""
    return numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])
