"""A converted model of a named shape with random weights, made in memory where it runs: no download, no file.

Speed depends on shapes alone. What conversion adds is there: a mask row above the real tokens, the table padded to a
multiple of 64, attention in both directions.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.decode_models import Models, block_causal
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import Contract
from dllm_core.backbone.conversion import ROW_MULTIPLE

SHAPES: dict[str, dict[str, int]] = {
    "qwen3_1_7b": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 301,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    },
}
"""`qwen3_1_7b`: the config.json of Qwen/Qwen3-1.7B, with fewer positions; `tiny` is for smoke runs."""
WEIGHTS_NOTE = "random weights of the shape: speed only, the tokens mean nothing"


def random_model(shape: str, device: torch.device, dtype: torch.dtype, seed: int, *, rows: int) -> Any:
    """Return a causal model as transformers makes it, with an embedding of `rows` rows; the same for the same seed."""
    config = Qwen3Config(
        **{**SHAPES[shape], "vocab_size": rows},
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def padded_rows(shape: str) -> int:
    """Return the rows of the converted table: real tokens, the mask token, padding."""
    return -(-(SHAPES[shape]["vocab_size"] + 1) // ROW_MULTIPLE) * ROW_MULTIPLE


def random_backbone(shape: str, device: torch.device, dtype: torch.dtype, seed: int) -> Backbone:
    """Return a backbone of a named shape under the shifted contract."""
    num_tokens = SHAPES[shape]["vocab_size"]
    contract = Contract(mask_token_id=num_tokens, num_tokens=num_tokens)
    return Backbone(random_model(shape, device, dtype, seed, rows=padded_rows(shape)), contract).to(device)


class RandomModels(Models):
    """The models of the decoding benchmark, random in place of loaded.

    Args:
        shape: a key of `SHAPES`.
        device: of the weights.
        dtype: of the weights.
        seed: of the weights and the prompts.
        model_block: block size of the block-causal part.
    """

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype, seed: int, model_block: int) -> None:
        super().__init__(Path(shape), dtype, device.type, seed, model_block)
        self.shape, self.where = shape, device

    @cached_property
    def backbone(self) -> Backbone:
        """The library's model."""
        return random_backbone(self.shape, self.where, self.dtype, self.seed)

    @cached_property
    def compiled(self) -> Backbone:
        """The same with its decoder compiled."""
        backbone = random_backbone(self.shape, self.where, self.dtype, self.seed)
        backbone.decoder.compile(dynamic=False)
        return backbone

    @cached_property
    def plain(self) -> Any:
        """The converted model as transformers has it."""
        return random_model(self.shape, self.where, self.dtype, self.seed, rows=padded_rows(self.shape))

    @cached_property
    def base(self) -> Any:
        """The base model behind it: causal, without the rows that conversion added."""
        model = random_model(self.shape, self.where, self.dtype, self.seed, rows=padded_rows(self.shape))
        model.resize_token_embeddings(SHAPES[self.shape]["vocab_size"], mean_resizing=False)
        return model.eval()

    def in_blocks_fp32(self) -> Backbone:
        """Return a block-causal model of the shape in fp32; not kept."""
        return block_causal(random_backbone(self.shape, self.where, torch.float32, self.seed), self.model_block)
