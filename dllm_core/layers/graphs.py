"""Recording a run as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UPS = 2


class Graph(Protocol):
    """A recorded run."""

    def replay(self) -> None:
        """Do the same work again: same kernels, same addresses, on the current stream."""


class Recorder(Protocol):
    """Makes graphs that are replayed one after the other, never side by side.

    Their memory is one pool: what a graph leaves behind is overwritten by the replay of any other.
    """

    def record(self, run: Callable[[], None]) -> Graph:
        """Return a run as a graph; it is run a few times before, and not once by being recorded."""

    def take_turn(self) -> None:
        """Let what follows on this stream wait for what was replayed last on another."""

    def wait(self) -> None:
        """Wait until nothing is being replayed."""


class CudaRecorder:
    """Records CUDA graphs.

    A run must not wait for the device, read from the host or allocate what outlives it, other than its results.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Return a run as a graph; see `Recorder`. Kernels are loaded, chosen and compiled in the runs before."""
        with torch.cuda.device(self.device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile (a data loader that pins memory) is none of its business
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                run()
        return graph

    def take_turn(self) -> None:
        """See `Recorder`."""
        here = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != here:
            here.wait_stream(self._last)
        self._last = here

    def wait(self) -> None:
        """See `Recorder`."""
        torch.cuda.synchronize(self.device)
