"""Held-out text with a part taken out, and what a row fills in there. B sequences, L length.

Unlike a prediction under a mask, filling in is decoding: what was accepted early is what later passes read, so that
accepting too much at once shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.evals.estimates import SequenceSums
from dllm_core.evals.masked_accuracy import exact_ratio_mask
from dllm_core.evals.overlap import others, overlap_statistics
from dllm_core.evals.views import device_of
from dllm_core.methods.protocol import Method, SamplingRequest
from dllm_core.methods.requirements import Capabilities
from dllm_core.samplers.config import DiffusionGenerationConfig

Context = Literal["both sides", "left and own block", "left"]
"""What a row sees of the text around a gap. Accuracies under different ones are different tasks."""


@dataclass(frozen=True)
class Gaps:
    """Texts of which a part is missing.

    Attributes:
        ids: the whole texts, 1-D int64, unpadded.
        masks: bool of the same shapes; True where a token is missing. At least one each, never the first.
        sample_ids: the sequence each came from; keys the noise.
        groups: the document each came from, None where unknown.
    """

    ids: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    sample_ids: tuple[int, ...]
    groups: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Missing tokens of each text."""
        return tuple(int(m.sum()) for m in self.masks)

    @property
    def truths(self) -> tuple[Tensor, ...]:
        """The missing tokens of each text."""
        return tuple(ids[mask] for ids, mask in zip(self.ids, self.masks, strict=True))


def _gaps(batch: Batch, masked_BL: Tensor, groups: tuple[int, ...] | None) -> Gaps:
    """Take the first document of every row that has something masked in it."""
    first_BL = batch.document_BL == 0
    rows = [b for b in range(len(batch)) if bool((masked_BL[b] & first_BL[b]).any())]
    return Gaps(
        tuple(batch.input_ids_BL[b][first_BL[b]] for b in rows),
        tuple(masked_BL[b][first_BL[b]] for b in rows),
        tuple(batch.sample_ids[b] for b in rows),
        None if groups is None else tuple(groups[b] for b in rows),
    )


def middle_gaps(batch: Batch, size: int, groups: tuple[int, ...] | None) -> Gaps:
    """Take a stretch out of the middle of each response, so that it has text of the response on both sides.

    Args:
        batch: held-out sequences, on CPU; of packed ones the first document.
        size: tokens, at most half of the response; of a response in several pieces at most its middle piece.
        groups: document of each row.
    """
    masked_BL = torch.zeros_like(batch.response_BL)
    for row, response_L in enumerate(batch.response_BL & (batch.document_BL == 0)):
        places = response_L.nonzero()[:, 0].tolist()
        taken = min(size, len(places) // 2)
        if not taken:
            continue
        start = (len(places) - taken) // 2
        stretch = [p for i, p in enumerate(places[start : start + taken]) if p == places[start] + i]
        masked_BL[row, stretch] = True
    return _gaps(batch, masked_BL, groups)


def random_gaps(batch: Batch, ratio: float, noise: NoiseSource, groups: tuple[int, ...] | None) -> Gaps:
    """Take out tokens here and there: those that the masked accuracy at this ratio hides."""
    return _gaps(batch, exact_ratio_mask(batch, ratio, noise), groups)


def context_of(capabilities: Capabilities) -> Context | None:
    """Return what a row sees around a gap; None for rows that cannot fill one."""
    if capabilities.infill:
        return "both sides" if capabilities.bound_block_size is None else "left and own block"
    return "left" if capabilities.causal else None


@dataclass(frozen=True)
class Filling:
    """What a row put into the gaps.

    Attributes:
        tokens: of each gap.
        forwards: network passes each text takes by itself, whatever batch it was decoded in.
    """

    tokens: tuple[Tensor, ...]
    forwards: tuple[int, ...]


@torch.no_grad()
def fill(
    method: Method,
    gaps: Gaps,
    config_of: Callable[[int], DiffusionGenerationConfig],
    *,
    batch_size: int,
    on_done: Callable[[int], None] | None = None,
) -> Filling:
    """Fill gaps by unmasking; for rows with the capability `infill`.

    Args:
        method: the row.
        gaps: what to fill.
        config_of: missing tokens -> how to decode. Texts that miss equally many share batches, so that a setting which
            depends on the size of a gap does not depend on its company.
        batch_size: texts a call.
        on_done: called with the number of texts done.
    """
    tokens: dict[int, Tensor] = {}
    forwards: dict[int, int] = {}
    device = device_of(method)
    for size, members in _by_size(gaps).items():
        for start in range(0, len(members), batch_size):
            chunk = members[start : start + batch_size]
            output = method.fill(
                [gaps.ids[i].to(device) for i in chunk],
                [gaps.masks[i].to(device) for i in chunk],
                config_of(size),
                sample_ids=[gaps.sample_ids[i] for i in chunk],
            )
            assert output.commit_step is not None, "the number of passes of each text is read off its history"
            for i, ids, commits in zip(chunk, output.sequences, output.commit_step, strict=True):
                tokens[i] = ids.cpu()[gaps.masks[i]]
                # every pass of an unfinished text places a token, so the last placed one counts its passes
                forwards[i] = int(commits.max())
            if on_done:
                on_done(len(chunk))
    order = range(len(gaps))
    return Filling(tuple(tokens[i] for i in order), tuple(forwards[i] for i in order))


@torch.no_grad()
def continue_to_gap(
    method: Method, gaps: Gaps, *, seed: int, batch_size: int, on_done: Callable[[int], None] | None = None
) -> Filling:
    """Write into the gaps what follows from the text before them, greedily: all that a causal row can do."""
    tokens: dict[int, Tensor] = {}
    device = device_of(method)
    for size, members in _by_size(gaps).items():
        for start in range(0, len(members), batch_size):
            chunk = members[start : start + batch_size]
            prompts = [gaps.ids[i][: int(gaps.masks[i].int().argmax())].to(device) for i in chunk]
            request = SamplingRequest(
                max_new_tokens=size, num_steps=size, seed=seed, sample_ids=tuple(gaps.sample_ids[i] for i in chunk)
            )
            output = method.sample(prompts, request)
            for i, ids in zip(chunk, output.sequences, strict=True):
                tokens[i] = ids[-size:].cpu()
            if on_done:
                on_done(len(chunk))
    return Filling(tuple(tokens[i] for i in range(len(gaps))), gaps.sizes)


def _by_size(gaps: Gaps) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, size in enumerate(gaps.sizes):
        found.setdefault(size, []).append(index)
    return found


def matches(found: Sequence[Tensor], truths: Sequence[Tensor]) -> tuple[float, ...]:
    """Return how many tokens of each filling equal the truth at the same place."""
    return tuple(float((f[: len(t)] == t[: len(f)]).sum()) for f, t in zip(found, truths, strict=True))


def gap_figures(filling: Filling, gaps: Gaps) -> dict[str, Any]:
    """Return the accuracy of fillings, the overlap with the truth, and both with other texts' truth as the control.

    Returns:
        `accuracy` (`{"value", "se"}`, of tokens at their place), `accuracy_other` (against what is missing in up to 16
        other texts, of other documents where there are any; None with a single text), `accuracy_gain` (their
        paired difference), and `overlap_*` as in the frontier. Errors are clustered by document.
    """
    truths, sizes = gaps.truths, tuple(map(float, gaps.sizes))
    right = matches(filling.tokens, truths)
    control = tuple(
        math.fsum(matches([found] * len(partners), [truths[j] for j in partners])) / len(partners)
        for found, partners in zip(filling.tokens, others(len(gaps), gaps.groups), strict=True)
        if partners
    )
    figures: dict[str, Any] = {
        "accuracy": SequenceSums(right, sizes, gaps.groups).per_token().as_json(),
        "accuracy_other": None,
        "accuracy_gain": None,
    }
    if len(control) == len(right):
        gains = tuple(a - b for a, b in zip(right, control, strict=True))
        figures["accuracy_other"] = SequenceSums(control, sizes).per_token().value
        figures["accuracy_gain"] = SequenceSums(gains, sizes, gaps.groups).per_token().as_json()
    written, true = ([t.tolist() for t in texts] for texts in (filling.tokens, truths))
    return {**figures, **overlap_statistics(written, true, gaps.groups)}
