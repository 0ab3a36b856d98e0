"""Statistics of generated text that a judge's perplexity alone does not show. All work on token ids."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

Ids = Sequence[int]


def ngrams(ids: Ids, n: int) -> Iterator[tuple[int, ...]]:
    """Yield the n-grams of a sequence in order."""
    return zip(*(ids[i:] for i in range(n)), strict=False)


def unigram_entropies(texts: Sequence[Ids]) -> list[float]:
    """Return the entropy of the token frequencies within each text, in nats.

    Depends on length (at most ln(length)), so compare texts of equal length only.
    """
    entropies = []
    for ids in texts:
        total = len(ids)
        entropies.append(-sum(c / total * math.log(c / total) for c in Counter(ids).values()) if total else 0.0)
    return entropies


def unigram_entropy(texts: Sequence[Ids]) -> float:
    """Return the mean of `unigram_entropies`."""
    entropies = unigram_entropies(texts)
    return math.fsum(entropies) / len(entropies) if entropies else math.nan


def unigram_entropy_se(texts: Sequence[Ids]) -> float:
    """Return the standard error of `unigram_entropy` over the texts, taken as independent; nan for fewer than two."""
    entropies = unigram_entropies(texts)
    return statistics.stdev(entropies) / math.sqrt(len(entropies)) if len(entropies) > 1 else math.nan


def distinct(texts: Sequence[Ids], n: int) -> float:
    """Return distinct n-grams / n-grams over all texts together: low when texts repeat themselves or each other.

    Depends on the number and length of texts, so compare equal ones only (arXiv:1510.03055).
    """
    grams = [g for ids in texts for g in ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(texts: Sequence[Ids], n: int = 4) -> float:
    """Return the fraction of n-grams that occurred before in the same text."""
    total = repeated = 0
    for ids in texts:
        seen: set[tuple[int, ...]] = set()
        for gram in ngrams(ids, n):
            total += 1
            repeated += gram in seen
            seen.add(gram)
    return repeated / total if total else math.nan


def shuffle_ngrams(ids: Ids, n: int, generator: torch.Generator) -> list[int]:
    """Cut a text into consecutive n-grams and permute them: local order stays, everything longer is destroyed.

    n = 1 permutes the tokens. The last piece may be shorter.
    """
    pieces = [list(ids[i : i + n]) for i in range(0, len(ids), n)]
    order = torch.randperm(len(pieces), generator=generator).tolist()
    return [token for i in order for token in pieces[i]]


def text_statistics(texts: Sequence[Ids]) -> dict[str, float | None]:
    """Return entropy, distinct-1..3 and repetition; a figure that the texts are too short for is None."""
    figures = {
        "unigram_entropy_nats": unigram_entropy(texts),
        "unigram_entropy_se": unigram_entropy_se(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "distinct_3": distinct(texts, 3),
        "repetition_4": repetition(texts, 4),
    }
    return {name: None if math.isnan(value) else value for name, value in figures.items()}
