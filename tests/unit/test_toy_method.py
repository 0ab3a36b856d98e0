"""A new method is one room, in a directory of its own: found, trained, kept and loaded, nothing else touched."""

from pathlib import Path

import pytest
import torch

import dllm_core.methods
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.conversion import convert
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.methods.cell import load_cell, save_cell
from dllm_core.methods.protocol import Resources, SamplingRequest
from dllm_core.methods.registry import room_method, room_names, room_options
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, write_source

OPTIONS = """
from dllm_core.methods.requirements import Capabilities, RoomOptions


class Options(RoomOptions):
    width: int = 4

    def capabilities(self):
        return Capabilities(nelbo=True, unmasking=True)
"""

METHOD = '''
import torch
from torch import nn

from dllm_core.methods.protocol import LossOutput, Phase
from dllm_core.methods.single_network import gather_rows
from dllm_core.methods.toy_room.options import Options
from dllm_core.methods.token_space import TokenSpaceMethod
from dllm_core.corruption.masks import uniform_masks
from dllm_core.methods.protocol import Corrupted


class Method(TokenSpaceMethod):
    """Trains a low-rank correction of the states and nothing else."""

    def __init__(self, backbone, options):
        super().__init__(backbone, options)
        backbone.requires_grad_(False)
        self.down = nn.Linear(backbone.hidden_size, options.width, bias=False)
        self.up = nn.Linear(options.width, backbone.hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)
        self.steps_seen = 0

    def phases(self):
        return (Phase("warm", 0.5), Phase("hot", 0.5))

    def num_new_parameters(self):
        return sum(p.numel() for p in (*self.down.parameters(), *self.up.parameters()))

    def run(self, batch, input_ids_BL):
        states_BLD = super().run(batch, input_ids_BL)
        return states_BLD + self.up(self.down(states_BLD))

    def corrupt(self, batch, info, noise):
        masked_BL = uniform_masks(batch, noise)
        return Corrupted(batch, self.mask(batch, masked_BL), masked_BL)

    def totals(self, corrupted):
        return {"tokens": float(corrupted.masked_BL.sum())}

    def loss(self, corrupted, totals, info, resources):
        rows = self.predictor_rows(corrupted.masked_BL)
        logits = self.backbone.logits(gather_rows(self.run(corrupted.clean, corrupted.noisy_BL), rows))
        targets = corrupted.clean.input_ids_BL[corrupted.masked_BL]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum") / totals["tokens"]
        return LossOutput(loss, {"toy_nats": loss.detach()}, positions=corrupted.masked_BL.numel())

    def on_step_end(self, info):
        self.steps_seen += 1

    def save_pretrained(self, directory):
        super().save_pretrained(directory)
        torch.save({"down": self.down.state_dict(), "up": self.up.state_dict()}, directory / "toy.pt")

    @classmethod
    def from_pretrained(cls, directory, options, *, dtype, device):
        method = super().from_pretrained(directory, options, dtype=dtype, device=device)
        state = torch.load(directory / "toy.pt", weights_only=True)
        method.down.load_state_dict(state["down"])
        method.up.load_state_dict(state["up"])
        return method
'''


@pytest.fixture
def toy_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    room = tmp_path / "extra" / "toy_room"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text('"""A toy."""\n')
    (room / "options.py").write_text(OPTIONS)
    (room / "method.py").write_text(METHOD)
    monkeypatch.setattr(dllm_core.methods, "__path__", [*dllm_core.methods.__path__, str(room.parent)])
    return room


def test_a_toy_room_is_found_trained_kept_and_loaded(toy_room: Path, tmp_path: Path):
    assert "toy_room" in room_names()
    options = room_options("toy_room")(width=6)
    convert(write_source(tmp_path / "source"), tmp_path / "model", alignment="shifted")
    method = room_method("toy_room")(Backbone.from_pretrained(tmp_path / "model"), options)
    frozen = {name: p.clone() for name, p in method.backbone.named_parameters()}
    data, losses = random_sequences(8, 16, 4, NUM_TOKENS), []
    settings = TrainSettings(steps=30, batch_size=4, micro_batch_size=2, lr=0.03, checkpoint_every_s=None)
    result = Trainer(
        method,
        data,
        SampleOrder(8, 0),
        settings,
        Resources(),
        NoiseSource(0),
        tmp_path / "work",
        lambda row: losses.append(row["train/toy_nats"]),
        peak_flops=1e9,
    ).run()
    assert result.finished
    assert method.steps_seen == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.0
    assert all(torch.equal(p, frozen[name]) for name, p in method.backbone.named_parameters())

    save_cell(method, tmp_path / "cell", cell="toy", room="toy_room", seed=0, tokenizer_dir=tmp_path / "model")
    loaded = load_cell(tmp_path / "cell")
    batch = data.batch_of([0, 1])
    scores = [m.masked_nll(batch, batch.response_BL).nll_BL for m in (method, loaded)]
    assert torch.equal(*scores)
    assert loaded.num_new_parameters() == 2 * 6 * 32
    out = loaded.sample([batch.input_ids_BL[0, :4]], SamplingRequest(max_new_tokens=8, num_steps=4))
    assert out.new_tokens == [8]


def test_without_the_directory_the_room_is_unknown():
    assert "toy_room" not in room_names()
