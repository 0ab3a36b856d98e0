"""What decoding with the whole canvas at every step must compute and move at least, pass by pass.

B batch, C canvas tokens of a row, M rows of the batch through the head, D hidden, V real tokens.
"""

from __future__ import annotations

from typing import Any

from benchmarks.latent_models import Pass
from dllm_core.samplers import inspection
from dllm_core.samplers.config import DiffusionGenerationConfig

DEFINITION = (
    "Bytes of a step: the matrices of the blocks and of the head read once, what goes into and comes out of the blocks'"
    " matrix products and attentions, and the states that the head reads; its logits need not be written. Operations:"
    " 2 a multiplication, attention over the whole canvas, the head for masked rows and real tokens alone; the last"
    " block makes keys and values of all tokens and the rest for the rows that the head reads. Norms, rotations,"
    " softmax and embeddings are not counted."
)


def block(config: Any, rows: int, read: int, seen: float) -> tuple[float, float, float]:
    """Return (operations, weights, activations) of one block.

    Args:
        config: of the transformers model.
        rows: tokens of the batch, all of which become keys and values.
        read: tokens of the batch whose result is read.
        seen: tokens that each of them sees, on average.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    of_all = [(hidden, 2 * keys)]
    of_read = [(hidden, queries), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    flops = 4.0 * read * seen * queries
    activations = 2.0 * (read * queries + rows * keys)
    for count, products in ((rows, of_all), (read, of_read)):
        flops += 2.0 * count * sum(i * o for i, o in products)
        activations += count * sum(i + o for i, o in products)
    return flops, float(sum(i * o for i, o in of_all + of_read)), activations


def passes(model: Any, num_tokens: int, config: DiffusionGenerationConfig, prompt: int, batch: int) -> list[Pass]:
    """Return what a decode without a cache consists of: the blocks at every step, the head on what is masked then.

    Args:
        model: config of the transformers model.
        num_tokens: ids that can be predicted.
        config: of the decode.
        prompt: tokens of each prompt.
        batch: rows.
    """
    assert config.cache.kind == "none", "a cached pass runs part of the canvas"
    canvas = prompt + config.max_new_tokens
    return [
        part
        for number, step in enumerate(inspection.planned(config, [prompt] * batch).passes, 1)
        for part in _step(model, num_tokens, number, batch * canvas, step.head_rows, canvas)
    ]


def cached_passes(
    model: Any, num_tokens: int, config: DiffusionGenerationConfig, prompt: int, block_size: int
) -> list[Pass]:
    """Return what decoding one row in blocks with the exact cache consists of.

    A pass runs the block that is at work and what was not kept yet (at first the prompt); a token sees the blocks up to
    its own.

    Args:
        model: config of the transformers model.
        num_tokens: ids that can be predicted.
        config: of the decode; its cache is `exact`.
        prompt: tokens of the prompt, a multiple of the block size.
        block_size: of the model.
    """
    assert config.cache.kind == "exact"
    assert prompt % block_size == 0
    found = list[Pass]()
    for number, step in enumerate(inspection.planned(config, [prompt], model_block=block_size).passes, 1):
        seen = prompt + step.last_block * block_size
        blocks = max(1, step.network_tokens // block_size)
        mean_seen = seen - block_size * (blocks - 1) / 2
        found += _step(model, num_tokens, number, step.network_tokens, step.head_rows, mean_seen)
    return found


def _step(model: Any, num_tokens: int, number: int, rows: int, read: int, seen: float) -> tuple[Pass, Pass]:
    """Return the blocks and the head of one step."""
    whole, last = block(model, rows, rows, seen), block(model, rows, read, seen)
    flops, weights, activations = ((model.num_hidden_layers - 1) * a + b for a, b in zip(whole, last, strict=True))
    head_weights = float(model.hidden_size * num_tokens)
    return (
        Pass(f"blocks, step {number}", 1, flops, weights, activations),
        Pass(f"head, step {number}", 1, 2.0 * read * head_weights, head_weights, float(read * model.hidden_size)),
    )
