"""The loops of benchmarks/ that ours is measured against give the tokens that ours gives."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain_loop
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.tiny import NUM_TOKENS, tiny_backbone


@pytest.mark.parametrize("masked_rows", [False, True])
@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("steps", [1, 4, 7, 40])
def test_same_tokens_in_fp32(family: str, steps: int, alignment: str, masked_rows: bool) -> None:
    backbone = tiny_backbone(family, alignment=alignment)
    prompts = list(torch.randint(1, NUM_TOKENS, (3, 6)))
    config = DiffusionGenerationConfig(max_new_tokens=25, max_denoising_steps=steps, stop_at_eos=False)
    ours = generate(backbone, prompts, config)
    head_rows: list[int] = []
    handle = backbone.model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: head_rows.append(args[0].shape[:-1].numel())
    )
    plain = plain_loop.generate(
        backbone.model,
        prompts,
        max_new_tokens=25,
        steps=steps,
        mask_token_id=backbone.contract.mask_token_id,
        num_tokens=NUM_TOKENS,
        shifted=alignment == "shifted",
        masked_rows=masked_rows,
    )
    handle.remove()
    assert ours.num_forwards == plain.num_forwards == min(steps, 25)
    for a, b in zip(ours.sequences, plain.sequences, strict=True):
        assert torch.equal(a, b)
    if not masked_rows:
        assert head_rows == [3 * 31] * plain.num_forwards
    else:
        passes = plain.num_forwards
        per_pass = [25 // passes + (i < 25 % passes) for i in range(passes)]
        assert head_rows == [3 * (25 - sum(per_pass[:i])) for i in range(passes)], "masked rows and no others"
