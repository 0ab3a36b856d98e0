"""What went wrong, kept small enough to travel as an artifact and to be the last line on the screen."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from steps.cache.store import write_json

Kind = Literal["user", "error", "killed"]


@dataclass(frozen=True)
class Failure:
    """One failure.

    Attributes:
        where: the row, or the step for work that no row owns.
        stage: step function that raised, e.g. `train_cell`.
        kind: `user` can be mended with other settings; `killed` left no traceback.
        problem: one line.
        remedy: what to try; may be empty.
        trace: traceback text, empty for user errors.
    """

    where: str
    stage: str
    kind: Kind
    problem: str
    remedy: str = ""
    trace: str = ""


class RowFailed(RuntimeError):
    """A recorded failure, raised again where it has to stop the run."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(f"{failure.where}: {failure.problem}")

    def __reduce__(self) -> tuple[type, tuple[Failure]]:
        return type(self), (self.failure,)


_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|DefaultCPUAllocator", re.I)


def describe(error: BaseException, where: str, stage: str) -> Failure:
    """Return the failure that an exception means for the user."""
    if isinstance(error, RowFailed):
        return error.failure
    problem, remedy = getattr(error, "problem", None), getattr(error, "remedy", "")
    if isinstance(problem, str):  # DllmError and ParamsError
        return Failure(where, stage, "user", problem, remedy)
    trace = "".join(traceback.format_exception(error))
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or _MEMORY.search(str(error)):
        return Failure(where, stage, "error", f"out of memory: {first}", _LESS_MEMORY, trace)
    full = _disk_full(error)
    if full is not None:
        first = (str(full).strip() or type(full).__name__).splitlines()[0]
        return Failure(where, stage, "error", f"no space left on the disk: {first}", _MORE_DISK, trace)
    return Failure(where, stage, "error", f"{type(error).__name__}: {first}", "", trace)


def killed(where: str) -> Failure:
    """Return the failure of a task that ended without a word."""
    problem = "the task was killed before it could say why (out of memory? a crash in native code?)"
    return Failure(where, "task", "killed", problem, _LESS_MEMORY)


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_IN_WORDS = re.compile(r"no space left on device|quota exceeded|disk is full|\(os error (?:28|122)\)", re.I)
"""What safetensors and SQLite say, whose errors carry no number."""
_MORE_DISK = (
    "Free some (python -m steps.cache gc --keep 20GB) or take another disk with --runs-dir, then give the same `run` "
    "command again: it finds what is kept and makes the rest. `resume` needs all that the run had made."
)


def _disk_full(error: BaseException) -> BaseException | None:
    """Return the error of a full disk that `error` is or came from, None when there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in _FULL) or _FULL_IN_WORDS.search(str(cause)):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


_LESS_MEMORY = "Try --set train.micro_batch_size=1,train.activation_checkpointing=true; training resumes where it was."


# -- word for the launcher ------------------------------------------------------------------------------------------

WORD_VARIABLE = "DLLM_WORD"
"""Names a directory of this launch, in which tasks leave files for the launcher."""


def _word_dir() -> Path | None:
    folder = os.environ.get(WORD_VARIABLE)
    return Path(folder) if folder else None


def leave_word(failure: Failure) -> None:
    """Write a failure where the launcher reads it; where that fails too, the task's log has it."""
    folder = _word_dir()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{failure.where}.failure.json", asdict(failure))


def forget(where: str) -> None:
    """Take back what was written about `where`: it works now."""
    folder = _word_dir()
    if folder is not None:
        (folder / f"{where}.failure.json").unlink(missing_ok=True)


def leave_closing(lines: list[str]) -> None:
    """Write the last lines of a successful run; without a launcher they are printed here."""
    folder = _word_dir()
    if folder is None:
        print("\n".join(lines), flush=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "closing.json", lines)


def words_left(folder: Path) -> list[Failure]:
    """Return the failures of a launch, oldest first."""
    files = sorted(folder.glob("*.failure.json"), key=lambda p: p.stat().st_mtime_ns)
    return [Failure(**json.loads(p.read_text(encoding="utf-8"))) for p in files]


def closing_left(folder: Path) -> list[str]:
    """Return the last lines of a successful launch."""
    path = folder / "closing.json"
    lines: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return lines
