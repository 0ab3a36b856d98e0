"""A task that loses its parent ends itself: a killed run leaves nothing computing in the background."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT_VARIABLE = "DLLM_PARENT_PID"
POLL_S = 1.0
_PR_SET_PDEATHSIG = 1


def announce_parent() -> None:
    """Tell the tasks that this process will start who their parent is."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def is_alive(pid: int) -> bool:
    """Return whether a process exists (a zombie counts as dead on Linux)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def die_with_parent() -> None:
    """End this process, hard, when its parent is gone. Call it first thing in a task.

    On Linux the kernel sends the signal; everywhere a thread looks once a second. SIGKILL, because the task may sit
    in a kernel call for minutes, and because whatever matters is on disk already.
    """
    parent = os.getppid()
    announced = os.environ.get(PARENT_VARIABLE, "")
    if announced.isdigit() and not is_alive(int(announced)):
        _end()  # it died before we got here
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        _end()
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watchdog").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
