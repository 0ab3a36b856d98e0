"""Text statistics on texts whose figures follow from a sentence of arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_core.evals.text_stats import (
    distinct,
    ngrams,
    repetition,
    shuffle_ngrams,
    text_statistics,
    unigram_entropy,
    unigram_entropy_se,
)


def test_entropy_is_per_text() -> None:
    assert unigram_entropy([[1, 2, 3, 4]]) == pytest.approx(math.log(4))
    assert unigram_entropy([[1, 1, 2, 2]]) == pytest.approx(math.log(2))
    assert unigram_entropy([[7] * 9, [8] * 9]) == 0.0, "two dull texts are not diverse for being dull differently"
    assert unigram_entropy([[5, 5], [1, 2]]) == pytest.approx(math.log(2) / 2)


def test_standard_error_of_the_entropy_is_over_texts() -> None:
    texts = [[1, 1], [1, 2], [1, 2], [1, 1]]
    spread = math.log(2) / math.sqrt(3)  # of 0, ln 2, ln 2, 0 about ln 2 / 2, with n - 1
    assert unigram_entropy_se(texts) == pytest.approx(spread / 2)
    assert math.isnan(unigram_entropy_se([[1, 2, 3]])), "one text has no spread"


def test_distinct_pools_the_texts() -> None:
    assert distinct([[1, 2, 3]], 1) == 1.0
    assert distinct([[1, 2, 3], [1, 2, 3]], 1) == 0.5, "a row that writes one text over and over shows"
    assert distinct([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)


def test_repetition_counts_second_occurrences_within_a_text() -> None:
    assert repetition([[1, 2, 3, 4, 5, 6]]) == 0.0
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repetition([[9] * 10]) == pytest.approx(6 / 7)
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0, "other texts do not count"


def test_ngrams() -> None:
    assert list(ngrams([1, 2, 3], 2)) == [(1, 2), (2, 3)]
    assert list(ngrams([1], 2)) == []


@pytest.mark.parametrize("n", [1, 3, 4])
def test_shuffle_keeps_pieces_and_breaks_their_order(n: int) -> None:
    ids = list(range(20))
    shuffled = shuffle_ngrams(ids, n, torch.Generator().manual_seed(0))
    assert sorted(shuffled) == ids
    assert shuffled != ids
    pieces = {tuple(ids[i : i + n]) for i in range(0, 20, n)}
    starts = {p[0]: p for p in pieces}
    at = 0
    while at < len(shuffled):
        piece = starts[shuffled[at]]
        assert tuple(shuffled[at : at + len(piece)]) == piece
        at += len(piece)


def test_figures_of_texts_that_are_too_short_are_absent() -> None:
    assert text_statistics([[1, 2]])["distinct_3"] is None
    assert text_statistics([[1, 2]])["repetition_4"] is None
    assert text_statistics([])["unigram_entropy_nats"] is None
