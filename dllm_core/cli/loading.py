"""One cell in memory, and one decode of it with its time."""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from dllm_core import hardware
from dllm_core.cli.cells import Cell
from dllm_core.cli.detokenizer import Detokenizer
from dllm_core.cli.settings import Request, in_flags
from dllm_core.data.encoding import bos_of
from dllm_core.errors import DllmError
from dllm_core.methods.cell import load_cell
from dllm_core.methods.registry import room_method
from dllm_core.samplers.config import DiffusionGenerationConfig

if TYPE_CHECKING:
    from dllm_core.cli.canvas_view import CanvasView
    from dllm_core.cli.gaps import Gapped
    from dllm_core.methods.protocol import GenerationOutput, Method

_WARM_UP = DiffusionGenerationConfig(max_new_tokens=2, max_denoising_steps=2)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """What cells compute on.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: `fp32` or `bf16`.
    """

    device: torch.device
    dtype: str

    @classmethod
    def choose(cls, device: str, dtype: str, *, verify: bool = False) -> Machine:
        """Resolve `auto`: a GPU where there is one; bf16 where products of it are the faster ones, measured now.

        Args:
            device: `auto`, `cpu` or `cuda`.
            dtype: `auto`, `fp32` or `bf16`.
            verify: decoders will be compared, for which bf16 has too few digits: `auto` is fp32.

        Raises:
            DllmError: a GPU was asked for and there is none.
        """
        try:
            where = hardware.device(device)
        except DllmError as error:
            raise in_flags(error) from error
        if dtype == "auto" and verify:
            dtype = "fp32"
        elif dtype == "auto":
            rates = {name: hardware.peak_flops(where.type, kind) for name, kind in _DTYPES.items()}
            dtype = max(rates, key=lambda name: rates[name])
        return cls(where, dtype)

    def __str__(self) -> str:
        return f"{self.dtype} on {self.device.type}"


@dataclass(frozen=True)
class Loaded:
    """A cell in memory.

    Attributes:
        cell: which.
        method: the model.
        detokenizer: of its tokenizer.
    """

    cell: Cell
    method: Method
    detokenizer: Detokenizer


@contextmanager
def loaded(cell: Cell, machine: Machine) -> Iterator[Loaded]:
    """Hold a cell in memory for the length of a `with` block, warmed up by two tokens: a first call has to import."""
    logging.set_verbosity_error()  # it warns of configs that are not its own, as those of latent cells
    method = load_cell(cell.directory, dtype=_DTYPES[machine.dtype], device=machine.device)
    try:
        _generate(method, cell.name, torch.tensor([0]), _WARM_UP)
        yield Loaded(cell, method, Detokenizer(method.tokenizer))
    finally:
        del method
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def accepted_arguments(cell: Cell) -> set[str]:
    """Return the names of the arguments that a cell's `generate` takes; nothing is loaded."""
    generate = getattr(room_method(cell.info.method), "generate", None)
    return set() if generate is None else set(inspect.signature(generate).parameters)


def _generate(held: Method, name: str, ids_L: Tensor, config: DiffusionGenerationConfig, **arguments: Any) -> Any:
    generate: Any = getattr(held, "generate", None)
    if generate is None:
        raise DllmError(f"The method of '{name}' has no 'generate'.", "Take another cell.")
    return generate([ids_L], config, **arguments)


def prompt_ids(prompt: str, tokenizer: Any, *, chat: bool = False) -> Tensor:
    """Tokenise a prompt as the training data were: BOS first where the tokenizer puts one, nothing behind.

    Args:
        prompt: text to go on with; with `chat`, what the user says.
        tokenizer: of transformers.
        chat: put the prompt into the tokenizer's chat template.

    Raises:
        DllmError: an empty prompt, or no chat template.
    """
    if not prompt:
        raise DllmError("The prompt is empty.", "Give some text to go on with.")
    if not chat:
        bos = bos_of(tokenizer)
        return torch.tensor(
            [*([] if bos is None else [bos]), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        )
    if not has_chat_template(tokenizer):
        raise DllmError("The cell's tokenizer has no chat template.", "Leave --chat out: the prompt is then continued.")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a prompt can be put into the turns of a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


@dataclass(frozen=True)
class Decode:
    """One decode.

    Attributes:
        output: what `generate` returned.
        seconds: it took, without drawing.
    """

    output: GenerationOutput
    seconds: float

    @property
    def tokens(self) -> int:
        return self.output.new_tokens[0]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def sequence(self) -> list[int]:
        """The tokens, prompt included."""
        ids: list[int] = self.output.sequences[0].tolist()
        return ids


def decode(held: Loaded, row: Gapped, request: Request, *, view: CanvasView | None = None) -> Decode:
    """Generate and time it.

    Args:
        held: the cell.
        row: what is filled in. With one gap at its end it is a prompt, which every cell can write on from.
        request: how.
        view: draws the canvas after each pass, where the cell can show it.

    Raises:
        DllmError: what the cell refuses, in the words of the command line.
    """
    arguments: dict[str, Any] = dict(request.arguments)
    ids_L = row.ids_L
    if row.is_prompt:
        ids_L = ids_L[: row.gaps[0][0]]
    else:
        arguments["infill_mask"] = [row.to_fill_L]
    if view is not None and "on_draft" in accepted_arguments(held.cell):
        arguments["on_draft"] = view.on_draft
    before = view.seconds if view else 0.0
    start = time.perf_counter()
    try:
        output = _generate(held.method, held.cell.name, ids_L, request.config, **arguments)
    except DllmError as error:
        raise in_flags(error) from error
    seconds = time.perf_counter() - start
    return Decode(output, seconds - (view.seconds - before if view else 0.0))


def facts(done: Decode, seed: int) -> Sequence[str]:
    """Return what is told of a decode, a phrase each."""
    return (
        f"{done.tokens} tokens in {done.seconds:.2f} s",
        f"{done.tokens_per_s:,.0f} tokens/s",
        f"{done.output.num_forwards} passes (NFE)",
        f"{done.output.tokens_per_forward:.1f} tokens per forward",
        f"seed {seed}",
    )
