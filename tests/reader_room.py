"""A toy room that reads the teacher's states and trains a network of its own: no backbone in memory, ever.

`install` puts it beside the real rooms under the name `reader`; `reader_cell` is a cell of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dllm_core.methods
from params.schema import CellSpec, GridSpec

OPTIONS = """
from dllm_core.methods.requirements import AnchorNeed, Capabilities, NetworkCost, Requirements, RoomOptions


class Options(RoomOptions):
    layer: str = "1"
    positions: str = "response"
    heldout: bool = True
    sequences: int | None = None
    cell: str | None = None

    def requirements(self, num_layers):
        need = AnchorNeed(
            layers=(self.layer,),
            positions=self.positions,
            heldout=self.heldout,
            sequences=self.sequences,
            cell=self.cell,
        )
        return Requirements(anchors=need)

    def capabilities(self):
        return Capabilities(diagnostics=True, latent=True)

    def network(self, base):
        probe = base.hidden * base.vocab
        modules = {"probe": probe, "bias": base.vocab}
        return NetworkCost(trainable=modules, frozen=7, flops_per_response_token=6.0 * probe)
"""

METHOD = '''
import json
import shutil

import torch
from torch import nn

from dllm_core.methods.protocol import Corrupted, GenerationOutput, LossOutput
from dllm_core.methods.protocol import Method as Protocol


class Method(Protocol):
    """Reads tokens off the states of one layer."""

    def __init__(self, backbone, options, base=None):
        super().__init__(backbone, options)
        self.base = base
        config = json.loads((base / "config.json").read_text())
        self.probe = nn.Linear(config["hidden_size"], config["vocab_size"])
        self.register_buffer("mean_D", torch.zeros(config["hidden_size"]))

    @classmethod
    def from_base(cls, directory, options, *, device, dtype=torch.float32):
        return cls(None, options, directory).to(device, dtype)

    def prepare(self, sequences, samples, resources):
        states_MD, _ = self._states(sequences.batch_of(samples), resources)
        self.mean_D.copy_(states_MD.mean(0))

    def select_samples(self, order, info):
        start = info.step * info.batch_size
        return [order.looped(i, self.options.sequences) for i in range(start, start + info.batch_size)]

    def corrupt(self, batch, info, noise):
        return Corrupted(batch, batch.input_ids_BL, batch.response_BL)

    def totals(self, corrupted):
        return {"tokens": float(corrupted.masked_BL.sum())}

    def _states(self, batch, resources):
        rows = [row_L.nonzero().flatten() for row_L in batch.response_BL]
        layer = self.options.layer
        states_MD = resources.anchors.gather(batch.sequence_keys, [layer], rows)[layer].float()
        return states_MD, batch.input_ids_BL[batch.response_BL]

    def loss(self, corrupted, totals, info, resources):
        states_MD, targets_M = self._states(corrupted.clean, resources)
        logits_MV = self.probe((states_MD - self.mean_D).to(self.probe.weight.dtype)).float()
        loss = nn.functional.cross_entropy(logits_MV, targets_M, reduction="sum") / totals["tokens"]
        flops = 6.0 * self.probe.weight.numel() * len(targets_M)
        return LossOutput(loss, {}, flops=flops, positions=len(targets_M))

    def diagnose(self, batch, resources, noise):
        states_MD, targets_M = self._states(batch, resources)
        return {"accuracy": float((self.probe(states_MD - self.mean_D).argmax(1) == targets_M).float().mean())}

    def sample(self, prompts, request, on_draft=None):
        sequences = [torch.cat([p, p.new_ones(request.max_new_tokens)]) for p in prompts]
        return GenerationOutput(sequences, [request.max_new_tokens] * len(prompts), 1, 0.0)

    def save_pretrained(self, directory):
        shutil.copy(self.base / "config.json", directory)
        torch.save(self.state_dict(), directory / "reader.pt")

    @classmethod
    def from_pretrained(cls, directory, options, *, dtype, device):
        method = cls(None, options, directory).to(device, dtype)
        method.load_state_dict(torch.load(directory / "reader.pt", weights_only=True))
        return method
'''


def install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the room below `root` and let it be found there."""
    room = root / "rooms" / "reader"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text('"""A toy."""\n')
    (room / "options.py").write_text(OPTIONS)
    (room / "method.py").write_text(METHOD)
    monkeypatch.setattr(dllm_core.methods, "__path__", [*dllm_core.methods.__path__, str(room.parent)])


def reader_cell(name: str = "reader", **options: Any) -> CellSpec:
    """Return a cell of the room."""
    return CellSpec(name=name, method="reader", options=options)


def with_cells(spec: GridSpec, *cells: CellSpec) -> GridSpec:
    """Return the grid with more cells."""
    return spec.model_copy(update={"cells": (*spec.cells, *cells)})
