"""CUDA graphs played on a CPU: what is recorded are operations on tensors, and a replay repeats them on the same ones.

As with a real graph, Python does not run again: values and shapes are those of the recording, inputs are whatever the
same memory holds now. All that a recording made is poisoned before every replay of any graph and after every
recording, since graphs share their memory: who reads an earlier result reads nan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "lift_fresh_copy", "equal", "is_nonzero", "_pin_memory")
"""What would wait for the device, or copy from memory of the host, while a stream is being recorded."""


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} cannot be recorded")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class TapeGraph:
    def __init__(self, recorder: TapeRecorder, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        self.recorder, self.calls = recorder, calls

    @torch.no_grad()
    def replay(self) -> None:
        self.recorder.replays += 1
        self.recorder.poison()
        for func, args, kwargs, out in self.calls:
            returns = func._schema.returns
            if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
                continue  # a view: nothing is launched
            found = func(*args, **kwargs)
            if any(r.alias_info is not None for r in returns):
                continue  # written in place
            for mine, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(new)

    def made(self) -> list[Tensor]:
        """Return what the recording allocated."""
        fresh = [out for func, _, _, out in self.calls if all(r.alias_info is None for r in func._schema.returns)]
        return [leaf for leaf in tree_leaves(fresh) if isinstance(leaf, Tensor)]


class TapeRecorder:
    """Attributes say how often something was recorded and replayed, and how many graphs were waited for."""

    def __init__(self) -> None:
        self.graphs: list[TapeGraph] = []
        self.records = self.replays = self.waits = self.turns = 0

    def record(self, run: Callable[[], None]) -> TapeGraph:
        self.records += 1
        for _ in range(2):
            run()
        with Tape() as tape:
            run()
        self.graphs.append(TapeGraph(self, tape.calls))
        self.poison()
        return self.graphs[-1]

    @torch.no_grad()
    def poison(self) -> None:
        for graph in self.graphs:
            for tensor in graph.made():
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
                elif tensor.dtype != torch.bool and tensor.numel():
                    tensor.fill_(torch.iinfo(tensor.dtype).max)

    def take_turn(self) -> None:
        self.turns += 1

    def wait(self) -> None:
        self.waits += 1


class RefusingRecorder(TapeRecorder):
    """A device on which nothing can be recorded."""

    def record(self, run: Callable[[], None]) -> TapeGraph:
        self.records += 1
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
