"""The loop a peer would write over a plain transformers model: what ours is measured against.

Every step runs the whole model, head included, and takes softmax, confidence and entropy on every row of the canvas;
then it commits the most confident masked tokens. Same schedule, same alignment and same tie rule as the library's
`confidence`, so in fp32 the tokens are the same. B batch, C canvas length, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

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
        logits_BCV = model(input_ids=canvas_BC, is_causal=False, use_cache=False).logits
        if shifted:
            logits_BCV = torch.cat((logits_BCV[:, :1], logits_BCV[:, :-1]), dim=1)
        logits_BCV[..., num_tokens:] = -torch.inf
        probs_BCV = logits_BCV.float().softmax(-1)
        confidence_BC, token_BC = probs_BCV.max(-1)
        # peers compute the entropy beside the confidence, whichever the rule then reads
        (probs_BCV * probs_BCV.clamp(min=1e-10).log()).sum(-1)
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
