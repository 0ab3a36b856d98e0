"""AdamW on fp32 master weights, for networks that compute in bf16 or fp32.

Pure-bf16 AdamW rounds small updates away. Here the network's parameters are bf16 copies of fp32 masters: each
gradient goes into an fp32 buffer as soon as autograd has finished it (and is freed), so that accumulation over
micro-batches loses nothing; AdamW updates the masters, which are then rounded into the copies. In fp32 the parameters
are their own masters and nothing is copied.

Memory per trainable parameter: bf16 18 bytes (2 weight, 4 master, 4 gradient, 8 moments); fp32 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dllm_core.training.settings import TrainSettings

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """Decoupled AdamW (arXiv:1711.05101) whose weights and moments are fp32 whatever the network computes in.

    Args:
        groups: `Method.parameter_groups()`; a group may carry `lr_scale` (times the learning rate) and `weight_decay`.
            Vectors (norms, biases) never decay. A parameter that occurs twice (tied weights) counts once.
        names: parameter -> name of every parameter of the network. The frozen ones are computed with in the compute
            dtype too; buffers (rotary tables) keep their precision.
        settings: learning rate, decay, betas, eps, clip norm and compute dtype.

    Building it converts fp32 parameters in place to the compute dtype; `restore_fp32` undoes that.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], names: Mapping[nn.Parameter, str], settings: TrainSettings
    ) -> None:
        self.settings = settings
        self.compute_dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, Tensor] = {}
        self._accumulated: dict[str, Tensor] = {}
        self._ready: set[str] = set()
        self._hooks: list[Any] = []
        optimiser_groups = []
        for group in groups:
            members = dict.fromkeys(p for p in group["params"] if p.requires_grad and names[p] not in self.parameters)
            for parameter in members:
                self._adopt(names[parameter], parameter)
            optimiser_groups += self._split(group, [(names[p], p.ndim) for p in members])
        self._frozen = {name: (p, p.detach()) for p, name in names.items() if name not in self.parameters}
        for parameter, _ in self._frozen.values():
            parameter.data = parameter.data.to(self.compute_dtype)
        self._adamw = torch.optim.AdamW(
            optimiser_groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
        )

    def _adopt(self, name: str, parameter: nn.Parameter) -> None:
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; training starts from fp32 weights"
        self.parameters[name] = parameter
        if self.compute_dtype == torch.float32:
            self.masters[name] = parameter
            return
        self.masters[name] = parameter.detach()
        parameter.data = parameter.data.to(self.compute_dtype)
        self._accumulated[name] = torch.empty_like(self.masters[name])

        def keep(ready: Tensor) -> None:
            assert ready.grad is not None
            if name in self._ready:
                self._accumulated[name].add_(ready.grad)
            else:
                self._accumulated[name].copy_(ready.grad)
                self._ready.add(name)
            ready.grad = None

        self._hooks.append(parameter.register_post_accumulate_grad_hook(keep))

    def _split(self, group: Mapping[str, Any], members: list[tuple[str, int]]) -> list[dict[str, Any]]:
        decay = group.get("weight_decay", self.settings.weight_decay)
        halves = (
            ([self.masters[n] for n, ndim in members if ndim >= 2], decay),
            ([self.masters[n] for n, ndim in members if ndim < 2], 0.0),
        )
        scale = group.get("lr_scale", 1.0)
        return [{"params": masters, "weight_decay": wd, "lr_scale": scale} for masters, wd in halves if masters]

    def gradients(self) -> dict[str, Tensor]:
        """Return the fp32 gradients accumulated since the last step, for the parameters that got one."""
        if self.compute_dtype == torch.float32:
            return {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        return {name: self._accumulated[name] for name in self.parameters if name in self._ready}

    def step(self, lr_scale: float) -> float:
        """Clip by the global norm, update masters, refresh the network's copies, forget the gradients.

        Args:
            lr_scale: learning rate of this step relative to its peak.

        Returns:
            The gradient's global 2-norm before clipping. If it is not finite nothing is updated.
        """
        gradients = self.gradients()
        norm = float(torch.nn.utils.get_total_norm(list(gradients.values()))) if gradients else 0.0
        if norm == norm and norm != float("inf"):
            clip = self.settings.clip_norm
            if clip is not None and norm > clip:
                torch._foreach_mul_(list(gradients.values()), clip / (norm + 1e-6))
            self._update(gradients, lr_scale)
        self.forget()
        return norm

    def _update(self, gradients: dict[str, Tensor], lr_scale: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = self.settings.lr * lr_scale * group["lr_scale"]
        if self.compute_dtype == torch.float32:
            self._adamw.step()
            return
        for name, master in self.masters.items():
            master.grad = gradients.get(name)
        self._adamw.step()
        with torch.no_grad():
            for name in gradients:
                self.parameters[name].copy_(self.masters[name])

    def forget(self) -> None:
        """Drop what was accumulated since the last step."""
        self._ready.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def restore_fp32(self) -> None:
        """Give the network its fp32 weights back (to save or to measure it); the optimiser is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self.parameters.items():
            parameter.data = self.masters[name].detach()
        for parameter, original in self._frozen.values():
            parameter.data = original

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def frozen_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return frozen parameters by name, as they were before the compute dtype ("frozen/...")."""
        return {f"frozen/{name}": self._frozen[name][1] for name in names}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return masters and moments by name ("param/...", "exp_avg/...", "exp_avg_sq/...", "updates/...")."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            out[f"param/{name}"] = master.detach()
            state = self._adamw.state.get(master)
            if state:
                out |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS}
                out[f"updates/{name}"] = state["step"]
        return out

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, bit for bit. Names and shapes have been compared before."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"param/{name}"])
            if self.compute_dtype != torch.float32:
                self.parameters[name].copy_(master)
            if f"updates/{name}" not in tensors:
                continue
            moments = {m: torch.empty_like(master).copy_(tensors[f"{m}/{name}"]) for m in _MOMENTS}
            step = tensors[f"updates/{name}"].to(master.device, copy=True)
            self._adamw.state[master] = {"step": step, **moments}
