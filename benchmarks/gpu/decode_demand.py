"""What decoding with the whole canvas at every step must compute and move at least, pass by pass.

B batch, C canvas tokens of the batch, M rows through the head, D hidden, V rows of the head.
"""

from __future__ import annotations

from typing import Any

from benchmarks.latent_models import Pass
from dllm_core.samplers import inspection
from dllm_core.samplers.config import DiffusionGenerationConfig

DEFINITION = (
    "Bytes of a step: the matrices of the blocks and of the head read once, what goes into and comes out of the blocks'"
    " matrix products and attentions, and the states that the head reads; its logits need not be written. Operations:"
    " 2 a multiplication, attention over the whole canvas, the head for masked rows alone. Norms, rotations, softmax"
    " and embeddings are not counted."
)


def block_pass(config: Any, batch: int, canvas: int, times: int) -> Pass:
    """Return a pass of a decoder's blocks over whole canvases.

    Args:
        config: of the transformers model.
        batch: rows.
        canvas: tokens of a row; each sees all of them.
        times: how often it runs.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    products = [(hidden, queries), (hidden, 2 * keys), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    weights = float(sum(i * o for i, o in products))
    tokens = batch * canvas
    flops = 2.0 * tokens * weights + 4.0 * tokens * canvas * queries
    activations = tokens * (sum(i + o for i, o in products) + 2 * queries + 2 * keys)
    return Pass("blocks", times, layers * flops, layers * weights, float(layers * activations))


def passes(model: Any, config: DiffusionGenerationConfig, prompt: int, batch: int) -> list[Pass]:
    """Return what a decode without a cache consists of: the blocks at every step, the head on what is masked then.

    Args:
        model: config of the transformers model; its table holds the padded rows.
        config: of the decode.
        prompt: tokens of each prompt.
        batch: rows.
    """
    assert config.cache.kind == "none", "a cached pass runs part of the canvas"
    found = inspection.planned(config, [prompt] * batch).passes
    head_weights = float(model.hidden_size * model.vocab_size)
    heads = [
        Pass(
            f"head, step {step}",
            1,
            2.0 * p.head_rows * head_weights,
            head_weights,
            float(p.head_rows * model.hidden_size),
        )
        for step, p in enumerate(found, 1)
    ]
    return [block_pass(model, batch, prompt + config.max_new_tokens, len(found)), *heads]
