"""Everything measured of one row, as far as its capabilities allow. Knows the protocol, not the methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.evals.diagnostics import diagnostics
from dllm_core.evals.estimates import SequenceSums
from dllm_core.evals.frontier import Frontier, frontier
from dllm_core.evals.judge import Judge
from dllm_core.evals.likelihood import exact_nll
from dllm_core.evals.masked_accuracy import masked_accuracy, prediction_strip
from dllm_core.evals.nelbo import block_nelbo, nelbo, num_block_views
from dllm_core.evals.prompts import Prompts, prompts_of
from dllm_core.evals.unigram import unigram_nll
from dllm_core.methods.protocol import Method, Resources

STRIP_RATIO = 0.5
NUM_SAMPLES = 2

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is measured and how precisely. Every row of a grid gets the same.

    Attributes:
        nelbo_sequences: held-out sequences of the bounds and the exact likelihood.
        nelbo_samples: Monte Carlo samples a sequence, for each bound.
        block_size: tokens a block of the block-wise bound.
        mask_ratios: ratios at which hidden tokens are predicted.
        mask_ratio_sequences: held-out sequences of that.
        frontier_temperatures: sampling temperatures.
        frontier_samples: continuations a temperature.
        frontier_steps: denoising steps a continuation.
        prompt_tokens: prompt length where the text has no prompts of its own.
        response_tokens: tokens a continuation.
        batch_size: sequences a forward pass.
        seed: of masks, counts and sampling: the same for all rows, whatever they were trained with.
    """

    nelbo_sequences: int
    nelbo_samples: int
    block_size: int
    mask_ratios: tuple[float, ...]
    mask_ratio_sequences: int
    frontier_temperatures: tuple[float, ...]
    frontier_samples: int
    frontier_steps: int
    prompt_tokens: int
    response_tokens: int
    batch_size: int = 8
    seed: int = 0


class _Meter:
    """Adds up finished views and continuations for the progress line."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.total, self.done, self.doing, self._report = total, 0, "", on_progress

    def start(self, doing: str) -> Callable[[int], None]:
        self.doing = doing
        return self._add

    def _add(self, count: int) -> None:
        self.done = min(self.total, self.done + count)
        if self._report:
            self._report(self.done, self.total, self.doing)


def heldout_prompts(heldout: SequenceSet, settings: EvalSettings) -> Prompts:
    """Return the prompts of the frontier: the same for every row and for the reference text."""
    found = prompts_of(
        _head(heldout, len(heldout)),
        prompt_tokens=settings.prompt_tokens,
        response_tokens=settings.response_tokens,
        limit=settings.frontier_samples,
    )
    return replace(found, groups=heldout.groups(found.sample_ids))


def evaluate(
    method: Method,
    heldout: SequenceSet,
    settings: EvalSettings,
    *,
    train_counts_V: Tensor,
    judge: Judge,
    reference_text: dict[str, Any],
    tokenizer: Any,
    dtype: str,
    resources: Resources | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Return the metrics of one row, JSON-able.

    Args:
        method: a trained room, in evaluation mode.
        heldout: held-out sequences.
        settings: how much to measure.
        train_counts_V: token frequencies of the training responses, for the unigram floor.
        judge: scores generated text.
        reference_text: figures of the held-out continuations (`reference_statistics`), the same for all rows.
        tokenizer: decodes samples.
        dtype: name of the compute type, for the record.
        resources: stores for the room's figures of health, with the held-out sequences in them; None: no such figures.
        on_progress: called with (done, total, what is being measured).
    """
    started = time.perf_counter()
    noise = NoiseSource(settings.seed)
    batch = _head(heldout, settings.nelbo_sequences)
    masked = _head(heldout, settings.mask_ratio_sequences)
    prompts = heldout_prompts(heldout, settings)
    meter = _Meter(_work(method, batch, masked, prompts, settings), on_progress)
    found = _likelihoods(method, batch, settings, noise, meter)
    likelihoods = {name: sums.grouped(heldout.groups(batch.sample_ids)) for name, sums in found.items()}
    metrics: dict[str, Any] = {
        **_likelihood_metrics(likelihoods, heldout.num_bytes_N[: len(batch)].tolist()),
        "block_size": method.capabilities.bound_block_size or settings.block_size,
        "unigram_nats_per_token": unigram_nll(batch, train_counts_V, heldout.num_tokens).per_token().value,
        **_masked_metrics(method, masked, heldout.groups(masked.sample_ids), settings, noise, meter),
        "prediction_strip": _strip(method, batch, noise, tokenizer) if method.capabilities.nelbo else None,
    }
    metrics |= _text_metrics(method, prompts, judge, settings, noise, tokenizer, meter)
    metrics |= {
        "diagnostics": diagnostics(method, batch, resources, noise),
        "reference_text": reference_text,
        "num_sequences": len(batch),
        "num_documents": _num_documents(heldout, batch),
        "num_scored_tokens": int(batch.response_BL.sum()),
        "dtype": dtype,
        "per_sequence": {name: sums.as_json() for name, sums in likelihoods.items()},
        "eval_s": time.perf_counter() - started,
    }
    return metrics


def _head(heldout: SequenceSet, count: int) -> Batch:
    return heldout.batch_of(range(min(count, len(heldout))))


def _num_documents(heldout: SequenceSet, batch: Batch) -> int | None:
    groups = heldout.groups(batch.sample_ids)
    return None if groups is None else len(set(groups))


def _work(method: Method, batch: Batch, masked: Batch, prompts: Prompts, settings: EvalSettings) -> int:
    """Return how many views and continuations there are to do."""
    work = len(prompts) * len(settings.frontier_temperatures)
    if method.capabilities.exact_likelihood:
        work += len(batch)
    if method.capabilities.nelbo:
        work += len(batch) * settings.nelbo_samples
        if method.capabilities.bound_block_size is None:
            work += num_block_views(batch, settings.nelbo_samples, settings.block_size)
        work += len(masked) * len(settings.mask_ratios)
    return work


def _likelihoods(
    method: Method, batch: Batch, settings: EvalSettings, noise: NoiseSource, meter: _Meter
) -> dict[str, SequenceSums]:
    found = {}
    size = settings.batch_size
    if method.capabilities.exact_likelihood:
        found["exact"] = exact_nll(method, batch, batch_size=size, on_views=meter.start("likelihood"))
    if method.capabilities.nelbo:
        samples, by_block = settings.nelbo_samples, method.capabilities.bound_block_size is not None
        # where every token is scored behind a clean prefix, whatever is hidden there, views of the whole response give
        # the bound of all blocks at once: to a block, its own masks are those of a rate t, whatever the others' are
        found["block_nelbo" if by_block else "nelbo"] = nelbo(
            method, batch, samples=samples, noise=noise, batch_size=size, on_views=meter.start("NELBO")
        )
        if by_block:
            return found
        found["block_nelbo"] = block_nelbo(
            method,
            batch,
            samples=samples,
            block_size=settings.block_size,
            noise=noise,
            batch_size=size,
            on_views=meter.start("block NELBO"),
        )
    return found


def _likelihood_metrics(found: dict[str, SequenceSums], num_bytes: list[float]) -> dict[str, Any]:
    """Return estimates; bits per byte are the exact ones where there are, else the bound's."""
    estimates = {name: sums.per_token() for name, sums in found.items()}
    metrics: dict[str, Any] = {
        f"{name}_nats_per_token": estimates[name].as_json() if name in estimates else None
        for name in ("exact", "nelbo", "block_nelbo")
    }
    metrics["perplexity"] = math.exp(estimates["exact"].value) if "exact" in estimates else None
    bound = "nelbo" if "nelbo" in found else "block_nelbo"
    metrics["ppl_bound"] = math.exp(estimates[bound].value) if bound in estimates else None
    headline = found.get("exact") or found.get(bound)
    metrics["bits_per_byte"] = headline.bits_per_byte(num_bytes) if headline and sum(num_bytes) else None
    return metrics


def _masked_metrics(
    method: Method,
    batch: Batch,
    groups: tuple[int, ...] | None,
    settings: EvalSettings,
    noise: NoiseSource,
    meter: _Meter,
) -> dict[str, Any]:
    if not method.capabilities.nelbo:
        return {"masked_accuracy": {}, "masked_nll": {}}
    found = masked_accuracy(
        method,
        batch,
        ratios=settings.mask_ratios,
        noise=noise,
        batch_size=settings.batch_size,
        on_views=meter.start("masked accuracy"),
    )
    return {
        "masked_accuracy": {f"{r:g}": s.accuracy.grouped(groups).per_token().as_json() for r, s in found.items()},
        "masked_nll": {f"{r:g}": s.nll.grouped(groups).per_token().as_json() for r, s in found.items()},
    }


def _text_metrics(
    method: Method,
    prompts: Prompts,
    judge: Judge,
    settings: EvalSettings,
    noise: NoiseSource,
    tokenizer: Any,
    meter: _Meter,
) -> dict[str, Any]:
    written = frontier(
        method,
        prompts,
        judge,
        noise,
        temperatures=settings.frontier_temperatures,
        new_tokens=settings.response_tokens,
        steps=settings.frontier_steps,
        batch_size=settings.batch_size,
        record_history=method.capabilities.unmasking,
        on_done=meter.start("generation"),
    )
    return {
        "frontier": written.points,
        "samples": _samples(written, prompts, tokenizer, settings.frontier_steps),
        "history": _history(written, prompts, tokenizer),
    }


def _pieces(tokenizer: Any, ids: Tensor) -> list[str]:
    return [tokenizer.decode([i]) for i in ids.tolist()]


def _strip(method: Method, batch: Batch, noise: NoiseSource, tokenizer: Any) -> dict[str, Any]:
    real_L = batch.document_BL[0] >= 0
    return {
        "tokens": _pieces(tokenizer, batch.input_ids_BL[0][real_L]),
        "state": prediction_strip(method, batch, ratio=STRIP_RATIO, noise=noise),
        "mask_ratio": STRIP_RATIO,
    }


def _samples(written: Frontier, prompts: Prompts, tokenizer: Any, steps: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": tokenizer.decode(prompts.ids[i].tolist()),
            "continuation": tokenizer.decode(texts.tokens[i].tolist()),
            "temperature": texts.temperature,
            "steps": steps,
        }
        for i in range(min(NUM_SAMPLES, len(prompts)))
        for texts in written.continuations
    ]


def _history(written: Frontier, prompts: Prompts, tokenizer: Any) -> dict[str, Any] | None:
    """Return the order in which the first continuation at the lowest temperature was committed."""
    texts = written.continuations[0] if written.continuations else None
    if texts is None or not texts.commit_step:
        return None
    return {
        "prompt": _pieces(tokenizer, prompts.ids[0]),
        "tokens": _pieces(tokenizer, texts.tokens[0]),
        "reference": _pieces(tokenizer, prompts.references[0]),
        "commit_step": texts.commit_step[0].tolist(),
    }
