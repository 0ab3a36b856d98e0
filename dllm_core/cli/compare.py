"""The command `compare`: all cells of a run and the reference rows write on from one prompt."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from dllm_core.cli.cells import Cell
from dllm_core.cli.gaps import row_of_prompt
from dllm_core.cli.settings import Settings
from dllm_core.cli.spans import Line, Span, Style, beside, padded, width, wrap
from dllm_core.cli.terminal import Terminal
from dllm_core.cli.writing import watched
from dllm_core.errors import DllmError

if TYPE_CHECKING:
    from dllm_core.cli.loading import Decode, Machine
    from dllm_core.cli.settings import Request

NOTE = "One timing each, after one decode to warm up: not a benchmark. The run's report has those, with intervals."
_NARROWEST, _GAP = 34, 3
_HEADER = ("cell", "tok/s", "NFE", "tok/forward", "seconds", "tokens")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one cell wrote, or why it did not.

    Attributes:
        cell: its name.
        method: its room.
        text: what it wrote, without the prompt.
        tokens: of that.
        seconds: it took; the second decode, nothing drawn.
        tokens_per_s: of that decode.
        passes: of all networks (NFE).
        tokens_per_forward: tokens over passes.
        left_out: flags that the cell does not have.
        error: the two lines of a refusal; None where it wrote.
    """

    cell: str
    method: str
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    passes: int = 0
    tokens_per_forward: float = 0.0
    left_out: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class _Job:
    """What all cells are asked; the terminal is None where JSON is wanted."""

    prompt: str
    machine: Machine
    options: Namespace
    terminal: Terminal | None


def compare(cells: Sequence[Cell], prompt: str, options: Namespace) -> int:
    """Let every cell write on from a prompt and show the texts side by side, then a table.

    One cell is in memory at a time. Each decodes twice: the first warms up, and is what a terminal shows; the second is
    timed.

    Args:
        cells: who writes.
        prompt: on from what.
        options: as they were parsed.

    Returns:
        1 where a cell could not, else 0.

    Raises:
        DllmError: an empty prompt, or a value that no cell would take.
    """
    cells = _told_apart(cells)
    terminal = None if options.json else Terminal()
    with _waiting(terminal, "loading ..."):
        from dllm_core.cli.loading import Machine, accepted_arguments

        settings = Settings(vars(options))
        requests = [settings.request(cell, accepted_arguments(cell), leave_out=True) for cell in cells]
        job = _Job(prompt, Machine.choose(options.device, options.dtype, verify=options.verify), options, terminal)
    if terminal:
        terminal.text(Span(prompt))
        terminal.lines([[]])
    rows = list[Row]()
    for cell, request in zip(cells, requests, strict=True):
        rows.append(_row(cell, request, job, f"{cell.name} ({len(rows) + 1} of {len(cells)})"))
        if terminal:
            _show_band(rows, len(cells), terminal)
    if terminal:
        terminal.lines(_table(rows, terminal.full_columns if terminal.is_live else inf))
        for line in _remarks(rows, job):
            terminal.note(line)
    else:
        told = {"prompt": prompt, "seed": options.seed or 0, "machine": str(job.machine), "note": NOTE}
        print(json.dumps({**told, "cells": [asdict(row) for row in rows]}, indent=1))
    return int(any(row.error for row in rows))


def _waiting(terminal: Terminal | None, what: str) -> AbstractContextManager[None]:
    return nullcontext() if terminal is None else terminal.waiting(what)


def _told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with names of their own: one cell of two runs, given by its paths, has the same in both."""
    seen, apart = Counter[str](), list[Cell]()
    for cell in cells:
        seen[cell.name] += 1
        apart.append(replace(cell, name=f"{cell.name} {seen[cell.name]}") if seen[cell.name] > 1 else cell)
    return apart


def columns_at_once(columns: int) -> int:
    """Return how many texts stand side by side."""
    return max(1, (columns + _GAP) // (_NARROWEST + _GAP))


def _row(cell: Cell, request: Request, job: _Job, title: str) -> Row:
    """Let one cell write; it is in memory no longer than this runs."""
    from dllm_core.cli.loading import decode, has_chat_template, loaded, prompt_ids

    try:
        with ExitStack() as stack:
            with _waiting(job.terminal, f"loading {title} ..."):
                held = stack.enter_context(loaded(cell, job.machine))
            chat = job.options.chat and has_chat_template(held.method.tokenizer)
            if job.options.chat and not chat:
                request = replace(request, left_out=(*request.left_out, "--chat (no chat template)"))
            ids_L = prompt_ids(job.prompt, held.method.tokenizer, chat=chat)
            row = row_of_prompt(ids_L, request.config.max_new_tokens)
            if job.terminal is not None and job.terminal.is_live:
                watched(held, row, request, job.options, job.terminal, title)
            else:
                decode(held, row, request)
            done = decode(held, row, request)
            text = held.detokenizer.pieces(done.sequence, [len(ids_L)])[1]
            return _written(cell, request, done, text)
    except DllmError as error:
        return Row(cell=cell.name, method=cell.info.method, left_out=request.left_out, error=str(error))


def _written(cell: Cell, request: Request, done: Decode, text: str) -> Row:
    return Row(
        cell=cell.name,
        method=cell.info.method,
        text=text,
        tokens=done.tokens,
        seconds=done.seconds,
        tokens_per_s=done.tokens_per_s,
        passes=done.output.num_forwards,
        tokens_per_forward=done.output.tokens_per_forward,
        left_out=request.left_out,
    )


def _show_band(rows: Sequence[Row], total: int, terminal: Terminal) -> None:
    """Print the last texts side by side once there are enough of them, or no more to come."""
    at_once = columns_at_once(terminal.full_columns)
    if len(rows) % at_once == 0 or len(rows) == total:
        start = (len(rows) - 1) // at_once * at_once
        terminal.lines(_blocks(rows[start:], terminal.full_columns, at_once))


def _blocks(rows: Sequence[Row], columns: int, at_once: int) -> list[Line]:
    """Return the texts of some rows, side by side where they fit, with an empty line below."""
    each = min((columns - _GAP * (at_once - 1)) // at_once, 100)
    blocks = []
    for row in rows:
        speed = "" if row.error else f"  {row.tokens_per_s:,.0f} tokens/s"
        head = [Span(row.cell, Style.TITLE), Span(speed, Style.NOTE)]
        blocks.append([head, *wrap([_body(row)], each)])
    return [*beside(blocks, each, _GAP), []]


def _body(row: Row) -> Span:
    if row.error:
        return Span(row.error, Style.WRONG)
    text = row.text.strip()
    return Span(text, Style.WRITTEN) if text else Span("(white space alone)", Style.NOTE)


def _table(rows: Sequence[Row], columns: float) -> list[Line]:
    """Return the figures of all rows, as many columns of them as fit into the width."""
    cells = [_HEADER, *(_figures(row) for row in rows)]
    widths = [max(width(line[k]) for line in cells) for k in range(len(_HEADER))]
    while len(widths) > 2 and sum(widths) + 2 * (len(widths) - 1) > columns:
        widths.pop()
    cells = [line[: len(widths)] for line in cells]
    lines = []
    for i, line in enumerate(cells):
        style = Style.NOTE if i == 0 else Style.PLAIN
        name = padded([Span(line[0], Style.NOTE if i == 0 else Style.TITLE)], widths[0])
        numbers = [Span(f"  {text:>{wide}}", style) for text, wide in zip(line[1:], widths[1:], strict=True)]
        lines.append([*name, *numbers])
    return [*lines, []]


def _figures(row: Row) -> tuple[str, ...]:
    if row.error:
        return (row.cell, *["-"] * (len(_HEADER) - 1))
    return (
        row.cell,
        f"{row.tokens_per_s:,.0f}",
        str(row.passes),
        f"{row.tokens_per_forward:.1f}",
        f"{row.seconds:.2f}",
        str(row.tokens),
    )


def _remarks(rows: Sequence[Row], job: _Job) -> list[str]:
    without: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.left_out:
            without.setdefault(row.left_out, []).append(row.cell)
    left_out = [f"Not applied: {', '.join(flags)} to {', '.join(cells)}." for flags, cells in without.items()]
    return [*left_out, f"{job.machine}, seed {job.options.seed or 0}. {NOTE}"]
