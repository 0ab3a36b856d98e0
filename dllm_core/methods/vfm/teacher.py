"""The map as it stood when the second phase began: what is imitated there.

A map that imitated its own current sampler would confirm its mistakes: on two modes it drops one or mixes them for
good. Hence a copy that does not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """Keeps copies of weights as persistent buffers (so that every checkpoint has them), in their compute dtype.

    It is empty until `take`; a state that holds copies makes room for them when it is loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_make_room)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was taken yet."""
        return not self._buffers

    @torch.no_grad()
    def take(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights by name."""
        for name, value in named:
            self.register_buffer(_key(name), value.detach().clone())

    def drop(self) -> None:
        """Forget the copies: a finished model does without."""
        self._buffers.clear()

    @contextmanager
    def in_place_of(self, named: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Let parameters hold the copies inside the context; no gradient may be computed there."""
        own = {name: parameter.data for name, parameter in named.items()}
        try:
            for name, parameter in named.items():
                copied = self._buffers[_key(name)]
                assert copied is not None
                parameter.data = copied.to(parameter.dtype)
            yield
        finally:
            for name, parameter in named.items():
                parameter.data = own[name]


def _key(name: str) -> str:
    return name.replace(".", "/")


def _make_room(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    for name, value in state.items():
        key = name.removeprefix(prefix)
        if name.startswith(prefix) and key not in module._buffers:
            module.register_buffer(key, torch.empty_like(value))
