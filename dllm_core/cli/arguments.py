"""The command line's grammar. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dllm_core.cli.settings import SETTINGS
from dllm_core.errors import DllmError, did_you_mean

COMMANDS = {
    "sample": "write on from a prompt, with one cell",
    "infill": "fill in the gaps of a text: The {{2}} of the union",
    "compare": "let all cells of the run write on from one prompt",
}
USAGE = "\n".join(
    [
        "usage: python -m dllm_core COMMAND ...    try the finished cells of the latest run",
        "",
        *(f"  {name:<9} {what}" for name, what in COMMANDS.items()),
        "",
        "python -m dllm_core COMMAND --help says more.",
    ]
)
_NOT_FOR = {"infill": {"new_tokens"}, "compare": {"drift"}}


class _Parser(argparse.ArgumentParser):
    """Refuses in the two lines of the house."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving.

        Raises:
            DllmError: always.
        """
        message = message.removeprefix("argument ")
        raise DllmError(f"{message[:1].upper()}{message[1:]}.", f"{self.prog} --help lists what there is.")


_WITHOUT = "(default: what a pipe brings, else an example; '-': what a pipe brings)"


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    parser = _Parser(prog=f"python -m dllm_core {command}", description=COMMANDS[command], allow_abbrev=False)
    if command == "compare":
        parser.add_argument("words", nargs="*", metavar="PROMPT", help="text to go on with " + _WITHOUT)
        parser.add_argument("--cells", metavar="A,B", help="some of the run's cells, in this order (all)")
        parser.add_argument("--json", action="store_true", help="print JSON alone")
    else:
        what = "TEXT" if command == "infill" else "PROMPT"
        parser.add_argument(
            "words",
            nargs="*",
            metavar=f"[CELL] [{what}]",
            help="CELL: a cell of the run, or its directory (default: the first that fills in masks); "
            + ("text, in which {{8}} is a gap of 8 tokens" if command == "infill" else "text to go on with")
            + f" {_WITHOUT}",
        )
    if command != "infill":
        parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--runs-dir", type=Path, metavar="DIRECTORY", help="DLLM_RUNS, else runs/; or a run's report")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="auto: the faster one here, measured"
    )
    parser.add_argument("--drafts", action="store_true", help="show drafts in place of open places, while it writes")
    parser.add_argument(
        "--pace", type=float, default=0.04, metavar="SECONDS", help="least time a step is shown for (0.04); not counted"
    )
    group = parser.add_argument_group("how text is generated")
    for setting in SETTINGS:
        if setting.name in _NOT_FOR.get(command, ()):
            continue
        if setting.type is None:
            group.add_argument(setting.flag, action="store_true", help=setting.help)
        else:
            group.add_argument(setting.flag, type=setting.type, metavar=_metavar(setting.type), help=setting.help)
    return parser


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", str: "NAME"}[kind]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line that begins with a command; `command` is among them.

    Raises:
        DllmError: an unknown command or setting, or a value that is none.
    """
    command, *rest = arguments
    if command not in COMMANDS:
        raise DllmError(f"Unknown command '{command}'.", did_you_mean(command, COMMANDS))
    parser = parser_of(command)
    options, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [f for action in parser._actions for f in action.option_strings if f.startswith("--")]
        raise DllmError(f"Unknown setting '{flag}' of {command}.", did_you_mean(flag, known))
    if not 0 <= options.pace < float("inf"):
        raise DllmError(f"--pace={options.pace} is no time to wait.", "Give seconds, at least 0.")
    options.command = command
    return options
