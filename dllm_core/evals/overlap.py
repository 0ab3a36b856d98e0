"""How much of the true continuation a generated one shares, against what it shares with continuations of other prompts.

The one figure of generated text that needs no judge and that a fluent text which ignores its prompt cannot raise: its
overlap with its own reference is then no larger than with another prompt's. All work on token ids.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dllm_core.evals.estimates import SequenceSums
from dllm_core.evals.text_stats import Ids, ngrams

SIZES = (1, 2)
"""Of the n-grams."""
MAX_OTHERS = 16
"""Other prompts' references a continuation is compared with: the mean over several is a steadier control than one."""


def ngram_f1(first: Ids, second: Ids, n: int) -> float:
    """Return the F1 of shared n-grams, each counted as often as both have it (ROUGE-n, Lin 2004): 0 to 1, symmetric."""
    a, b = Counter(ngrams(first, n)), Counter(ngrams(second, n))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 0.0


def others(count: int, groups: Sequence[int] | None) -> Iterator[list[int]]:
    """Yield for each of `count` prompts the prompts that serve as its control, by rotation.

    Those of another document where there are any, since two places of one document share words whatever the prompt.
    """
    for i in range(count):
        rotated = [(i + shift) % count for shift in range(1, count)]
        foreign = [j for j in rotated if groups is not None and groups[j] != groups[i]]
        yield (foreign or rotated)[:MAX_OTHERS]


def overlap_statistics(texts: Sequence[Ids], references: Sequence[Ids], groups: Sequence[int] | None) -> dict[str, Any]:
    """Return the overlap of continuations with their references, and with other prompts' as the control.

    Args:
        texts: continuations.
        references: what really followed each prompt.
        groups: document of each prompt, None where unknown; standard errors are clustered by it.

    Returns:
        For n = 1, 2: `overlap_n` (mean F1 with the own reference), `overlap_n_other` (with other prompts' references;
        None with a single prompt) and `overlap_n_gain` (their paired difference, `{"value", "se"}`, or None).
    """
    found: dict[str, Any] = {}
    for n in SIZES:
        own = [ngram_f1(text, reference, n) for text, reference in zip(texts, references, strict=True)]
        control = [
            math.fsum(ngram_f1(text, references[j], n) for j in partners) / len(partners)
            for text, partners in zip(texts, others(len(texts), groups), strict=True)
            if partners
        ]
        found[f"overlap_{n}"] = math.fsum(own) / len(own) if own else None
        paired = len(own) if len(own) == len(control) else 0
        found[f"overlap_{n}_other"] = math.fsum(control) / paired if paired else None
        gains = tuple(a - b for a, b in zip(own, control, strict=True)) if paired else ()
        sums = SequenceSums(gains, (1.0,) * len(gains), None if groups is None else tuple(groups[: len(gains)]))
        found[f"overlap_{n}_gain"] = sums.per_token().as_json() if gains else None
    return found
