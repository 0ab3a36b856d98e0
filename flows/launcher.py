"""What stands between the user and Metaflow: settings checked first, our words last, exit codes that mean something.

0 done, 1 a cell or step failed, 2 bad settings or input, 130 interrupted. Only `run` and `resume` are touched; every
other command of Metaflow (show, check, card, dump, logs, step, spin ...) passes through unchanged.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.context import default_runs_dir
from steps.failures import WORD_VARIABLE, Failure, closing_left, words_left
from steps.progress import duration
from steps.watchdog import announce_parent, die_with_parent

if TYPE_CHECKING:
    from steps.plan import Plan

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
COMMANDS = (
    "run",
    "resume",
    "step",
    "spin",
    "spin-step",
    "show",
    "check",
    "card",
    "dump",
    "logs",
    "init",
    "help",
    "tag",
)
COMMANDS += (
    "package",
    "output-raw",
    "output-dot",
    "version",
    "batch",
    "kubernetes",
    "argo-workflows",
    "step-functions",
)


# -- before Metaflow is imported ------------------------------------------------------------------------------------


def prepare_environment(arguments: list[str]) -> list[str]:
    """Take `--runs-dir` out of the arguments and set what Metaflow reads when it is imported.

    Variables that the user has set win.

    Raises:
        SystemExit: `--runs-dir` without a directory. (Metaflow is not there yet to say so.)
    """
    rest, runs = [], None
    pending = iter(arguments)
    for word in pending:
        if word == "--runs-dir":
            runs = next(pending, "")
        elif word.startswith("--runs-dir="):
            runs = word.partition("=")[2]
        else:
            rest.append(word)
    if runs is not None:
        if not runs.strip() or runs.startswith("--"):
            print("error: --runs-dir names no directory.\nGive one, or leave it out for runs/.", file=sys.stderr)
            raise SystemExit(BAD_INPUT)
        os.environ["DLLM_RUNS"] = str(Path(os.path.expanduser(runs)).absolute())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without some sign must not end hours of work
            stream.reconfigure(errors="replace")
    os.environ.setdefault("METAFLOW_USER", os.environ.get("USER") or os.environ.get("USERNAME") or "dllm")
    os.environ.setdefault("METAFLOW_DATASTORE_SYSROOT_LOCAL", str(default_runs_dir()))
    os.environ.setdefault("METAFLOW_RUN_MAX_WORKERS", "1")  # cells share one machine; --max-workers wins
    os.environ.setdefault("METAFLOW_RESUME_MAX_WORKERS", "1")
    os.environ.setdefault("METAFLOW_PYLINT", "false")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return rest


def command_of(arguments: list[str]) -> tuple[str, int]:
    """Return Metaflow's sub-command and where it stands; ("", -1) without one."""
    for i, word in enumerate(arguments):
        if word in COMMANDS:
            return word, i
    return "", -1


# -- settings -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--cells")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--seeds")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    return parser


def _resolve(options: argparse.Namespace) -> Plan:
    """Return the plan: settings checked against everything that can be checked before any work."""
    import params
    from steps import plan

    spec = params.load(
        options.preset,
        cells=options.cells,
        overrides=options.set,
        model=options.model,
        data=options.data,
        seeds=options.seeds,
    )
    return plan.validate(spec, runs_dir=default_runs_dir(), dry_run=options.dry_run)


def _complain(error: Any) -> int:
    print(f"error: {error.problem}", file=sys.stderr)
    if error.remedy:
        print(error.remedy, file=sys.stderr)
    return BAD_INPUT


def _settings(arguments: list[str], at: int) -> tuple[list[str] | None, int]:
    """Return (arguments for Metaflow, _), or (None, exit code) when there is nothing left to run."""
    try:
        options, rest = _parser().parse_known_args(arguments[at + 1 :])
    except SystemExit:  # argparse has said what is missing
        return None, BAD_INPUT
    misspelt = _misspelt(rest)
    if misspelt:
        print(f"error: Unknown option '{misspelt[0]}'.\nDid you mean '{misspelt[1]}'?", file=sys.stderr)
        return None, BAD_INPUT
    try:
        plan = _resolve(options)
        if options.dry_run:
            from steps.plan import render

            print(render(plan))
            return None, OK
    except ValueError as error:
        if not hasattr(error, "problem"):
            raise
        return None, _complain(error)
    print(_brief(plan), flush=True)
    if plan.warning:
        print(f"warning: {plan.warning}", file=sys.stderr, flush=True)
    typed = shlex.join(["python", _shown_script(), *arguments])
    ours = ["--settings", plan.spec.model_dump_json(), "--command-line", typed]
    ours += ["--no-cache"] if options.no_cache else []
    for name in ("preset", "cells", "model", "data", "seeds"):
        if getattr(options, name) is not None:
            ours += [f"--{name}", getattr(options, name)]
    if options.set:
        ours += ["--set", ",".join(options.set)]
    return [*arguments[: at + 1], *ours, *rest], OK


def _misspelt(rest: list[str]) -> tuple[str, str] | None:
    """Return the first option that is ours but for a slip, and ours; what resembles none is left to Metaflow."""
    ours = [word for action in _parser()._actions for word in action.option_strings]
    for word in rest:
        name = word.partition("=")[0]
        close = difflib.get_close_matches(name, [*ours, "--runs-dir"], n=1, cutoff=0.8)
        if close and name.startswith("--"):
            return name, close[0]
    return None


def _brief(plan: Plan) -> str:
    cost = plan.cost
    return (
        f"{len(plan.rows)} rows on {plan.machine.name}: about {duration(cost.total_s)} without the cache, "
        f"{cost.memory.total / 1e9:.1f} GB of memory, {cost.total_disk / 1e9:.1f} GB of disk "
        "(estimates; --dry-run says more)"
    )


def _shown_script() -> str:
    relative = os.path.relpath(sys.argv[0])
    return sys.argv[0] if relative.startswith("..") else relative


# -- running --------------------------------------------------------------------------------------------------------


class _Interrupts:
    """Remembers that the user interrupted: Metaflow itself ends with the status of a failure."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        raise KeyboardInterrupt


def _run_metaflow(flow: Callable[[], Any]) -> int:
    try:
        flow()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else (FAILED if end.code else OK)
    except KeyboardInterrupt:
        return FAILED
    return OK


def main(flow: Callable[[], Any]) -> int:
    """Run the flow's command line.

    Args:
        flow: the flow class; calling it runs Metaflow on `sys.argv`.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:]
    command, at = command_of(arguments)
    if command not in ("run", "resume"):
        if command in ("step", "spin-step"):
            die_with_parent()
        return _run_metaflow(flow)
    if "--help" in arguments:
        return _run_metaflow(flow)
    if command == "run":
        try:
            rewritten, status = _settings(arguments, at)
        except KeyboardInterrupt:  # large texts take a while to look through
            print("\nInterrupted; nothing was started.", file=sys.stderr)
            return INTERRUPTED
        if rewritten is None:
            return status
        sys.argv[1:] = arguments = rewritten
    return _launch(flow, arguments)


def _launch(flow: Callable[[], Any], arguments: list[str]) -> int:
    from flows.screen import watch

    announce_parent()
    word = Path(tempfile.mkdtemp(prefix="dllm-"))
    os.environ[WORD_VARIABLE] = str(word)
    run_id_file = _users_run_id_file(arguments)
    if run_id_file is None:
        run_id_file = word / "run_id"
        sys.argv += ["--run-id-file", str(run_id_file)]
    interrupts = _Interrupts()
    try:
        with watch():
            status = _run_metaflow(flow)
        run_id = run_id_file.read_text(encoding="utf-8").strip() if run_id_file.is_file() else ""
        sys.stdout.flush()
        if interrupts.signal:
            return _after_interrupt(interrupts.signal, run_id)
        if status == OK:
            print("\n" + "\n".join(closing_left(word)), flush=True)
            return OK
        return _after_failure(words_left(word), run_id, status)
    finally:
        shutil.rmtree(word, ignore_errors=True)


def _users_run_id_file(arguments: list[str]) -> Path | None:
    """Return the value of `--run-id-file`, None without one (Metaflow complains about a missing value itself)."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--run-id-file":
            return Path(value if equals else following)
    return None


def _resume_command(run_id: str) -> str:
    elsewhere = ["--runs-dir", os.environ["DLLM_RUNS"]] if os.environ.get("DLLM_RUNS") else []
    return shlex.join(["python", _shown_script(), "resume", "--origin-run-id", run_id, *elsewhere])


def _after_interrupt(number: int, run_id: str) -> int:
    print("\nInterrupted. What is finished is kept, and training resumes from its last checkpoint.", file=sys.stderr)
    if run_id:
        print(f"Go on with:  {_resume_command(run_id)}", file=sys.stderr)
    return INTERRUPTED if number == signal.SIGINT else 128 + number


def _after_failure(failures: list[Failure], run_id: str, status: int) -> int:
    """Say what failed, why, what to try and how to resume; return the exit status."""
    lines = [""]
    for failure in failures:
        what = f"cell '{failure.where}'" if failure.where != failure.stage else f"step '{failure.where}'"
        where = f" in {failure.stage}" if failure.where != failure.stage and failure.stage != "task" else ""
        lines.append(f"{what} failed{where}: {failure.problem}")
        if failure.remedy:
            lines.append(f"  {failure.remedy}")
    if not failures and run_id:
        lines.append("A task ended without saying why (killed? out of memory?); its step stands in the lines above.")
    if run_id:
        lines.append(f"Everything else is kept. After mending:  {_resume_command(run_id)}")
        lines.append("Other settings need a new `run`; what is done comes from the cache.")
    print("\n".join(lines), file=sys.stderr, flush=True)
    shared_input = bool(failures) and all(f.kind == "user" and f.where == f.stage for f in failures)
    return BAD_INPUT if shared_input or status == BAD_INPUT else FAILED
