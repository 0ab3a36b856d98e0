"""What the tests of the measuring steps share: a tiny converted model with random text, and a cell made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.conversion import convert
from dllm_core.backbone.identity import model_identity
from dllm_core.methods.cell import save_cell
from dllm_core.methods.registry import room_method
from dllm_core.methods.requirements import RoomOptions
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS


@dataclass(frozen=True)
class Model:
    """What the measuring steps read of a ModelArtifact."""

    path: str
    identity: str
    num_tokens: int = NUM_TOKENS
    num_layers: int = 2


@dataclass(frozen=True)
class Data:
    """What they read of a DataArtifact."""

    train_dir: str
    heldout_dir: str
    fingerprint: str


@dataclass(frozen=True)
class Trained:
    """What they read of a TrainedCell."""

    cell_dir: str


def model_and_data(directory: Path, source: Path) -> tuple[Model, Data]:
    """Convert a model and write 6 training and 6 held-out sequences of 8 + 16 tokens."""
    convert(source, directory / "model", alignment="shifted")
    for name, seed in (("train", 0), ("heldout", 1)):
        random_sequences(6, 24, 8, NUM_TOKENS, seed).save(directory / name)
    model = Model(str(directory / "model"), model_identity(directory / "model"))
    return model, Data(str(directory / "train"), str(directory / "heldout"), "data-1")


def moved_cell(model: Model, directory: Path, room: str, options: RoomOptions, nudge: float) -> Trained:
    """Save the base model, slightly moved, as a finished cell named by its directory."""
    backbone = Backbone.from_pretrained(model.path)
    for parameter in backbone.parameters():
        parameter.data += nudge
    method = room_method(room)(backbone, options)
    save_cell(method, directory, cell=directory.name, room=room, seed=0, tokenizer_dir=Path(model.path))
    return Trained(str(directory))
