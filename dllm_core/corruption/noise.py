"""Randomness keyed by (seed, sample id, epoch, stream).

The same sequence gets the same corruption whatever the batch size, the order of work, the number of workers or the
number of processes, since no generator is shared between samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.data.batch import Batch


@dataclass(frozen=True)
class NoiseSource:
    """A family of CPU generators, one per (sample id, epoch, stream).

    Attributes:
        seed: the run's seed.
    """

    seed: int

    def generator(self, sample_id: int, epoch: int, stream: str) -> torch.Generator:
        """Return a fresh generator for one sample; `stream` names what is drawn ("mask", "attempt 2", ...)."""
        key = f"{self.seed}/{sample_id}/{epoch}/{stream}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        return torch.Generator(device="cpu").manual_seed(seed)

    def uniform(self, batch: Batch, stream: str, size: tuple[int, ...] = ()) -> Tensor:
        """Return U(0, 1) draws of shape [B, *size], float32, on CPU; row b depends on row b's key alone."""
        rows = zip(batch.sample_ids, batch.epochs, strict=True)
        return torch.stack([torch.rand(size, generator=self.generator(s, e, stream)) for s, e in rows])

    def normal(self, batch: Batch, stream: str, size: tuple[int, ...]) -> Tensor:
        """Return N(0, 1) draws of shape [B, *size], float32, on CPU; row b depends on row b's key alone."""
        rows = zip(batch.sample_ids, batch.epochs, strict=True)
        return torch.stack([torch.randn(size, generator=self.generator(s, e, stream)) for s, e in rows])
