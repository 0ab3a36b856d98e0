"""Which pass serves a model, and why."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from dllm_core.backbone import attention
from dllm_core.backbone.passes import joined_weights
from dllm_core.backbone.passes.captured import CapturedPass, Captures
from dllm_core.backbone.passes.joined import JoinedPass, decoded
from dllm_core.backbone.passes.joined_weights import Joined
from dllm_core.backbone.passes.plain import PlainPass
from dllm_core.backbone.passes.protocol import DecoderPass
from dllm_core.backbone.passes.quick import QuickPass
from dllm_core.backbone.passes.quick_weights import linears_of
from dllm_core.errors import DllmError
from dllm_core.kernels import dispatch
from dllm_core.layers import gated_parts
from dllm_core.layers.compiling import SPENT, can_compile, complaint, metered
from dllm_core.layers.gated_parts import Parts
from dllm_core.layers.graphs import CudaRecorder

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

PASSES_BEFORE_COMPILING = 2**15
"""After so many passes compiling would have paid had it come first: seconds over tenths of a millisecond a pass. Both
are estimates, not measured on a GPU; what is bought too late has cost at most twice what it had to."""
COMPILE_BUDGET_S = 120.0
"""Seconds of compiling in this process after which nothing more is compiled that was not asked for."""
TRIAL_TOKENS = 32


def obstacle(backbone: Backbone) -> str | None:
    """Return why decoding has to go through transformers' modules, None where a quick pass gives the same."""
    if dispatch.wish() == "reference":
        return "DLLM_KERNELS=reference"
    config, decoder = backbone.config, backbone.decoder
    if backbone.device.type not in ("cpu", "cuda"):
        return f"the model is on {backbone.device.type}"
    if not backbone.family.is_gated:
        return f"it is not written for {config.model_type}"
    if config.hidden_act != "silu":
        return f"it is not written for {config.hidden_act}"
    if config._attn_implementation != attention.NAME:
        return f"attention is set to {config._attn_implementation}"
    if torch.is_autocast_enabled(backbone.device.type):
        return "autocast is on"
    for module in decoder.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "modules have hooks"
        if module._compiled_call_impl is not None:
            return "the decoder is compiled"
    if any(type(module) is not nn.Linear for module in linears_of(backbone)):
        return "its matrices are not plain ones"
    return None


def pass_for(backbone: Backbone, *, quick: bool = True, compiling: str = "never") -> DecoderPass:
    """Return the quickest pass there is for a backbone, or transformers' own; which one and why is logged once.

    Args:
        backbone: the model.
        quick: with kernels made for decoding, where there are any for the model.
        compiling: see `samplers.config.DiffusionGenerationConfig.compile`.

    Raises:
        DllmError: `compiling` is `always`, and nothing that is compiled serves the model here.
    """
    if not quick:
        return PlainPass(backbone)
    reason, kind = obstacle(backbone), backbone.device.type
    is_joined = kind == "cuda" or compiling == "always"
    if reason is None and is_joined:
        reason = joined_weights.obstacle(backbone)
    if reason is not None:
        if compiling == "always" and dispatch.wish() != "reference":
            raise DllmError(
                f"compile='always', but the pass that is compiled does not serve this model: {reason}.",
                "Give compile='auto' or 'never'.",
            )
        dispatch.announce("decoder pass", "reference", reason)
        return PlainPass(backbone)
    if is_joined:
        return joined_pass_for(backbone, compiling)
    dispatch.announce("decoder pass", "quick", f"{backbone.config.model_type} on a CPU")
    return QuickPass(backbone)


# -- joined passes ----------------------------------------------------------------------------------------------------

_kept: weakref.WeakKeyDictionary[Backbone, Captures] = weakref.WeakKeyDictionary()


def captures_of(backbone: Backbone) -> Captures:
    """Return a backbone's graphs; none at first, and none again once its weights have changed or been replaced."""
    kept = _kept.get(backbone)
    if kept is None or not kept.weights.is_current(backbone):
        kept = None
        _kept.pop(backbone, None)  # before the next copies are made
        recorder = CudaRecorder(backbone.device) if backbone.device.type == "cuda" else None
        _kept[backbone] = kept = Captures(Joined(backbone), recorder)
    return kept


def joined_pass_for(backbone: Backbone, compiling: str) -> JoinedPass | CapturedPass:
    """Return a pass over joined weights: through graphs on a GPU.

    Args:
        backbone: a model that neither `obstacle` nor `joined_weights.obstacle` has anything against.
        compiling: `always`, `never`, or `auto`: on a GPU, once the model has made enough passes for it to pay.

    Raises:
        DllmError: `always`, and there is no compiler.
    """
    captures = captures_of(backbone)
    parts = parts_for(captures, compiling)
    made = "compiled" if parts.compiled else "eager"
    kind = backbone.device.type
    name = "joined" if captures.recorder is None else "captured"
    dispatch.announce("decoder pass", name, f"{backbone.config.model_type} on {kind}, {made} parts")
    if captures.recorder is None:
        return JoinedPass(backbone, captures.weights, parts)
    return CapturedPass(backbone, captures, parts)


def parts_for(captures: Captures, compiling: str) -> Parts:
    """Return the element-wise parts that a model's next decode is made with, tried out where they are compiled.

    Raises:
        DllmError: `compiling` is `always`, and there is no compiler.
    """
    device = captures.weights.device
    is_asked = compiling == "always"
    pays = device.type == "cuda" and captures.passes >= PASSES_BEFORE_COMPILING and SPENT.seconds < COMPILE_BUDGET_S
    if not is_asked and not (compiling == "auto" and (pays or captures.compiles)):
        return gated_parts.eager()
    reason = can_compile(device)
    if reason is not None and is_asked:
        raise DllmError(f"compile='always', but nothing can be compiled: {reason}.", "Give compile='auto' or 'never'.")
    if reason is None and SPENT.fault is None and not captures.compiles:
        try:
            with metered(), torch.inference_mode(torch.is_inference_mode_enabled() and device.type == "cpu"):
                _try_out(captures.weights, gated_parts.compiled())
            captures.compiles = True
        except RuntimeError as error:  # a compiler that is there and does not work has many ways to say so
            SPENT.fault = complaint(error)
    reason = reason or SPENT.fault
    if reason is not None:
        dispatch.announce("decoder parts", "eager", reason)
        return gated_parts.eager()
    return gated_parts.compiled()


@torch.no_grad()
def _try_out(weights: Joined, parts: Parts) -> None:
    """Make a short pass, so that what is compiled is compiled before a decode."""
    place_L = torch.arange(TRIAL_TOKENS, device=weights.device)
    rotation = weights.rotations.at(place_L[None])
    decoded(weights, parts, torch.zeros_like(place_L)[None], rotation, row_M=place_L[: TRIAL_TOKENS // 2])
