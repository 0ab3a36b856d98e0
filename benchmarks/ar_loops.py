"""Greedy left-to-right decoding with a key-value cache, in every way at hand: the fastest is the one to beat.

All give the same tokens in fp32. The plain model is the base model itself: causal attention, no mask row. The library's
own loop (`dllm_core.backbone.ar_decode`, on a CPU through `backbone.passes.quick`) is timed beside these, and on a GPU
a graph of one step (`ar_graph`). B batch, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import read_contract
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.methods.protocol import GenerationOutput

Prompts = Sequence[Tensor]


def base_model(directory: Path, dtype: torch.dtype, device: str) -> Any:
    """Return the base model behind a converted checkpoint: causal again, without the rows that conversion added."""
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, is_causal=True)
    model.resize_token_embeddings(read_contract(directory).num_tokens, mean_resizing=False)
    return model.to(device).eval()


@torch.no_grad()
def hf_generate(model: Any, prompts: Prompts, new_tokens: int) -> GenerationOutput:
    """Decode with transformers' `generate` and its default cache."""
    start = time.perf_counter()
    prompt_BP = torch.stack(list(prompts)).to(model.device)
    # an end of text would stop it early: without one, every loop does the same work
    kept, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        tokens_BC = model.generate(prompt_BP, attention_mask=torch.ones_like(prompt_BP), generation_config=config)
    finally:
        model.generation_config = kept
    # it hands out nothing before the end
    return _output(tokens_BC, new_tokens, time.perf_counter() - start)


@torch.no_grad()
def dynamic_cache(model: Any, prompts: Prompts, new_tokens: int) -> GenerationOutput:
    """Decode with a loop over the model and transformers' growing cache."""
    cache = DynamicCache(config=model.config)

    def step(ids_BL: Tensor, at: int) -> Tensor:
        return model(input_ids=ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    return _loop(step, prompts, new_tokens, model.device)


@torch.no_grad()
def static_cache(
    model: Any,
    prompts: Prompts,
    new_tokens: int,
    forward: Callable[..., Any] | None = None,
    cache: StaticCache | None = None,
) -> GenerationOutput:
    """Decode with a loop over the model and transformers' preallocated cache.

    Args:
        model: the base model.
        prompts: 1-D int64 ids, all of one length.
        new_tokens: tokens to generate.
        forward: runs single tokens in place of the model: itself, compiled.
        cache: large enough, of the same batch in every call: what is compiled for one size or address of the buffers
            would be compiled again for another. None makes a new one.
    """
    if cache is None:
        cache = StaticCache(config=model.config, max_cache_len=len(prompts[0]) + new_tokens)
    cache.reset()

    def step(ids_BL: Tensor, at: int) -> Tensor:
        run = model
        if forward is not None and ids_BL.shape[1] == 1:
            run = forward
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned has been read
        place_BL = torch.arange(at, at + ids_BL.shape[1], device=ids_BL.device)[None]
        return run(
            input_ids=ids_BL, position_ids=place_BL, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]

    return _loop(step, prompts, new_tokens, model.device)


@torch.no_grad()
def slot_cache(backbone: Backbone, prompts: Prompts, new_tokens: int) -> GenerationOutput:
    """Decode with a loop over the library's backbone and its preallocated cache, which shows what is filled alone."""
    num_tokens = backbone.contract.num_tokens
    head_VD = backbone.head_weight_VD[:num_tokens]
    cache = SlotCache(backbone.num_layers, len(prompts[0]) + new_tokens)

    def step(ids_BL: Tensor, at: int) -> Tensor:
        states_BLD = backbone.hidden(ids_BL, causal=ids_BL.shape[1] > 1, cache=cache.at(at))
        return states_BLD[:, -1] @ head_VD.T

    return _loop(step, prompts, new_tokens, backbone.device)


def _loop(
    step: Callable[[Tensor, int], Tensor], prompts: Prompts, new_tokens: int, device: torch.device
) -> GenerationOutput:
    """Feed the prompt, then one token after the other; nothing is read back before the end but the first token."""
    start = time.perf_counter()
    first_token_s = 0.0
    ids_BL = torch.stack(list(prompts)).to(device)
    chosen, at = [ids_BL], 0
    for _ in range(new_tokens):
        logits_BV = step(ids_BL, at)
        at += ids_BL.shape[1]
        ids_BL = logits_BV.argmax(-1, keepdim=True)
        chosen.append(ids_BL)
        if len(chosen) == 2:
            if ids_BL.is_cuda:
                torch.cuda.synchronize()
            first_token_s = time.perf_counter() - start
    return _output(torch.cat(chosen, 1), new_tokens, first_token_s)


def _output(tokens_BC: Tensor, new_tokens: int, first_token_s: float) -> GenerationOutput:
    return GenerationOutput(
        sequences=list(tokens_BC.cpu()),
        new_tokens=[new_tokens] * len(tokens_BC),
        num_forwards=new_tokens,
        first_token_s=first_token_s,
    )
