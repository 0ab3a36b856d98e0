"""Left-to-right decoding with kept keys and values: the reference rows' sampler, and what diffusion is compared with.

It goes through the same passes as diffusion (`passes`), so that neither side of the comparison has better kernels:
the prompts in one causal pass, then one token of every row behind what is kept of those before it.

B prompts, C longest prompt, T new tokens, D hidden, W ids that stand for tokens, M slots that a pass shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_core.backbone import masks
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.passes.choice import pass_for
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.corruption.noise import NoiseSource
from dllm_core.layers.packed_linear import linear
from dllm_core.methods.protocol import GenerationOutput, SamplingRequest

OnToken = Callable[[Tensor, Tensor], None]
"""Called with what a pass chose, int64 [B], and bool [B], False for rows that ended before; both on the CPU."""


@torch.no_grad()
def decode(
    backbone: Backbone, prompts: Sequence[Tensor], request: SamplingRequest, *, on_token: OnToken | None = None
) -> GenerationOutput:
    """Continue each prompt token by token; one forward pass per token for the whole batch.

    Prompts of different length are padded on the left and give what each gives alone (fp32, barring near-ties).
    Sampling draws one number per token from a generator keyed by (seed, sample id). Mask and padding ids are never
    emitted.

    Args:
        backbone: its attention is run causally; its mode is left alone, so put it in evaluation mode.
        prompts: 1-D int64 ids, at least one each.
        request: `num_steps` and `block_size` have no meaning here.
        on_token: called after each pass; the tokens of rows that have not ended are those returned.

    Raises:
        DllmError: prompt and new tokens are more than the model has positions for.
    """
    assert prompts, "there is nothing to continue"
    assert all(len(prompt) for prompt in prompts), "every prompt holds at least one token"
    backbone.check_length(max(map(len, prompts)) + request.max_new_tokens)
    start = time.perf_counter()
    passes = _Passes(backbone, prompts, request.max_new_tokens)
    draws_BT = _draws(len(prompts), request)
    stops = set(backbone.eos_token_ids) if request.stop_at_eos else set()
    chosen: list[Tensor] = []
    alive_B = torch.ones(len(prompts), dtype=torch.bool)
    first_token_s = 0.0
    for t in range(request.max_new_tokens):
        logits_BW = passes.next_logits(chosen[-1] if chosen else None)
        chosen.append(_pick(logits_BW, request.temperature, None if draws_BT is None else draws_BT[:, t]))
        if t and not stops and on_token is None:
            continue  # nobody asks what it is: a device need not be waited for
        token_B = chosen[-1].cpu()
        if t == 0:
            first_token_s = time.perf_counter() - start
        if on_token is not None:
            on_token(token_B, alive_B.clone())
        if stops:
            alive_B &= torch.tensor([token not in stops for token in token_B.tolist()])
            if not alive_B.any():
                break
    return _output(prompts, chosen, stops, first_token_s, request.record_history)


class _Passes:
    """The forward passes of one decode.

    Rows end at the same slot: prompts are padded on the left, nobody sees the padding, and positions are counted from a
    row's first token. So a pass writes one slot, and reads all slots up to it.

    Args:
        backbone: the model.
        prompts: 1-D ids.
        max_new_tokens: most tokens that are chosen; the last of them is fed to no pass.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[Tensor], max_new_tokens: int) -> None:
        device, lengths = backbone.device, [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self._prompt_BC = torch.stack(
            [torch.cat([p.new_zeros(longest - n), p]) for p, n in zip(prompts, lengths, strict=True)]
        ).to(device)
        self._run = pass_for(backbone)
        self._filled, capacity = 0, max(longest, longest + max_new_tokens - 1)
        self._cache = SlotCache(backbone.num_layers, capacity)
        self._first_B1 = torch.tensor([longest - n for n in lengths], device=device)[:, None]
        place_1M = torch.arange(capacity, device=device)[None]
        self._position_BM, self._seen_B11M = place_1M, None
        if min(lengths) < longest:
            self._position_BM = (place_1M - self._first_B1).clamp(min=0)
            self._seen_B11M = (place_1M >= self._first_B1)[:, None, None]

    def next_logits(self, token_B: Tensor | None) -> Tensor:
        """Return logits [B, W] in fp32 of what follows the prompts, or the tokens chosen last."""
        states_BD = self._prompts() if token_B is None else self._tokens(token_B)
        return linear(states_BD, self._run.head_WD).float()

    def _prompts(self) -> Tensor:
        batch, length = self._prompt_BC.shape
        mask = masks.causal_mask(length, self._prompt_BC.device)
        if self._seen_B11M is not None:
            documents_BC = self._seen_B11M[:, 0, 0, :length].long() - 1
            mask = masks.document_mask(documents_BC, causal=True)
        self._filled = length
        return self._run(
            self._prompt_BC,
            row_M=torch.arange(1, batch + 1, device=mask.device) * length - 1,
            position_BL=self._position_BM[:, :length],
            attention_mask_B1LM=mask,
            cache=self._cache.at(0),
        )

    def _tokens(self, token_B: Tensor) -> Tensor:
        at = self._filled
        self._filled += 1
        return self._run(
            token_B[:, None],
            position_BL=self._position_BM[:, at : at + 1],
            attention_mask_B1LM=None if self._seen_B11M is None else self._seen_B11M[..., : at + 1],
            cache=self._cache.at(at),
        ).flatten(0, 1)


def _draws(num_rows: int, request: SamplingRequest) -> Tensor | None:
    """Return U(0, 1) of shape [B, T], float64, one generator per row; None for greedy decoding."""
    if request.temperature == 0:
        return None
    source = NoiseSource(request.seed)
    ids = request.sample_ids if request.sample_ids is not None else range(num_rows)
    assert len(ids) == num_rows, "one sample id per prompt"
    generators = [source.generator(sample_id, 0, "ar decoding") for sample_id in ids]
    return torch.stack([torch.rand(request.max_new_tokens, generator=g, dtype=torch.float64) for g in generators])


def _pick(logits_BW: Tensor, temperature: float, draw_B: Tensor | None) -> Tensor:
    """Return the argmax, or the token at which the cumulative probability passes the draw."""
    if draw_B is None:
        return logits_BW.argmax(-1)
    cumulative_BW = (logits_BW / temperature).softmax(-1).double().cumsum(-1)
    total_B1 = cumulative_BW[:, -1:].contiguous()
    target_B1 = draw_B.to(logits_BW.device)[:, None] * total_B1
    # the first entry beyond the target: never one of probability 0, where the sum stands still
    index_B1 = torch.searchsorted(cumulative_BW, target_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BW, total_B1)
    return torch.minimum(index_B1, last_B1)[:, 0]


def _output(
    prompts: Sequence[Tensor], chosen: list[Tensor], stops: set[int], first_token_s: float, history: bool
) -> GenerationOutput:
    tokens_BT = torch.stack(chosen, dim=1).cpu() if chosen else torch.zeros(len(prompts), 0, dtype=torch.long)
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
