"""File locks that die with their owner: one per cache key, one per GPU.

POSIX record locks (`fcntl.lockf`) belong to a process: the kernel drops them when it dies, however it dies, and a
forked child does not inherit them. So "take over from a dead owner" needs no timeouts and no stale-file guessing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_threads: dict[str, threading.Lock] = {}
_threads_guard = threading.Lock()

POLL_S = 0.2
REMIND_S = 60.0


def _thread_lock(path: Path) -> threading.Lock:
    """Record locks do not exclude threads of one process, so those queue here first."""
    with _threads_guard:
        return _threads.setdefault(str(path.absolute()), threading.Lock())


def _owner(handle: IO[str]) -> str:
    handle.seek(0)
    try:
        owner = json.loads(handle.read())
        minutes = max(0.0, time.time() - owner["since"]) / 60
        return f"pid {owner['pid']} on {owner['host']}, for {minutes:.0f} min"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _try(handle: IO[str]) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _sign(handle: IO[str], what: str) -> None:
    handle.seek(0)
    handle.truncate()
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "what": what}, handle)
    handle.flush()


@contextmanager
def hold(path: Path, what: str, log: Callable[[str], None]) -> Iterator[bool]:
    """Hold an exclusive lock; wait while a live process has it.

    Args:
        path: lock file; created with its parents and never deleted (deleting it would race with waiters).
        what: shown to those who wait.
        log: told once, then every minute, who is waited for.

    Yields:
        True when it had to wait (so that somebody else may have done the work meanwhile).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _thread_lock(path), path.open("a+", encoding="utf-8") as handle:
        waited = False
        remind_at = 0.0
        while not _try(handle):
            waited = True
            if time.monotonic() >= remind_at:
                log(f"waiting for {what}: in use by {_owner(handle)}")
                remind_at = time.monotonic() + REMIND_S
            time.sleep(POLL_S)
        _sign(handle, what)
        try:
            yield waited
        finally:
            fcntl.lockf(handle, fcntl.LOCK_UN)


@contextmanager
def hold_if_free(path: Path) -> Iterator[bool]:
    """Yield True holding the lock, or False at once when somebody else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    thread_lock = _thread_lock(path)
    if not thread_lock.acquire(blocking=False):
        yield False
        return
    try:
        with path.open("a+", encoding="utf-8") as handle:
            free = _try(handle)
            try:
                yield free
            finally:
                if free:
                    fcntl.lockf(handle, fcntl.LOCK_UN)
    finally:
        thread_lock.release()


@contextmanager
def gpu_lock(device: str, log: Callable[[str], None]) -> Iterator[None]:
    """Let one task of this machine at a time use the GPU; nothing to wait for on a CPU.

    Metaflow ignores `@resources(gpu=1)` locally: tasks of one run, or of two, would share memory and clock. Take this
    lock before torch is imported.

    Args:
        device: `auto`, `cpu` or `cuda`.
        log: told who is waited for.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in ("", "-1")
    there = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if device == "cpu" or hidden or (device == "auto" and not there):
        yield
        return
    name = f"dllm-gpu-{os.getuid()}-{(visible or '0').replace(',', '_')}.lock"
    with hold(Path(tempfile.gettempdir()) / name, "the GPU", log):
        yield
