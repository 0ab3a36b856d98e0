"""Left-to-right decoding with transformers' key-value cache: the reference rows' sampler.

A short loop of our own: HF `generate` spends a third of the time of a small model on a CPU outside the model.
B prompts, C longest prompt, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.methods.protocol import GenerationOutput, SamplingRequest


@torch.no_grad()
def decode(backbone: Backbone, prompts: Sequence[Tensor], request: SamplingRequest) -> GenerationOutput:
    """Continue each prompt token by token; one forward pass per token for the whole batch.

    Prompts of different length are padded on the left and give what each gives alone (fp32, barring near-ties).
    Sampling draws one number per token from a generator keyed by (seed, sample id). Mask and padding ids are never
    emitted.

    Args:
        backbone: run with causal attention; its mode is left alone, so put it in evaluation mode.
        prompts: 1-D int64 ids, at least one each.
        request: `num_steps` and `block_size` have no meaning here.

    Raises:
        DllmError: prompt and new tokens are more than the model has positions for.
    """
    assert prompts, "there is nothing to continue"
    assert all(len(prompt) for prompt in prompts), "every prompt holds at least one token"
    backbone.check_length(max(map(len, prompts)) + request.max_new_tokens)
    start = time.perf_counter()
    device = backbone.device
    rows = _Rows(prompts, device)
    draws_BT = _draws(len(prompts), request)
    stops = set(backbone.eos_token_ids) if request.stop_at_eos else set()
    cache = DynamicCache(config=backbone.config)
    chosen: list[Tensor] = []
    alive_B = torch.ones(len(prompts), dtype=torch.bool)
    first_token_s = 0.0
    input_BQ = rows.input_ids_BC
    for t in range(request.max_new_tokens):
        states_BQD = backbone.decoder(
            input_ids=input_BQ,
            past_key_values=cache,
            attention_mask=rows.mask(t),
            position_ids=rows.positions(t),
            is_causal=True,
            use_cache=True,
        ).last_hidden_state
        logits_BV = backbone.logits(states_BQD[:, -1])
        token_B = _pick(logits_BV, request.temperature, None if draws_BT is None else draws_BT[:, t])
        chosen.append(token_B.cpu())
        if t == 0:
            first_token_s = time.perf_counter() - start
        if stops:
            alive_B &= torch.tensor([int(i) not in stops for i in chosen[-1]])
            if not alive_B.any():
                break
        input_BQ = token_B[:, None]
    return _output(prompts, chosen, stops, first_token_s, request.record_history)


class _Rows:
    """Prompts padded on the left, with the masks and positions that padding needs (None where nothing is padded)."""

    def __init__(self, prompts: Sequence[Tensor], device: torch.device) -> None:
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self.input_ids_BC = torch.stack(
            [torch.cat([p.new_zeros(longest - n), p]) for p, n in zip(prompts, lengths, strict=True)]
        ).to(device)
        self._length_B1 = torch.tensor(lengths, device=device)[:, None]
        self._mask_BC: Tensor | None = None
        if min(lengths) < longest:
            self._mask_BC = torch.arange(longest, device=device) >= longest - self._length_B1

    def mask(self, t: int) -> Tensor | None:
        """Return [B, C + t], True on tokens: t tokens have been appended."""
        if self._mask_BC is None:
            return None
        return torch.nn.functional.pad(self._mask_BC, (0, t), value=True)

    def positions(self, t: int) -> Tensor | None:
        """Return positions of the tokens that are fed now: the prompt at first, then one each."""
        if self._mask_BC is None:
            return None
        if t == 0:
            return (self._mask_BC.long().cumsum(-1) - 1).clamp(min=0)
        return self._length_B1 + t - 1


def _draws(num_rows: int, request: SamplingRequest) -> Tensor | None:
    """Return U(0, 1) of shape [B, T], float64, one generator per row; None for greedy decoding."""
    if request.temperature == 0:
        return None
    source = NoiseSource(request.seed)
    ids = request.sample_ids if request.sample_ids is not None else range(num_rows)
    assert len(ids) == num_rows, "one sample id per prompt"
    generators = [source.generator(sample_id, 0, "ar decoding") for sample_id in ids]
    return torch.stack([torch.rand(request.max_new_tokens, generator=g, dtype=torch.float64) for g in generators])


def _pick(logits_BV: Tensor, temperature: float, draw_B: Tensor | None) -> Tensor:
    """Return the argmax, or the token at which the cumulative probability passes the draw."""
    if draw_B is None:
        return logits_BV.argmax(-1)
    cumulative_BV = (logits_BV / temperature).softmax(-1).double().cumsum(-1)
    total_B1 = cumulative_BV[:, -1:].contiguous()
    target_B1 = draw_B.to(logits_BV.device)[:, None] * total_B1
    # the first entry beyond the target: never one of probability 0, where the sum stands still
    index_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BV, total_B1)
    return torch.minimum(index_B1, last_B1)[:, 0]


def _output(
    prompts: Sequence[Tensor], chosen: list[Tensor], stops: set[int], first_token_s: float, history: bool
) -> GenerationOutput:
    tokens_BT = torch.stack(chosen, dim=1) if chosen else torch.zeros(len(prompts), 0, dtype=torch.long)
    news = []
    for token_T in tokens_BT:
        ends = [i for i, token in enumerate(token_T.tolist()) if token in stops]
        news.append(token_T[: ends[0] + 1] if ends else token_T)
    return GenerationOutput(
        sequences=[torch.cat([p.cpu(), new]) for p, new in zip(prompts, news, strict=True)],
        new_tokens=[len(new) for new in news],
        num_forwards=len(chosen),
        first_token_s=first_token_s,
        commit_step=[torch.arange(1, len(new) + 1, dtype=torch.int32) for new in news] if history else None,
    )
