"""Times of many moments without waiting for the device at any of them."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Marks moments; on CUDA an event in the stream, elsewhere the clock. Starts when it is made.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self.mark()

    def mark(self) -> None:
        """Remember this moment (on CUDA: when the work queued so far is done)."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self, mark: int) -> float:
        """Return the seconds from the start to the given mark (the first after the start is 1)."""
        if self._device.type == "cuda":
            self._events[mark].synchronize()
            return self._events[0].elapsed_time(self._events[mark]) / 1000
        return self._times[mark] - self._times[0]
