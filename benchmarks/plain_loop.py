"""The loops a peer would write over a plain transformers model: what ours is measured against.

`plain` runs the whole model at every step, head included, and takes softmax, confidence and entropy on every row of the
canvas. `masked_rows` is what a careful peer makes of it: the head, the softmax and the confidence of the rows that are
still masked, and nothing else. Both then commit the most confident masked tokens, with the same schedule, alignment and
tie rule as the library's `confidence`, so in fp32 the tokens are the same.

B batch, C canvas length, M masked rows of the batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.schedule import tokens_per_step


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    steps: int,
    mask_token_id: int,
    num_tokens: int,
    shifted: bool = True,
    masked_rows: bool = False,
) -> GenerationOutput:
    """Decode prompts of equal length greedily by confidence.

    Args:
        model: a converted model as transformers loads it.
        prompts: 1-D int64 ids, all of one length.
        max_new_tokens: tokens to generate.
        steps: denoising steps.
        mask_token_id: of the mask.
        num_tokens: ids from here on are never predicted.
        shifted: logits at i-1 predict token i.
        masked_rows: run the head on the rows that are still masked, not on all.
    """
    start = time.perf_counter()
    first_token_s = 0.0
    prompt_BP = torch.stack(list(prompts)).to(model.device)
    batch, prompt_length = prompt_BP.shape
    masks_BN = prompt_BP.new_full((batch, max_new_tokens), mask_token_id)
    canvas_BC = torch.cat((prompt_BP, masks_BN), dim=1)
    masked_BC = torch.arange(canvas_BC.shape[1], device=model.device).expand_as(canvas_BC) >= prompt_length
    counts = tokens_per_step(max_new_tokens, steps)
    for step, count in enumerate(counts):
        if masked_rows:
            num_masked = batch * sum(counts[step:])
            confidence_BC, token_BC = _read_masked_rows(model, canvas_BC, masked_BC, num_masked, num_tokens, shifted)
        else:
            confidence_BC, token_BC = _read_all_rows(model, canvas_BC, num_tokens, shifted)
        ranked_BC = torch.where(masked_BC, confidence_BC, -torch.inf)
        chosen_BK = ranked_BC.argsort(dim=-1, descending=True, stable=True)[:, :count]
        canvas_BC = canvas_BC.scatter(1, chosen_BK, token_BC.gather(1, chosen_BK))
        masked_BC = masked_BC.scatter(1, chosen_BK, False)
        if step == 0:
            if canvas_BC.is_cuda:
                torch.cuda.synchronize()
            first_token_s = time.perf_counter() - start
    return GenerationOutput(
        sequences=list(canvas_BC.cpu()),
        new_tokens=[max_new_tokens] * batch,
        num_forwards=len(counts),
        first_token_s=first_token_s,
    )


def _read_all_rows(model: PreTrainedModel, canvas_BC: Tensor, num_tokens: int, shifted: bool) -> tuple[Tensor, Tensor]:
    logits_BCV = model(input_ids=canvas_BC, is_causal=False, use_cache=False).logits
    if shifted:
        logits_BCV = torch.cat((logits_BCV[:, :1], logits_BCV[:, :-1]), dim=1)
    logits_BCV[..., num_tokens:] = -torch.inf
    probs_BCV = logits_BCV.float().softmax(-1)
    confidence_BC, token_BC = probs_BCV.max(-1)
    # peers compute the entropy beside the confidence, whichever the rule then reads
    (probs_BCV * probs_BCV.clamp(min=1e-10).log()).sum(-1)
    return confidence_BC, token_BC


def _read_masked_rows(
    model: Any, canvas_BC: Tensor, masked_BC: Tensor, num_masked: int, num_tokens: int, shifted: bool
) -> tuple[Tensor, Tensor]:
    hidden_BCD = model.base_model(input_ids=canvas_BC, is_causal=False, use_cache=False).last_hidden_state
    # the count is known from the schedule: a boolean index would wait for a GPU
    where_M = torch.nonzero_static(masked_BC.flatten(), size=num_masked)[:, 0]
    logits_MV = model.get_output_embeddings()(hidden_BCD.flatten(0, 1)[where_M - int(shifted)])
    logits_MV[:, num_tokens:] = -torch.inf
    confidence_M, token_M = logits_MV.float().softmax(-1).max(-1)
    confidence_BC = confidence_M.new_zeros(canvas_BC.numel()).index_copy_(0, where_M, confidence_M).view_as(canvas_BC)
    token_BC = token_M.new_zeros(canvas_BC.numel()).index_copy_(0, where_M, token_M).view_as(canvas_BC)
    return confidence_BC, token_BC
