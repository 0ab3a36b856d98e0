"""Overlap with the true continuation, against naive counting and against its own control."""

from __future__ import annotations

import math
import random
from statistics import mean, stdev

import pytest

from dllm_core.evals.overlap import MAX_OTHERS, ngram_f1, others, overlap_statistics


def naive_f1(first: list[int], second: list[int], n: int) -> float:
    """Strike out one n-gram of the second text for every one of the first that is still there."""
    left = [tuple(second[i : i + n]) for i in range(len(second) - n + 1)]
    size_first, size_second, matched = max(0, len(first) - n + 1), len(left), 0
    for i in range(size_first):
        gram = tuple(first[i : i + n])
        if gram in left:
            left.remove(gram)
            matched += 1
    if not matched:
        return 0.0
    precision, recall = matched / size_first, matched / size_second
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_f1_is_the_harmonic_mean_of_precision_and_recall(n: int) -> None:
    draw = random.Random(n)
    for _ in range(50):
        a, b = ([draw.randrange(5) for _ in range(draw.randint(0, 12))] for _ in range(2))
        assert ngram_f1(a, b, n) == pytest.approx(naive_f1(a, b, n))
    assert ngram_f1([1, 2, 3], [1, 2, 3], n) == 1.0


def test_repeating_a_word_of_the_reference_does_not_pay() -> None:
    assert ngram_f1([1] * 6, [1, 2, 3, 4, 5, 6], 1) == pytest.approx(1 / 6)


def test_controls_are_of_other_documents_where_there_are_any() -> None:
    assert list(others(3, None)) == [[1, 2], [2, 0], [0, 1]]
    assert list(others(4, (0, 0, 1, 1))) == [[2, 3], [2, 3], [0, 1], [0, 1]]
    assert list(others(2, (0, 0))) == [[1], [0]], "one document: another place of it"
    assert list(others(1, None)) == [[]]
    assert {len(found) for found in others(40, tuple(range(40)))} == {MAX_OTHERS}


def test_a_text_that_ignores_its_prompt_gains_nothing() -> None:
    draw = random.Random(0)
    references = [[draw.randrange(30) for _ in range(20)] for _ in range(8)]
    followed = overlap_statistics(references, references, None)
    assert followed["overlap_1"] == followed["overlap_2"] == 1.0
    assert followed["overlap_1_gain"]["value"] > 0.5
    assert followed["overlap_1_gain"]["se"] < 0.1
    same = [references[0]] * 8  # one text, whatever the prompt
    ignored = overlap_statistics(same, references, None)
    assert ignored["overlap_1"] == pytest.approx(mean(naive_f1(references[0], r, 1) for r in references))
    assert ignored["overlap_1_gain"]["value"] == pytest.approx(0.0, abs=1e-12), (
        "each reference is a control equally often"
    )


def test_gain_is_paired_and_clustered_by_document() -> None:
    draw = random.Random(1)
    references = [[draw.randrange(6) for _ in range(10)] for _ in range(6)]
    texts = [[draw.randrange(6) for _ in range(10)] for _ in range(6)]
    groups = (0, 0, 1, 1, 2, 2)
    gains = []
    for i, text in enumerate(texts):
        control = [naive_f1(text, references[j], 2) for j in range(6) if groups[j] != groups[i]]
        gains.append(naive_f1(text, references[i], 2) - mean(control))
    found = overlap_statistics(texts, references, groups)
    assert found["overlap_2"] - found["overlap_2_other"] == pytest.approx(mean(gains))
    pairs = [mean(gains[i : i + 2]) for i in (0, 2, 4)]
    assert found["overlap_2_gain"]["value"] == pytest.approx(mean(gains))
    assert found["overlap_2_gain"]["se"] == pytest.approx(stdev(pairs) / math.sqrt(3))


def test_a_single_prompt_has_no_control() -> None:
    found = overlap_statistics([[1, 2]], [[1, 3]], None)
    assert (found["overlap_1"], found["overlap_1_other"], found["overlap_1_gain"]) == (0.5, None, None)
