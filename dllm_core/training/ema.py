"""An exponential moving average of weights, kept in fp32 and carried by the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Ema(nn.Module):
    """fp32 averages of named parameters: average <- d average + (1 - d) live, once per optimiser step.

    With `warmup`, d = min(decay, (1 + n) / (10 + n)) after n updates, so that the starting weights are forgotten
    within a few steps and a short run averages over about its last ninth. The averages are persistent buffers: the
    state dict of the module that holds this one, and hence a checkpoint, carries them.

    Training in bf16 the network holds rounded copies of fp32 masters (`MasterAdamW`), and the room sees only those.
    Averaging the copies in fp32 is what is meant to happen then. An average of copies differs from the average of the
    masters by at most the largest rounding error of a copy, 2^-8 |w|: never worse than the copies that the forward
    pass uses, and much better where a weight crosses several rounding steps within the window, since the errors then
    average out. Whoever has the masters may pass them instead.

    Args:
        parameters: name -> parameter, for instance `module.named_parameters()`; those that are to be averaged.
        decay: largest d, in [0, 1).
        warmup: whether d is warmed up.

    Memory: 4 bytes per parameter, as much again during an update from bf16. An update is one pass over the weights.
    """

    num_updates: Tensor

    def __init__(self, parameters: NamedTensors, decay: float, warmup: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"an average needs a decay in [0, 1), got {decay}")
        self.decay, self.warmup = decay, warmup
        self.names = tuple(named := dict(parameters))
        for name, value in named.items():
            self.register_buffer(_key(name), value.detach().to(torch.float32, copy=True))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def averages(self) -> dict[str, Tensor]:
        """Return name -> average, the buffers themselves."""
        return {name: self.get_buffer(_key(name)) for name in self.names}

    def current_decay(self) -> float:
        """Return the d of the next update."""
        if not self.warmup:
            return self.decay
        done = int(self.num_updates)
        return min(self.decay, (1 + done) / (10 + done))

    @torch.no_grad()
    def update(self, parameters: NamedTensors) -> None:
        """Take the live weights into the average.

        Args:
            parameters: name -> live weight, of any dtype; others than the averaged names are ignored.

        Raises:
            KeyError: an averaged name is missing.
        """
        live = dict(parameters)
        averages = list(self.averages().values())
        weights = [live[name].detach().float() for name in self.names]
        torch._foreach_lerp_(averages, weights, 1.0 - self.current_decay())
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the parameters of `module` by their averages, in their own dtype."""
        torch._foreach_copy_(self._live(module), list(self.averages().values()))

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Let `module` hold the averages for a while; afterwards it holds its own weights again, bit for bit.

        Values are copied in place, so that compiled code and captured graphs see them; costs one more copy of the
        weights meanwhile.
        """
        live = self._live(module)
        kept = [value.clone() for value in live]
        try:
            self.copy_to(module)
            yield
        finally:
            torch._foreach_copy_(live, kept)

    def _live(self, module: nn.Module) -> list[Tensor]:
        parameters = dict(module.named_parameters())
        return [parameters[name].detach() for name in self.names]


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's own name may hold no dot
