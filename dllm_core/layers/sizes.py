"""Parameters of the blocks, counted without torch: plans and budgets are made before anything heavy is loaded.

W width. A test compares every count with the module it describes.
"""

from __future__ import annotations

TIME_FREQUENCIES = 256
"""Cosines and sines together that the time is written as."""


def attention(width: int, num_heads: int) -> int:
    """Query, key, value and output matrices and two per-head norms: 4 W^2 + 2 W / N."""
    return 4 * width * width + 2 * (width // num_heads)


def feedforward(width: int, multiple: int = 4) -> int:
    """Two matrices without biases."""
    return 2 * multiple * width * width


def transformer(width: int, depth: int, num_heads: int) -> int:
    """Blocks with two layer norms each, and the final norm."""
    return depth * (attention(width, num_heads) + feedforward(width) + 4 * width) + 2 * width


def perceiver(width: int, depth: int, num_heads: int) -> int:
    """Layers with three layer norms each, and the final norm."""
    return depth * (attention(width, num_heads) + feedforward(width) + 6 * width) + 2 * width


def time_embedding(width: int) -> int:
    """Two layers with biases."""
    return (TIME_FREQUENCIES + 1) * width + (width + 1) * width


def dit(width: int, depth: int, num_heads: int) -> int:
    """Blocks with their modulation (6 W (W + 1)), the time embedding and the final modulation (2 W (W + 1))."""
    block = attention(width, num_heads) + feedforward(width) + 6 * width * (width + 1)
    return depth * block + time_embedding(width) + 2 * width * (width + 1)


def score_flops(width: int, depth: int, keys: float) -> float:
    """Return operations of a forward pass of attention itself, per query: 2 for each product of scores and of values.

    Args:
        width: of all heads together.
        depth: layers.
        keys: keys that a query is multiplied with in each of them, seen or not.
    """
    return 4.0 * width * keys * depth
