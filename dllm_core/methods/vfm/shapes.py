"""Sizes of the noise adapter, and what the room costs. Imports no torch.

D width of the base model, W width of the adapter, V vocabulary rows. Everything is per response token.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveInt

from dllm_core.errors import DllmError
from dllm_core.layers import sizes
from dllm_core.methods.requirements import BaseShape


class AdapterShape(BaseModel):
    """Width and depth of the adapter.

    Attributes:
        width: W; None is the width of the base model, so that the adapter grows with it.
        depth: Perceiver layers.
        head_width: of every attention head; a width that it does not divide gets wider heads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt | None = None
    depth: PositiveInt = 2
    head_width: PositiveInt = 64

    def width_on(self, hidden: int) -> int:
        """Return W on a base model of that width."""
        return self.width or hidden

    def heads_on(self, hidden: int) -> int:
        """Return the attention heads of the adapter on a base model of that width.

        Raises:
            DllmError: the width does not split into heads of even width.
        """
        width = self.width_on(hidden)
        for heads in range(max(1, width // self.head_width), 0, -1):
            if width % (2 * heads) == 0:
                return heads
        raise DllmError(
            f"A VFM adapter of width {width} does not split into heads of even width.",
            "Give options.shape a width that is even.",
        )


SHAPES: dict[str, AdapterShape] = {
    "base": AdapterShape(),
    "smoke": AdapterShape(width=64, depth=1, head_width=16),
    "laptop": AdapterShape(),
    "qwen3_1_7b": AdapterShape(head_width=128),
}
"""`base`, `laptop` and `qwen3_1_7b` are as wide as the base model: 7 % of SmolLM2-135M, 113 M beside Qwen3-1.7B."""


def adapter_parameters(shape: AdapterShape, hidden: int, *, spread: bool = True) -> int:
    """Return the adapter's parameters; without `spread` it has no log-deviation head. A test compares."""
    width = shape.width_on(hidden)
    heads = (width + 1) * hidden * (2 if spread else 1)
    return hidden * width + width + sizes.perceiver(width, shape.depth, shape.heads_on(hidden)) + heads


def time_parameters(hidden: int) -> int:
    """Return the parameters of the time embedding: D wide, a shift and a gate of D each."""
    return (sizes.TIME_FREQUENCIES + 1) * hidden + 2 * (hidden + 1) * hidden


def adapter_flops(shape: AdapterShape, hidden: int, prompt: float, keys: float, *, spread: bool = True) -> float:
    """Return operations of the adapter's forward for a slot.

    A slot meets 12 W^2 a layer, the heads and the scores of all keys; a prompt token its projection and the keys and
    values (2 W^2 a layer).

    Args:
        shape: sizes.
        hidden: D.
        prompt: prompt tokens per slot.
        keys: what a slot looks at: prompt tokens and slots of its sequence.
        spread: there is a log-deviation head.
    """
    width = shape.width_on(hidden)
    slot = 12 * width * width * shape.depth + width * hidden * (2 if spread else 1)
    weights = slot + prompt * (hidden * width + 2 * width * width * shape.depth)
    return 2.0 * weights + sizes.score_flops(width, shape.depth, keys)


def pass_flops(base: BaseShape, positions: float, head_rows: float, products: float = 1.0) -> float:
    """Return operations of one pass of the base model per response token, as `Backbone.flops_forward` counts them.

    Args:
        base: the base model; a head that is not tied counts as a block.
        positions: positions per response token.
        head_rows: rows through the head per response token.
        products: vocabulary products per such row: logits, and another one for softmax . E.
    """
    head = base.hidden * base.vocab
    weights = (base.parameters - head) * positions + head * head_rows * products
    return 2.0 * weights + positions * sizes.score_flops(base.attention_width or base.hidden, base.layers, base.length)
