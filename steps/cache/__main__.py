"""`python -m steps.cache`: list, explain, remove and collect the results that steps have kept."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dllm_core.errors import DllmError
from steps.cache import upkeep
from steps.cache.store import StepCache
from steps.context import default_runs_dir


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--runs-dir", type=Path, default=None, help="default: DLLM_RUNS, else runs/")
    parser = argparse.ArgumentParser(prog="python -m steps.cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|why|rm|gc")
    commands.add_parser("ls", parents=[shared], help="list entries, the most recently used first")
    why = commands.add_parser("why", parents=[shared], help="say what sets an entry apart from the nearest other one")
    why.add_argument("key", help="first digits of a key")
    rm = commands.add_parser("rm", parents=[shared], help="remove entries")
    rm.add_argument("key", nargs="+", help="first digits of a key")
    gc = commands.add_parser("gc", parents=[shared], help="remove what was used least recently, and leftovers")
    gc.add_argument("--keep", required=True, help="how much to keep, e.g. 20GB")
    gc.add_argument("--older-than", default="0m", help="keep whatever was used since, e.g. 7d")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status (2: no such entry, bad argument)."""
    options = _parser().parse_args(arguments)
    cache = StepCache(options.runs_dir or default_runs_dir())
    try:
        return _run(options, cache)
    except DllmError as error:
        print(f"error: {error.problem}\n{error.remedy}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace, cache: StepCache) -> int:
    if options.command == "ls":
        print("\n".join(upkeep.listing(cache)))
    elif options.command == "why":
        print("\n".join(upkeep.why(cache, options.key)))
    elif options.command == "rm":
        for entry in [upkeep.find(cache, key) for key in options.key]:
            gone = upkeep.remove(cache, entry)
            print(f"{'removed' if gone else 'in use, kept:'} {entry.home.name}  {entry.name}")
    else:
        keep, older = upkeep.parse_size(options.keep), upkeep.parse_age(options.older_than)
        freed = upkeep.collect_garbage(cache, keep, older, print)
        print(f"{upkeep.show_size(freed)} freed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
