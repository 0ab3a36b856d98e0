"""Layers by rule: sets of them, and one counted from the end. Torch-free, since options and dry runs resolve them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dllm_core.errors import DllmError

LayerIndex = Annotated[int, Field(ge=0)]
LayerRule = Literal["quarters", "all"] | tuple[LayerIndex, ...]


def layer_indices(rule: LayerRule, num_layers: int) -> tuple[int, ...]:
    """Resolve a rule to ascending layer numbers: 0 is the embedding output, `num_layers` the last block.

    `quarters` is ceil(k n / 4) for k = 1..4 (7, 14, 21, 28 of 28; 8, 15, 23, 30 of 30); `all` is 0..n.

    Raises:
        DllmError: an empty list, a repeated number, or one beyond the model's last layer.
    """
    if rule == "all":
        return tuple(range(num_layers + 1))
    if rule == "quarters":
        return tuple(sorted({-(-k * num_layers // 4) for k in (1, 2, 3, 4)}))
    layers = tuple(int(layer) for layer in rule)
    allowed = f"Use 'all', 'quarters', or distinct layers from 0 (embedding) to {num_layers} (last block)."
    if not layers:
        raise DllmError("The list of layers is empty.", allowed)
    if len(set(layers)) != len(layers):
        raise DllmError(f"The list of layers {list(layers)} names a layer twice.", allowed)
    if max(layers) > num_layers or min(layers) < 0:
        raise DllmError(f"Layers {list(layers)} do not all exist in a model of {num_layers} layers.", allowed)
    return tuple(sorted(layers))


def layer_names(rule: LayerRule, num_layers: int) -> tuple[str, ...]:
    """Resolve a rule to names: "embed", "1".."N-1", and "final" (the last block *after* the final norm).

    The last block is the post-norm tensor in every set, so that two sets differ in nothing but their members.
    """
    return tuple(_name(layer, num_layers) for layer in layer_indices(rule, num_layers))


def layer_from_end(layer: int, num_layers: int) -> str:
    """Return the name of a hidden state counted from the end: -1 is "final", -num_layers - 1 "embed".

    Raises:
        DllmError: the model has no such layer.
    """
    index = num_layers + 1 + layer
    if not 0 <= index <= num_layers:
        raise DllmError(
            f"layer = {layer} does not exist in a model of {num_layers} blocks.",
            f"Allowed: {-num_layers - 1} (embedding) to -1 (after the final norm).",
        )
    return _name(index, num_layers)


def _name(index: int, num_layers: int) -> str:
    return {0: "embed", num_layers: "final"}.get(index, str(index))
