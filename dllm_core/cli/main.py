"""Entry point: which command, which cell, which text; errors in two lines, exit codes. Loads torch when it must."""

from __future__ import annotations

import io
import os
import stat
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from dllm_core.cli import cells
from dllm_core.cli.arguments import USAGE, parse
from dllm_core.cli.cells import Cell
from dllm_core.errors import DllmError

_BAD_INPUT, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0 done, 1 a cell could not, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    _print_anything()
    try:
        return _run(parse(given))
    except DllmError as error:
        print(f"error: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted" if sys.stderr.isatty() else "interrupted", file=sys.stderr)  # behind the terminal's ^C
        return _INTERRUPTED
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print_anything() -> None:
    """Have a stream that knows few characters print something in place of the others, whatever a model writes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")


def _run(options: Namespace) -> int:
    runs_dir: Path = options.runs_dir or cells.default_runs_dir()
    if options.command == "compare":
        from dllm_core.cli.compare import compare
        from dllm_core.cli.writing import PROMPT

        prompt = _text(options.words, "compare")
        return compare(_wanted(options.cells, runs_dir), PROMPT if prompt is None else prompt, options)
    from dllm_core.cli import writing

    cell, text = _cell_and_text(options, runs_dir)
    if options.command == "sample":
        writing.sample(cell, writing.PROMPT if text is None else text, options)
    else:
        writing.infill(cell, writing.GAPPED if text is None else text, options)
    return 0


def _wanted(names: str | None, runs_dir: Path) -> list[Cell]:
    if names is None:
        return cells.every_cell(runs_dir)
    return [cells.find(name.strip(), runs_dir) for name in names.split(",")]


def _cell_and_text(options: Namespace, runs_dir: Path) -> tuple[Cell, str | None]:
    """Tell a cell from a text: a word without white space is a cell unless it stands in second place."""
    words: list[str] = options.words
    first_is_cell = bool(words) and words[0] != "-" and (not any(map(str.isspace, words[0])) or cells.is_cell(words[0]))
    if options.command == "infill" and words and "{{" in words[0]:
        first_is_cell = False
    if not first_is_cell:
        return cells.first_unmasking(runs_dir), _text(words, options.command)
    try:
        cell = cells.find(words[0], runs_dir)
    except DllmError as error:
        if len(words) > 1 or not error.problem.startswith("Unknown cell"):
            raise
        raise DllmError(error.problem, f"{error.remedy} A text of one word goes after a cell.") from error
    return cell, _text(words[1:], options.command)


def _text(words: Sequence[str], command: str) -> str | None:
    """Return the text that was given, from a pipe where none was; None where nothing is there.

    Raises:
        DllmError: several texts, or bytes that are no text.
    """
    if len(words) > 1:
        raise DllmError(
            f"One argument too many: {words[1]!r}.", f'Quote a text of several words: {command} CELL "several words".'
        )
    if words and words[0] != "-":
        return _decoded(words[0])
    if not words and not _is_pipe():
        return None
    found = _decoded(sys.stdin.read()).rstrip("\n")
    return found if found or words else None  # a pipe that nobody asked for may be empty


def _decoded(text: str) -> str:
    """Return text; bytes that the locale could not decode are decoded as UTF-8.

    Raises:
        DllmError: they are none.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # Python keeps such bytes as lone surrogates
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise DllmError(
            "The text is not UTF-8.", "Convert it first: iconv -f latin1 -t utf-8 FILE, or whatever it is in."
        ) from error


def _is_pipe() -> bool:
    """Whether standard input is a pipe or a file: what an empty terminal, or nothing at all, is not."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
