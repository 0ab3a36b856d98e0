"""AUP against a naive float64 reading of its definition, against areas known in closed form, and at its edges."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from dllm_core.evals.aup import CurvePoint, aup, aup_estimate, weight


def naive(points: Sequence[tuple[float, float]], best: float) -> float:
    """The definition, term by term: rho_1 y_1 + sum_{i >= 2} 1/2 (rho_i - rho_{i-1}) (y_i W_i + y_{i-1} W_{i-1})."""
    rho = [r for r, _ in sorted(points)]
    y = [a for _, a in sorted(points)]
    kept = [i for i in range(len(y)) if y[i] >= y[0] - 5.0]
    rho, y = [rho[i] for i in kept], [y[i] for i in kept]
    total = rho[0] * y[0]
    for i in range(1, len(y)):
        w_i = min(math.e ** (-3.0 * (1.0 - y[i] / best)), 1.0)
        w_before = min(math.e ** (-3.0 * (1.0 - y[i - 1] / best)), 1.0)
        total += 0.5 * (rho[i] - rho[i - 1]) * (y[i] * w_i + y[i - 1] * w_before)
    return total


def test_it_is_the_definition_on_random_curves() -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.uniform(1, 30), rng.uniform(40, 60)) for _ in range(rng.randint(1, 8))]
        best = max(y for _, y in points) + rng.choice([0.0, 0.0, 7.0])
        rng.shuffle(points)
        assert aup(points, best) == pytest.approx(naive(points, best), rel=1e-12)


def test_a_flat_curve_at_the_best_accuracy_is_a_rectangle() -> None:
    assert aup([(1, 80), (3, 80), (9, 80)], 80) == pytest.approx(9 * 80)


def test_a_single_point_is_its_rectangle_without_weight() -> None:
    assert aup([(4.0, 50.0)], 80.0) == pytest.approx(200.0)


def test_two_points_by_hand() -> None:
    # W(80) = 1, W(78) = exp(-3 (1 - 78/80))
    by_hand = 1 * 80 + 0.5 * (5 - 1) * (78 * math.exp(-0.075) + 80)
    assert aup([(1, 80), (5, 78)], 80) == pytest.approx(by_hand, rel=1e-12)


def test_a_point_below_the_cut_is_left_out_and_one_behind_it_counts_again() -> None:
    with_dip = [(1, 80), (2, 74.9), (4, 79), (8, 60)]
    assert aup(with_dip, 80) == pytest.approx(naive([(1, 80), (4, 79)], 80))
    assert aup([(1, 80), (2, 75.0)], 80) > aup([(1, 80)], 80), "exactly at the cut it stays"


def test_a_first_point_that_is_not_the_best_sets_the_cut() -> None:
    """Non-monotone: accuracy rises; W is capped at 1 only at y_max, and the cut hangs on the least parallel point."""
    rising = [(1, 60), (2, 70), (4, 66)]
    assert aup(rising, 70) == pytest.approx(naive(rising, 70))
    assert weight(75, 70) == 1.0


def test_order_does_not_matter_and_of_equal_parallelism_the_best_counts() -> None:
    points = [(1.0, 70.0), (3.0, 69.0), (3.0, 60.0), (6.0, 68.0)]
    assert aup(points, 70) == aup(points[::-1], 70) == aup([p for p in points if p != (3.0, 60.0)], 70)


def test_nothing_right_and_nothing_measured() -> None:
    assert aup([(1, 0.0), (4, 0.0)], 0.0) == 0.0
    assert aup([], 50.0) is None


# -- with an error ----------------------------------------------------------------------------------------------------


def curve(rng: random.Random, documents: int, per_document: int) -> list[CurvePoint]:
    count = documents * per_document
    groups = tuple(i // per_document for i in range(count))
    tokens = (32.0,) * count
    points = []
    for forwards, chance in ((32, 0.52), (8, 0.51), (4, 0.5)):
        right = tuple(float(sum(rng.random() < chance for _ in range(32))) for _ in range(count))
        points.append(CurvePoint(right, tokens, (float(forwards),) * count, groups))
    return points


def test_the_estimate_is_the_area_of_the_pooled_points() -> None:
    points = curve(random.Random(1), 6, 2)
    found = aup_estimate(points, 60.0)
    assert found is not None
    places = [(sum(p.tokens) / sum(p.forwards), 100 * sum(p.right) / sum(p.tokens)) for p in points]
    assert found.value == pytest.approx(naive(places, 60.0))


def test_the_error_is_a_jackknife_over_documents() -> None:
    points = curve(random.Random(2), 5, 3)
    found = aup_estimate(points, 60.0)
    assert found is not None
    left_out = []
    for document in range(5):
        kept = [i for i in range(15) if i // 3 != document]
        left_out.append(
            naive(
                [
                    (
                        sum(p.tokens[i] for i in kept) / sum(p.forwards[i] for i in kept),
                        100 * sum(p.right[i] for i in kept) / sum(p.tokens[i] for i in kept),
                    )
                    for p in points
                ],
                60.0,
            )
        )
    mean = sum(left_out) / 5
    assert found.se == pytest.approx(math.sqrt(4 / 5 * sum((v - mean) ** 2 for v in left_out)))


def test_of_a_single_point_the_jackknife_is_the_textbook_error_of_a_mean() -> None:
    right = (10.0, 14.0, 11.0, 17.0, 12.0)
    point = CurvePoint(right, (20.0,) * 5, (10.0,) * 5)
    found = aup_estimate([point], 100.0)
    assert found is not None
    mean = sum(right) / 5
    sd = math.sqrt(sum((r - mean) ** 2 for r in right) / 4)
    # rho = 2, y = 100 right / 20
    assert found.value == pytest.approx(2 * 100 * mean / 20)
    assert found.se == pytest.approx(2 * 100 / 20 * sd / math.sqrt(5))


def test_one_document_has_no_error_and_no_curve_no_estimate() -> None:
    (point, *_) = curve(random.Random(3), 1, 4)
    found = aup_estimate([point], 60.0)
    assert found is not None
    assert found.se is None
    assert aup_estimate([], 60.0) is None


def test_points_survive_json() -> None:
    for point in (*curve(random.Random(4), 2, 2), CurvePoint((1.0,), (2.0,), (2.0,))):
        assert CurvePoint.from_json(point.as_json()) == point
