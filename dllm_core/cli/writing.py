"""The commands `sample` and `infill`: one cell writes, before one's eyes where there is a terminal."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dllm_core.cli.cells import Cell
from dllm_core.cli.gaps import Gapped, encode, row_of_prompt, split
from dllm_core.cli.settings import Request, Settings
from dllm_core.cli.spans import Span, Style
from dllm_core.cli.terminal import Region, Terminal
from dllm_core.errors import DllmError

if TYPE_CHECKING:
    from dllm_core.cli.loading import Decode, Loaded, Machine

PROMPT = "My fellow citizens, the state of our union is"
GAPPED = "My fellow {{2}}, the state of our {{1}} is strong, and {{6}} of the people."
"""What is written on and filled in where nothing was given."""


def sample(cell: Cell, prompt: str, options: Namespace) -> None:
    """Write on from a prompt.

    Args:
        cell: who writes.
        prompt: on from what.
        options: as they were parsed.

    Raises:
        DllmError: a setting that the cell does not have, or an empty prompt.
    """
    with ExitStack() as stack:
        held, request, machine = _loaded(stack, cell, options)
        from dllm_core.cli.loading import prompt_ids

        ids_L = prompt_ids(prompt, held.method.tokenizer, chat=options.chat)
        row = row_of_prompt(ids_L, request.config.max_new_tokens)
        done = _write(held, row, request, options)
        _tell(held, done, request, machine)


def infill(cell: Cell, text: str, options: Namespace) -> None:
    """Fill in the gaps of a text.

    Args:
        cell: who fills in.
        text: with gaps, see `dllm_core.cli.gaps`.
        options: as they were parsed.

    Raises:
        DllmError: a cell that cannot, a setting that it does not have, or no gap.
    """
    parts = split(text)
    with ExitStack() as stack:
        held, request, machine = _loaded(stack, cell, options, fills_gaps=True)
        row = encode(parts, held.method.tokenizer)
        done = _write(held, row, request, options)
        terminal = Terminal()
        for (start, stop), piece in zip(row.gaps, _pieces(held, row, done)[1::2], strict=True):
            terminal.note(f"{{{{{stop - start}}}}} {piece!r}")
        _tell(held, done, request, machine)


def _loaded(
    stack: ExitStack, cell: Cell, options: Namespace, *, fills_gaps: bool = False
) -> tuple[Loaded, Request, Machine]:
    """Return a cell in memory, which leaves it with the stack, how it is asked, and what it computes on."""
    with Terminal().waiting(f"loading {cell.name} ..."):
        from dllm_core.cli.loading import Machine, accepted_arguments, loaded

        accepted = accepted_arguments(cell)
        if fills_gaps and "infill_mask" not in accepted:
            way = "writes token by token" if cell.kind == "ar" else "writes from latents"
            raise DllmError(
                f"'{cell.name}' {way} and cannot fill in gaps.",
                "Take a cell that fills in masks, such as random_mask; sample writes on with any cell.",
            )
        request = Settings(vars(options)).request(cell, accepted)
        machine = Machine.choose(options.device, options.dtype, verify=options.verify)
        return stack.enter_context(loaded(cell, machine)), request, machine


def watched(held: Loaded, row: Gapped, request: Request, options: Namespace, terminal: Terminal, title: str) -> Decode:
    """Decode in view on a live terminal, and leave nothing of it there.

    Args:
        held: the cell.
        row: what is filled in.
        request: how.
        options: `drafts` and `pace` are read.
        terminal: a live one.
        title: of the view.
    """
    from dllm_core.cli.canvas_view import CanvasView
    from dllm_core.cli.loading import decode

    given = [not fill for fill in row.to_fill_L.tolist()]
    with Region(terminal) as region:
        view = CanvasView(
            terminal, region, held.detokenizer, given, title=title, drafts=options.drafts, pace=options.pace
        )
        view.start(row.ids_L.tolist())
        done = decode(held, row, request, view=view)
        region.erase()
    return done


def _write(held: Loaded, row: Gapped, request: Request, options: Namespace) -> Decode:
    from dllm_core.cli.loading import decode

    terminal = Terminal()
    if terminal.is_live:
        done = watched(held, row, request, options, terminal, held.cell.name)
    else:
        done = decode(held, row, request)
    terminal.text(*_spans(_pieces(held, row, done)))
    return done


def _pieces(held: Loaded, row: Gapped, done: Decode) -> list[str]:
    """Return the text in pieces, given and written in turn."""
    cuts = [place for gap in row.gaps for place in gap]
    return held.detokenizer.pieces(done.sequence, cuts)


def _spans(pieces: Sequence[str]) -> list[Span]:
    return [Span(piece, Style.WRITTEN if i % 2 else Style.PLAIN) for i, piece in enumerate(pieces)]


def _tell(held: Loaded, done: Decode, request: Request, machine: Machine) -> None:
    from dllm_core.cli.loading import facts
    from dllm_core.kernels.dispatch import announced

    terminal = Terminal()
    if terminal.is_live:
        terminal.lines([[]])
    terminal.note(f"{held.cell.name}: {', '.join(facts(done, request.config.seed))}")
    checked = " The reference decoder agreed at every pass." if request.config.verify else ""
    terminal.note(f"{machine}; one decode, no benchmark.{checked}")
    if drift := done.output.drift:
        terminal.note(
            f"Drift of the cache: {drift.changed_tokens} of {drift.num_tokens} drafts changed, largest difference of a "
            f"logit {drift.max_logit_difference:.2g}."
        )
    if ran := announced():
        terminal.note("; ".join(ran))
