"""What a grid will cost: parameters, time, memory, disk, and the smallest GPU that would do. Imports no torch.

Parameters, memory of the weights and disk are counted; times come from a table of achieved rates and are marked as
estimates wherever they are shown. One GB is 1e9 bytes, except for GPU sizes, which are named as they are sold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dllm_core.backbone.families import FAMILIES
from dllm_core.methods.requirements import BaseShape, NetworkCost
from steps.machine import Machine

GPU_SIZES_GB = (8, 12, 16, 24, 32, 48, 80, 141, 192)
USABLE = 0.92
"""Part of a GPU's memory that a process gets."""
PROCESS_BYTES = 0.7e9
"""torch, transformers and the tracker, before the first tensor."""
LOSS_CHUNK_BYTES = 0.25e9
"""Chunked logits and their gradient."""
ROW_MULTIPLE = 64
"""A converted vocabulary is padded to a multiple of this, after a row for the mask."""
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0}
TRAINED_BYTES = {"fp32": 16, "bf16": 18}
"""Of a trained parameter: weight, gradient and two moments in fp32; computing in bf16 keeps a copy of the weight."""
LARGEST_COPY = 2**31
"""Bytes of matrices up to which decoding on a CPU keeps them twice: as in `dllm_core.backbone.passes.quick_weights`,
which needs torch."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a decoder that its cost follows from.

    Attributes:
        family: `llama`, `qwen2`, `qwen3` or `gpt2`.
        layers, hidden, heads, kv_heads, head_dim, ffn: sizes.
        vocab: rows of the embedding.
        positions: longest sequence the model was made for.
        tied: input embedding and output head share one matrix.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    tied: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a config.json of one of the four families (a missing number is a KeyError)."""
        if config["model_type"] == "gpt2":
            hidden, heads = int(config["n_embd"]), int(config["n_head"])
            return cls(
                family="gpt2",
                layers=int(config["n_layer"]),
                hidden=hidden,
                heads=heads,
                kv_heads=heads,
                head_dim=hidden // heads,
                ffn=int(config.get("n_inner") or 4 * hidden),
                vocab=int(config["vocab_size"]),
                positions=int(config.get("n_positions", 1024)),
                tied=bool(config.get("tie_word_embeddings", True)),
            )
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            family=str(config["model_type"]),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            ffn=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            positions=int(config.get("max_position_embeddings", 2048)),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab * self.hidden

    @property
    def body(self) -> int:
        """Parameters of blocks and final norm."""
        d, f = self.hidden, self.ffn
        if self.family == "gpt2":
            return self.layers * (4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d) + 2 * d
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = d * (q + 2 * kv) + q * d + 3 * d * f + 2 * d
        block += {"qwen2": q + 2 * kv, "qwen3": 2 * self.head_dim}.get(self.family, 0)
        return self.layers * block + d

    @property
    def matrices(self) -> int:
        """Parameters of the blocks' matrices, without norms and biases."""
        per_position = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (per_position + (2 if self.family == "gpt2" else 3) * self.ffn)

    @property
    def parameters(self) -> int:
        """All parameters; a tied matrix counts once."""
        learned_positions = self.positions * self.hidden if self.family == "gpt2" else 0
        return self.body + self.embedding * (1 if self.tied else 2) + learned_positions

    def forward_flops(self, positions: float, length: int, head_rows: float) -> float:
        """FLOPs of a bidirectional forward: 2 per weight and position, attention, and the head on some rows."""
        attention = 4.0 * self.layers * self.heads * self.head_dim * length * positions
        return 2.0 * self.body * positions + attention + 2.0 * self.embedding * head_rows

    def teacher_flops(self, length: int) -> float:
        """FLOPs of the frozen model over one sequence of which hidden states are kept: no head."""
        return self.forward_flops(length, length, 0)

    def base(self, *, converted: bool, positions_per_response_token: float, length: int) -> BaseShape:
        """Return what rooms with networks of their own size them by.

        Args:
            converted: the mask row is there already.
            positions_per_response_token: length of a sequence over its response tokens.
            length: tokens of a sequence, prompt included.
        """
        vocab = self.vocab if converted else -(-(self.vocab + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
        return BaseShape(
            hidden=self.hidden,
            layers=self.layers,
            vocab=vocab,
            parameters=replace(self, vocab=vocab).parameters,
            positions_per_response_token=positions_per_response_token,
            length=length,
            attention_width=self.heads * self.head_dim,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak of training one row.

    Attributes:
        weights: compute weights, fp32 master copy, two Adam moments, gradients, and what is frozen.
        activations: kept for the backward pass of one micro-batch.
        rest: chunked logits and the process itself.
        per_parameter: bytes that a trained parameter stands for in `weights`.
        copies: matrices laid out a second time for what is written in between (`laid_out_bytes`).
    """

    weights: float
    activations: float
    rest: float
    per_parameter: int = 16
    copies: float = 0.0

    @property
    def total(self) -> float:
        """Sum in bytes."""
        return self.weights + self.activations + self.rest + self.copies

    def smallest_gpu_gb(self) -> int | None:
        """Return the smallest common GPU (GB) that holds it, or None when none does."""
        return next((size for size in GPU_SIZES_GB if self.total <= USABLE * size * 1e9), None)


def training_memory(
    shape: ModelShape, sequences: int, length: int, *, dtype: str, checkpointing: bool
) -> MemoryEstimate:
    """Estimate full fine-tuning with AdamW and fp32 master weights.

    Args:
        shape: the model.
        sequences: sequences of a micro-batch.
        length: positions that a sequence takes in a pass (`RoomOptions.training_positions`).
        dtype: compute dtype.
        checkpointing: activations are recomputed block by block.
    """
    per_parameter = TRAINED_BYTES[dtype]
    weights = per_parameter * shape.parameters
    positions = sequences * length
    size = DTYPE_BYTES[dtype]
    # per position and block: norms, q, k, v, attention output, two residuals (12 D) and gate, up, product, act (4 F)
    block = size * positions * (12 * shape.hidden + 4 * shape.ffn)
    kept = size * positions * shape.hidden if checkpointing else block
    activations = shape.layers * kept + (block if checkpointing else 0.0)
    rest = PROCESS_BYTES + LOSS_CHUNK_BYTES
    return MemoryEstimate(weights=weights, activations=activations, rest=rest, per_parameter=per_parameter)


def network_memory(network: NetworkCost, hidden: int, tokens: int, *, dtype: str) -> MemoryEstimate:
    """Estimate training networks of a room's own with AdamW.

    Weights are counted: a trained parameter takes 16 bytes in fp32 (weight, gradient, two moments), 18 in bf16 (the
    weight once more, as a copy); a frozen one 4, or 6 with its copy. Activations follow from the FLOPs: a block with
    16 D^2 weights keeps about 28 D values a token, hence 1.75 / D of the weights that a token meets (FLOPs / 6).
    A snapshot is in the compute dtype alone.

    Args:
        network: sizes.
        hidden: width of the base model, taken for that of the networks.
        tokens: response tokens of a micro-batch.
        dtype: compute dtype.
    """
    trained, frozen = TRAINED_BYTES[dtype], 6.0 if dtype == "bf16" else 4.0
    values = 1.75 * network.flops_per_response_token / 6.0 / hidden
    return MemoryEstimate(
        weights=trained * network.num_trainable + frozen * network.frozen + DTYPE_BYTES[dtype] * network.snapshot,
        activations=DTYPE_BYTES[dtype] * tokens * values,
        rest=PROCESS_BYTES + LOSS_CHUNK_BYTES,
        per_parameter=trained,
    )


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What one row costs on this machine, in seconds (estimates) and FLOPs.

    Attributes:
        steps: optimiser steps of its training (0: not trained).
        distinct: training sequences that it presents.
        train_flops: training, its auxiliary views and a live teacher included.
        teacher_flops: what it is charged for teacher states from the cache.
        train_s, evaluate_s, benchmark_s: wall time.
    """

    steps: int
    distinct: int
    train_flops: float
    teacher_flops: float
    train_s: float
    evaluate_s: float
    benchmark_s: float

    @property
    def total_s(self) -> float:
        """Sum of the three."""
        return self.train_s + self.evaluate_s + self.benchmark_s


def laid_out_bytes(shape: ModelShape, device: str, dtype: str) -> float:
    """Return bytes of the second copy of the model's matrices that decoding keeps beside them on a CPU, else 0.

    It is made at the first decode and stays as long as the model does. At most this much: a torch that cannot reorder
    weights makes none.

    Args:
        shape: the model.
        device: `cpu` or `cuda`.
        dtype: of the weights that decode.
    """
    size = DTYPE_BYTES[dtype] * (shape.matrices + shape.embedding)
    made = device == "cpu" and FAMILIES[shape.family].is_gated and size <= LARGEST_COPY
    return size if made else 0.0


def anchor_bytes(shape: ModelShape, sequences: int, rows: int, layers: int, dtype: str) -> float:
    """Disk of the anchor store: `rows` states a sequence and layer, with one fp32 scale a row in fp8 and int8."""
    scale = 4.0 if dtype in ("fp8", "int8") else 0.0
    return float(sequences) * layers * rows * (shape.hidden * DTYPE_BYTES[dtype] + scale)


def decode_seconds(
    shape: ModelShape, machine: Machine, *, length: int, new: int, steps: int, batch: int, dtype: str
) -> float:
    """Time of one decode by iterative unmasking: `steps` forwards of `length` tokens, head on the open rows."""
    flops = shape.forward_flops(batch * length, length, batch * new / 2)
    return steps * machine.seconds(flops, 1, dtype)


def ar_seconds(shape: ModelShape, machine: Machine, *, new: int, batch: int, dtype: str) -> float:
    """Time of one autoregressive decode: every token streams the weights once, or computes, whichever is slower."""
    streamed = shape.parameters * DTYPE_BYTES[dtype] / machine.bytes_per_s
    computed = machine.seconds(2.0 * shape.parameters * batch, 1, dtype)
    return new * max(streamed + machine.overhead_s, computed)
