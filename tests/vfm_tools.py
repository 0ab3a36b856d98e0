"""Tiny VFMs, two-mode data, and the room's losses in float64, as plainly as possible."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.methods.protocol import Corrupted, Resources, StepInfo
from dllm_core.methods.vfm.method import Method
from dllm_core.methods.vfm.options import Options
from tests.ldlm_tools import documents
from tests.method_tools import step_info
from tests.tiny import NUM_TOKENS, tiny_backbone

SHAPE = {"width": 24, "depth": 1, "head_width": 8}
LAYERS = 4


def tiny_vfm(*, move: float = 0.05, seed: int = 0, backbone: dict[str, Any] | None = None, **options: Any) -> Method:
    """Return a VFM on a 4-layer llama; `move` is the noise put on all new weights, those that start at zero too."""
    family = {"layers": LAYERS, **(backbone or {})}
    base = tiny_backbone(**family)
    torch.manual_seed(seed)
    method = Method(base, Options(**{"shape": SHAPE, "rollout_steps": 3, "kl_warmup": 0.0, **options}))
    with torch.no_grad():
        for module in (method.adapter, method.flow):
            for parameter in module.parameters():
                parameter += move * torch.randn_like(parameter)
        if move:
            method.mean_D.normal_()
            method.std_D.uniform_(0.5, 2.0)
    return method


def phase_info(phase: str, step: int = 5, batch_size: int = 4) -> StepInfo:
    return step_info(phase, step, steps=10, batch_size=batch_size)


def two_modes(num: int, length: int, ids: Sequence[int] = (10, 20)) -> SequenceSet:
    """Return prompts of one token and responses that are one of two tokens all along, equally often."""
    ids_NL = torch.ones(num, 1 + length, dtype=torch.int32)
    ids_NL[:, 1:] = torch.tensor(ids, dtype=torch.int32)[torch.arange(num) % len(ids)][:, None]
    place_NL = torch.arange(1 + length, dtype=torch.int32).repeat(num, 1)
    nothing_NL = torch.zeros_like(ids_NL)
    return SequenceSet(ids_NL, place_NL > 0, nothing_NL, place_NL, torch.full((num,), 4 * length), NUM_TOKENS)


def coins(corrupted: Corrupted, **values: Sequence[Any]) -> Corrupted:
    """Return the draws with some of them fixed by hand."""
    fixed = {name: torch.tensor(value).to(corrupted.extras[name].dtype) for name, value in values.items()}
    return replace(corrupted, extras=corrupted.extras | fixed)


# -- the oracle -----------------------------------------------------------------------------------------------------


def double(method: Method) -> Method:
    return copy.deepcopy(method).double().eval()


def _row(batch: Batch, row: int, document: int) -> list[int]:
    return [i for i, d in enumerate(batch.document_BL[row].tolist()) if d == document]


class Naive:
    """One document at a time, one slot at a time, in float64, through the same base model."""

    def __init__(self, method: Method) -> None:
        self.method = double(method)
        self.backbone = self.method.backbone
        self.table_VD = self.backbone.embedding_weight_VD.detach()

    def unit(self, token: int) -> Tensor:
        row_D = self.table_VD[token]
        return row_D / row_D.square().mean().sqrt()

    def posterior(self, batch: Batch, row: int, prompt: list[int], slots: int, resources: Resources):
        """Return (mean, log std) [L, D] from the modules, fed with a prompt put together here."""
        method = self.method
        if method.options.reads_states:
            stored_LD = resources.anchors.states[batch.sequence_keys[row]][method.layer].double()
            seen = [i for i in prompt if batch.position_BL[row, i] > 0]
            read_PD = (stored_LD[seen] - method.mean_D) / method.std_D
        else:
            read_PD = torch.stack([self.unit(int(batch.input_ids_BL[row, i])) for i in prompt])
        ones = torch.ones(1, len(read_PD), dtype=torch.bool), torch.ones(1, slots, dtype=torch.bool)
        # the last prompt token stands at position -1 whatever is left out before it
        adapter = method.adapter
        position_P, position_L = torch.arange(-len(read_PD), 0), torch.arange(slots)
        queries = adapter.query_W.expand(1, slots, -1)
        inner = adapter.to_width(read_PD[None])
        out = adapter.perceiver(inner, queries, position_P, position_L, *ones)
        log_std = None if adapter.log_std is None else adapter.log_std(out)[0].clamp(-5, 2)
        return adapter.mean(out)[0], log_std

    def states(self, ids: list[int], slots: list[int], x_LD: Tensor, t: float, masked: Sequence[int]) -> tuple:
        """Return (states [T, D] of one document, gate [D]); `slots` and `masked` are places within it."""
        rows = []
        time = self.method.flow.time
        assert time is not None
        half = 128
        frequency = torch.tensor([10_000 ** (-i / half) for i in range(half)], dtype=torch.float64)
        angle = 1000 * t * frequency
        inner = torch.nn.functional.silu(time.inner(torch.cat((angle.cos(), angle.sin()))))
        shift_D, gate_D = time.shift(inner), time.gate(inner)
        for i, token in enumerate(ids):
            if i in slots:
                rows.append(self.method.flow.scale * x_LD[slots.index(i)] + shift_D)
            else:
                rows.append(self.table_VD[self.backbone.contract.mask_token_id if i in masked else token])
        with torch.no_grad():
            return self.backbone.hidden(inputs_embeds_BLD=torch.stack(rows)[None], causal=False)[0], gate_D

    def logp(self, state_D: Tensor) -> Tensor:
        logits_V = self.backbone.head_weight_VD @ state_D
        return logits_V[: self.backbone.contract.num_tokens].log_softmax(0)

    def slot_logp(self, ids: list[int], slots: list[int], x_LD: Tensor, t: float, masked: Sequence[int]) -> Tensor:
        states_TD, gate_D = self.states(ids, slots, x_LD, t, masked)
        shift = self.method.shift
        return torch.stack([self.logp(states_TD[i - shift] + gate_D * x_LD[k]) for k, i in enumerate(slots)])

    def sample(self, ids: list[int], slots: list[int], z_LD: Tensor, passes: int, masked: Sequence[int]) -> Tensor:
        """Return log p [L, V] of the last of `passes` passes."""
        x_LD = z_LD
        for k in range(passes):
            t, s = (passes - k) / passes, (passes - k - 1) / passes
            logp_LV = self.slot_logp(ids, slots, x_LD, t, masked)
            if k == passes - 1:
                break
            unit_VD = torch.stack([self.unit(v) for v in range(logp_LV.shape[1])])
            x_LD = s / t * x_LD + (1 - s / t) * (logp_LV.exp() @ unit_VD)
        return logp_LV


@torch.no_grad()
def naive_losses(method: Method, corrupted: Corrupted, resources: Resources) -> dict[str, float]:
    """Return L_data, L_obs and KL of a batch, document after document, slot after slot, in float64."""
    naive, batch, extras = Naive(method), corrupted.clean, corrupted.extras
    options = method.options
    data = {row: [] for row in range(len(batch))}
    observed, kl = [], []
    for row, prompt, response in documents(batch):
        document = int(batch.document_BL[row, response[0]])
        here = _row(batch, row, document)
        first = here[0]
        ids = [int(batch.input_ids_BL[row, i]) for i in here]
        slots = [i - first for i in response]
        unseen = list(range(len(ids))) if options.prompt == "hidden" else []
        z_LD = extras["noise_BLD"][row, response].double()
        if bool(extras["adapter_B"][row]):
            mean, log_std = naive.posterior(batch, row, prompt, len(slots), resources)
            z_LD = mean + log_std.exp() * z_LD
            q = torch.distributions.Normal(mean, log_std.exp())
            p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
            kl += torch.distributions.kl_divergence(q, p).mean(1).tolist()
        t, targets = float(extras["time_B"][row]), [ids[i] for i in slots]
        if bool(extras["paired_B"][row]):
            targets = naive.sample(ids, slots, z_LD, options.rollout_steps, unseen).argmax(1).tolist()
        x0_LD = torch.stack([naive.unit(token) for token in targets])
        logp_LV = naive.slot_logp(ids, slots, (1 - t) * x0_LD + t * z_LD, t, unseen)
        data[row] += [-float(logp_LV[k, token]) for k, token in enumerate(targets)]
        hidden = [i - first for i in here if bool(extras["observed_BL"][row, i])]
        if hidden:
            states_TD, _ = naive.states(ids, slots, z_LD, 1.0, [*hidden, *unseen])
            observed += [-float(naive.logp(states_TD[i - method.shift])[ids[i]]) for i in hidden]
    rows = [sum(v) / len(v) for v in data.values() if v]
    return {
        "data_nats": sum(rows) / len(rows),
        "observed_nats": sum(observed) / max(1, len(observed)),
        "kl_nats_per_dim": sum(kl) / max(1, len(kl)),
    }
