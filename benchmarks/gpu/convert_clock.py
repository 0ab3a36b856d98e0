"""Work that stops itself in time, at a place from which it can go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 10.0
"""A bell that nobody heard (training had just ended by itself) rings again after so many seconds."""


class TimeUp(BaseException):
    """The time is over. No `Exception`: whoever records failures must not take this for one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop what is done inside after so many seconds.

    Training ends after the step it is in and leaves a checkpoint (`dllm_core.training.interrupt`); other work is
    interrupted where it is, and the step cache keeps what it had finished. A SIGTERM from outside does the same. To be
    entered in the main thread.

    Args:
        seconds: from now; nothing is begun when there are none.

    Raises:
        TimeUp: the time was over before the work was.
    """
    if seconds <= 0:
        raise TimeUp
    over = threading.Event()
    gate = threading.Lock()

    def stop(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            over.set()  # once: what is being tidied up now is not to be interrupted
            raise TimeUp

    def ring() -> None:
        pause = min(seconds, threading.TIMEOUT_MAX)
        while not over.wait(pause):
            with gate:
                if not over.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
            pause = AGAIN_S

    previous = signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=ring, daemon=True, name="time-limit").start()
    try:
        yield
    except SystemExit as left:
        if left.code == 128 + signal.SIGTERM:  # the trainer has written its checkpoint
            raise TimeUp from left
        raise
    finally:
        with gate:
            over.set()  # a bell that is still in the air is not heard
        signal.signal(signal.SIGTERM, previous)
