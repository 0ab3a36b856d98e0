"""Differences that hold together: Student's t, pooled seeds, many pairs at once, few rounds, rows of one seed."""

from __future__ import annotations

import math
import random
from statistics import mean, stdev
from typing import Any

import pytest

from dllm_core.evals.intervals import positive_median_interval, ratio_interval, student_probability, student_quantile
from dllm_core.evals.throughput import Timing, summary
from steps.report import notes
from steps.report.cells import Spread, gather
from steps.report.compare import concluded, contrasts, speed_contrasts
from steps.report.schema import Results, Tie
from tests.report_rows import Made, made_up

SEEDS = (0, 1, 2)
TWO = {"a": Made(5.0, offsets=(0.02, 0.0, -0.01)), "b": Made(5.2, offsets=(0.0, 0.03, 0.01))}


def density(t: float, df: int) -> float:
    log = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return math.exp(log - (df + 1) / 2 * math.log1p(t * t / df))


@pytest.mark.parametrize("df", [1, 2, 3, 4, 6, 11])
def test_student_against_its_density(df: int) -> None:
    """Simpson's rule over the density is the oracle; the quantile inverts the probability."""
    t, count = 2.7, 2000
    width = t / count
    weights = [1, *(4 if i % 2 else 2 for i in range(1, count)), 1]
    inside = 2 * width / 3 * sum(w * density(i * width, df) for i, w in enumerate(weights))
    assert student_probability(t, df) == pytest.approx(inside, abs=1e-9)
    assert student_probability(student_quantile(0.99, df), df) == pytest.approx(0.99, abs=1e-12)


def test_student_quantiles_of_the_tables() -> None:
    assert [student_quantile(0.95, df) for df in (1, 2, 5, 30)] == pytest.approx(
        [12.7062, 4.3027, 2.5706, 2.0423], abs=1e-4
    )


def test_two_rounds_give_no_negative_speed() -> None:
    timings = [Timing(seconds, 128, 8, 0.1, 1) for seconds in (1.0, 1.6)]
    low, high = summary(timings)["tokens_per_s"]["ci95"]
    assert 0 < low < 80.0 < 128.0 < high
    alone = positive_median_interval([100.0])
    assert (alone.value, alone.low, alone.high) == (100.0, None, None)


def test_a_negative_interval_of_an_old_report_is_not_shown() -> None:
    results = made_up({"a": Made(5.0)})
    steps = results.cells[0].bench.steps if results.cells[0].bench else {}
    steps["8"] |= {"rounds": [100.0, 140.0], "tokens_per_s": {"median": 120.0, "ci95": [-134.0, 374.0]}}
    steps["16"] |= {"rounds": [50.0, 60.0, 80.0], "tokens_per_s": {"median": 60.0, "ci95": [-20.0, 130.0]}}
    speeds = gather(results)[0].speeds
    assert (speeds["8"].value, speeds["8"].low, speeds["8"].high) == (120.0, None, None), "two rounds tell nothing"
    assert speeds["16"].low is not None
    assert 0 < speeds["16"].low < 50


def test_only_rows_of_one_seed_are_paired() -> None:
    results = made_up(TWO | {"c": Made(5.1)}, SEEDS)
    seed = {r.row_id: r.seed for r in results.cells}
    assert len(results.comparisons) == 3 * 3
    assert all(seed[a] == seed[b] for a, b in (c.rows for c in results.comparisons))
    assert {c.cells for c in results.contrasts} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert all(c.seeds == 3 for c in results.contrasts)


def test_pairs_of_unlike_seeds_in_an_old_report_are_left_out() -> None:
    results = made_up(TWO, SEEDS)
    wrong = results.comparisons[0].model_copy(update={"rows": ("a-seed0", "b-seed2"), "difference": 9.0})
    old = results.model_copy(update={"comparisons": [*results.comparisons, wrong], "contrasts": []})
    assert contrasts(old) == results.contrasts


def test_two_cells_are_the_paired_t_test_beside_the_text() -> None:
    """With the error of the text next to nothing, the interval is mean ± t(2) sd / sqrt(3)."""
    results = made_up(TWO, SEEDS)
    for c in results.comparisons:
        c.se = 1e-9
    (found,) = contrasts(results)
    differences = [c.difference for c in results.comparisons]
    half = 4.30265 * stdev(differences) / math.sqrt(3)
    assert found.difference == pytest.approx(mean(differences))
    assert (found.low, found.high) == pytest.approx((mean(differences) - half, mean(differences) + half), rel=1e-5)


def test_pooled_seeds_are_the_residual_of_a_block_design() -> None:
    """The mean variance of all pairs' differences is twice the residual mean square of cells by seeds."""
    rng = random.Random(3)
    cells = {n: Made(5.0 + i, offsets=tuple(rng.gauss(0, 0.1) for _ in SEEDS)) for i, n in enumerate("abcd")}
    results = made_up(cells, SEEDS)
    for c in results.comparisons:
        c.se = 1e-9
    values = [[cell.nats + o for o in cell.offsets] for cell in cells.values() if cell.nats is not None]
    grand = mean(map(mean, values))
    by_seed = [mean(row[s] for row in values) for s in range(3)]
    squares = [(v - mean(row) - by_seed[s] + grand) ** 2 for row in values for s, v in enumerate(row)]
    df = (4 - 1) * (3 - 1)
    half = student_quantile(1 - 0.05 / 6, df) * math.sqrt(2 * sum(squares) / df / 3)
    for c in contrasts(results):
        assert c.pairs == 6
        assert (c.high - c.low) / 2 == pytest.approx(half, rel=1e-5)


def test_more_pairs_widen_every_interval() -> None:
    few = contrasts(made_up(TWO))[0]
    many = contrasts(made_up(TWO | {n: Made(5.0) for n in "cdef"}))[0]
    assert few.cells == many.cells == ("a", "b")
    assert many.pairs == 15
    assert many.high - many.low > 1.3 * (few.high - few.low)


def equal_rows(rng: random.Random) -> dict[str, list[float]]:
    return {name: [100 * rng.lognormvariate(0, 0.05) for _ in range(16)] for name in "abcd"}


def test_equal_rows_are_seldom_called_faster() -> None:
    """Six pairs of identical rows: one by one, about a grid in six has a false verdict; together, one in twenty."""
    rng = random.Random(5)
    results = made_up({n: Made(5.0) for n in "abcd"})
    trials, single, together = 150, 0, 0
    for _ in range(trials):
        rounds = equal_rows(rng)
        for row in results.cells:
            assert row.bench is not None
            row.bench.steps["8"]["rounds"] = rounds[row.row_id]
        pairs = [ratio_interval(rounds[a], rounds[b]) for a, b in (t.rows for t in results.ties)]
        single += any(p.low is not None and p.high is not None and not p.low <= 1 <= p.high for p in pairs)
        together += any(c.verdict in ("faster", "slower") for c in speed_contrasts(results))
    assert single / trials > 0.12
    assert together / trials < 0.06


def test_a_real_difference_is_still_found_and_a_tie_too() -> None:
    results = made_up({"a": Made(5.0, speed=100.0), "b": Made(5.0, speed=130.0), "c": Made(5.0, speed=100.5)})
    verdicts = {c.cells: c.verdict for c in results.speed_contrasts}
    assert verdicts == {("a", "b"): "slower", ("a", "c"): "tie", ("b", "c"): "faster"}
    assert all(c.rounds == 16 and c.pairs == 3 for c in results.speed_contrasts)


def test_few_rounds_among_many_pairs_resolve_nothing_and_the_note_says_so() -> None:
    results = made_up({n: Made(5.0, speed=100.0 * (i + 1)) for i, n in enumerate("abcde")})
    for row in results.cells:
        assert row.bench is not None
        row.bench.steps["8"]["rounds"] = row.bench.steps["8"]["rounds"][:7]
    found = concluded(results)
    assert {(c.verdict, c.low, c.high) for c in found.speed_contrasts} == {("not resolved", None, None)}
    note = notes.ratios(found)
    assert "The 10 intervals hold together with 95 % confidence (each at 99.5 %" in note
    assert "Under 9 rounds nothing can be resolved (here 7)" in note


def test_ratios_without_their_rounds_are_trusted_only_alone() -> None:
    results = made_up({n: Made(5.0) for n in "abc"})
    for row in results.cells:
        assert row.bench is not None
        row.bench.steps["8"].pop("rounds")
    assert {c.verdict for c in speed_contrasts(results)} == {"not resolved"}
    results.ties[:] = [Tie(rows=("a", "b"), steps="8", ratio=1.0, ci95=(0.99, 1.01), verdict="tie")]
    (alone,) = speed_contrasts(results)
    assert (alone.verdict, alone.low, alone.high) == ("tie", 0.99, 1.01)


def test_spread_covers_seeds_and_text() -> None:
    one = Spread((5.0,), (0.1,), clusters=7)
    assert one.half_width() == pytest.approx(student_quantile(0.95, 6) * 0.1)
    three = Spread((5.0, 5.2, 5.1), (0.1, 0.1, 0.1), clusters=7)
    seeds, text = 0.1**2 / 3, 0.1**2
    df = math.floor((seeds + text) ** 2 / (seeds**2 / 2 + text**2 / 6))
    assert three.half_width() == pytest.approx(student_quantile(0.95, df) * math.sqrt(seeds + text))
    assert Spread((5.0,)).half_width() is None
    assert Spread((5.0,), (0.1,), clusters=1).half_width() is None, "one document tells nothing of others"


def test_reports_before_one_point_two_take_documents_from_their_rows() -> None:
    results = made_up(TWO)
    assert results.comparisons[0].clusters == 12
    for c in results.comparisons:
        c.clusters = None
    assert contrasts(results) == results.contrasts


@pytest.mark.parametrize(
    ("share", "told"), [(1.0, "cola: all tokens are decoded at the end"), (0.125, "cola after 12 %")]
)
def test_when_a_latent_row_writes_follows_from_its_timings(share: float, told: str) -> None:
    results = made_up({"random_mask": Made(5.0), "cola": Made(None, first_token=share)})
    note = notes.speed(results)
    assert told in note
    assert "random_mask" not in note


def test_plural_of_one_pair() -> None:
    assert "1 pair of rows" in speed_line(made_up(TWO))
    assert "3 pairs of rows" in speed_line(made_up(TWO | {"c": Made(5.0)}))


def speed_line(results: Results) -> Any:
    from steps.report.summary import headline

    return next(line for line in headline(results) if line.startswith("Speed"))
