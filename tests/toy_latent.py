"""A room without backbone, masks or bound, as a package on disk: what a latent row looks like from outside."""

from __future__ import annotations

from pathlib import Path

OPTIONS = """
from dllm_core.methods.requirements import AnchorNeed, Capabilities, Requirements, RoomOptions


class Options(RoomOptions):
    def requirements(self, num_layers):
        return Requirements(anchors=AnchorNeed(layers=("1",), positions="response", heldout=True))

    def capabilities(self):
        return Capabilities(diagnostics=True, latent=True)
"""

METHOD = '''
import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dllm_core.methods.protocol import GenerationOutput, Method as Base


class Method(Base):
    """Writes the prompt's first token over and over; its networks are one matrix."""

    def __init__(self, options, contract=None):
        super().__init__(None, options)
        self.contract = contract
        self.latents = nn.Linear(3, 3, bias=False)

    def corrupt(self, batch, info, noise):
        raise NotImplementedError

    totals = loss = corrupt

    def diagnose(self, batch, resources, noise):
        states = resources.anchors.states(batch.sequence_keys)
        return {
            "reconstruction_accuracy": states.mean(),
            "decode_accuracy_from_x0_hat": {0.2: 0.5, 0.4: float("nan")},
            "adaptive_bin_losses": [1.0, 2.0],
            "num_sequences_seen": len(batch),
            "grad": torch.is_grad_enabled(),
        }

    def sample(self, prompts, request, on_draft=None):
        new = request.max_new_tokens
        sequences = [torch.cat([p, p[:1].repeat(new)]) for p in prompts]
        return GenerationOutput(sequences, [new] * len(prompts), request.num_steps + 1, 0.1)

    def save_pretrained(self, directory):
        (directory / "config.json").write_text(json.dumps({"dllm": self.contract}))
        save_file(self.state_dict(), directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, directory, options, *, dtype, device):
        method = cls(options, json.loads((directory / "config.json").read_text())["dllm"])
        method.load_state_dict(load_file(directory / "model.safetensors"))
        return method.to(dtype=dtype, device=device)
'''


def write_room(directory: Path) -> Path:
    """Write the room `toy_latent` below `directory`; add that to `dllm_core.methods.__path__` to have it found."""
    room = directory / "toy_latent"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text('"""A toy."""\n')
    (room / "options.py").write_text(OPTIONS)
    (room / "method.py").write_text(METHOD)
    return directory
