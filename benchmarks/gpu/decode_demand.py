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


def block(config: Any, rows: int, read: int, canvas: int) -> tuple[float, float, float]:
    """Return (operations, weights, activations) of one block.

    Args:
        config: of the transformers model.
        rows: tokens of the batch, all of which become keys and values.
        read: tokens of the batch whose result is read.
        canvas: tokens that each of them sees.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    of_all = [(hidden, 2 * keys)]
    of_read = [(hidden, queries), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    flops = 4.0 * read * canvas * queries
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
    head_weights, found = float(model.hidden_size * num_tokens), list[Pass]()
    for number, step in enumerate(inspection.planned(config, [prompt] * batch).passes, 1):
        read = step.head_rows
        whole = block(model, batch * canvas, batch * canvas, canvas)
        last = block(model, batch * canvas, read, canvas)
        flops, weights, activations = ((model.num_hidden_layers - 1) * a + b for a, b in zip(whole, last, strict=True))
        found.append(Pass(f"blocks, step {number}", 1, flops, weights, activations))
        head_flops, states = 2.0 * read * head_weights, float(read * model.hidden_size)
        found.append(Pass(f"head, step {number}", 1, head_flops, head_weights, states))
    return found
