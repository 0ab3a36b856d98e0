"""The models that decoding is timed with: one set of converted weights, loaded in the ways that the rows need."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import ar_loops
from dllm_core.backbone import conversion, sources
from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource


def converted(source: str, workdir: Path, seed: int) -> tuple[Path, bool]:
    """Return a converted directory for a source, and whether it had to be converted here (hence is untrained)."""
    path = Path(source)
    if path.is_dir() and "dllm" in sources.read_config(path):
        return path, False
    location = sources.resolve(source)
    name = "-".join(part for part in source.replace(":", "/").split("/") if part not in ("", ".", ".."))
    target = workdir / name
    if not (target / "config.json").exists():
        plain = location.path
        if location.kind == "gguf":
            from dllm_core.backbone.gguf import convert_gguf

            plain = workdir / f"{name}-plain"
            convert_gguf(location.path, plain, location.sha256)
        conversion.convert(plain, target, alignment="shifted", seed=seed)
    return target, True


def block_causal(backbone: Backbone, block_size: int) -> Backbone:
    """Return a view of a backbone, weights shared, that decodes in blocks which see nothing of later ones."""
    fields = {"attention": "block_causal", "block_size": block_size}
    return Backbone(backbone.model, backbone.contract.model_copy(update=fields))


class Models:
    """What the rows run, loaded when it is first asked for.

    Args:
        directory: a converted checkpoint.
        dtype: of the weights.
        device: of the weights.
        seed: keys the prompts.
        model_block: block size that a model without blocks is given in the block-causal part.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: str, seed: int, model_block: int) -> None:
        self.directory, self.dtype, self.device, self.seed = directory, dtype, device, seed
        self.model_block = model_block

    @cached_property
    def backbone(self) -> Backbone:
        """The library's model."""
        return Backbone.from_pretrained(self.directory, dtype=self.dtype, device=self.device)

    @cached_property
    def plain(self) -> Any:
        """The converted model as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(str(self.directory), dtype=self.dtype).to(self.device).eval()

    @cached_property
    def base(self) -> Any:
        """The base model behind it, left to right."""
        return ar_loops.base_model(self.directory, self.dtype, self.device)

    @cached_property
    def base_compiled(self) -> Any:
        """Its forward pass, compiled; for single tokens and a cache of fixed shape."""
        return torch.compile(self.base, dynamic=False)

    @cached_property
    def base_graphs(self) -> Any:
        """Its forward pass, compiled and replayed as CUDA graphs."""
        return torch.compile(self.base, dynamic=False, mode="reduce-overhead")

    @cached_property
    def in_blocks(self) -> Backbone:
        """The library's model as a block-causal one."""
        return self._as_block_causal(self.backbone)

    def in_blocks_fp32(self) -> Backbone:
        """Return the same in fp32; not kept."""
        return self._as_block_causal(Backbone.from_pretrained(self.directory, device=self.device))

    def _as_block_causal(self, backbone: Backbone) -> Backbone:
        if backbone.contract.attention == "block_causal":
            return backbone
        return block_causal(backbone, self.model_block)

    def prompts(self, index: int, batch: int, length: int) -> list[Tensor]:
        """Return the prompts of a round: random real tokens, since speed does not depend on them."""
        rows, high = range(index * batch, (index + 1) * batch), self.backbone.contract.num_tokens
        noise = NoiseSource(self.seed)
        draws = [noise.generator(row, 0, "benchmark prompt") for row in rows]
        return [torch.randint(high, (length,), generator=g) for g in draws]
