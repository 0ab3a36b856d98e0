"""The quality-speed figure: fronts over comparable rows only, and labels that do not overlap."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest

from steps.report.tradeoff import likelihood_points, pareto_front, quality_vs_speed, spaced, text_points
from tests.report_rows import Made, made_up

NINE = {
    "ar": Made(3.0, "exact", speed=30.0, trained=False),
    "ar_tuned": Made(2.8, "exact", speed=29.0),
    "random_mask": Made(5.15, speed=125.0, text="repeats"),
    "repr_align_4": Made(5.36, speed=129.0, text="repeats"),
    "repr_align_all": Made(5.31, speed=128.0, text="dull"),
    "repr_align_trajectory": Made(5.49, speed=128.5, text="dull"),
    "ldlm": Made(None, speed=1700.0, text="bag"),
    "vfm": Made(None, speed=800.0),
    "cola": Made(None, speed=400.0),
}


def test_front_against_the_definition() -> None:
    """Every point off the front is beaten by one on it, none on it by any."""
    rng = random.Random(2)
    base = likelihood_points(made_up(NINE))[0]
    points = [
        replace(base, speed=replace(base.speed, value=rng.randint(1, 9)), quality=float(rng.randint(1, 9)))
        for _ in range(30)
    ]
    front = pareto_front(points)

    def beats(a: Any, b: Any) -> bool:
        no_worse = a.speed.value >= b.speed.value and a.quality <= b.quality
        return no_worse and (a.speed.value > b.speed.value or a.quality < b.quality)

    assert all(any(beats(f, p) for f in front) for p in points if p not in front)
    assert not any(beats(p, f) for p in points for f in front)
    assert [f.speed.value for f in front] == sorted((f.speed.value for f in front), reverse=True)


def test_kinds_of_likelihood_have_fronts_of_their_own() -> None:
    groups: dict[str | None, list[str]] = {}
    for p in likelihood_points(made_up(NINE)):
        groups.setdefault(p.group, []).append(p.cell.name)
    token_space = ["random_mask", "repr_align_4", "repr_align_all", "repr_align_trajectory"]
    assert groups == {"exact": ["ar", "ar_tuned"], "nelbo": token_space}


def test_only_text_that_passes_the_checks_is_on_a_front() -> None:
    points = {p.cell.name: p for p in text_points(made_up(NINE))}
    assert set(points) == set(NINE)
    assert {n for n, p in points.items() if p.group} == {"ar", "ar_tuned", "vfm", "cola"}
    front = pareto_front([p for p in points.values() if p.group])
    assert [p.cell.name for p in front] == ["vfm"], "equal text, and it is the fastest"


def test_labels_keep_their_distance_and_order() -> None:
    wanted = [0.5, 0.5, 0.51, 0.9, 0.99, 1.0]
    placed = spaced(wanted, 0.07)
    assert all(b - a >= 0.07 - 1e-9 for a, b in pairwise(placed))
    assert placed[0] >= 0
    assert placed[-1] <= 1
    assert spaced([0.1, 0.5, 0.9], 0.07) == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_no_labels_overlap_with_nine_rows(seeds: tuple[int, ...]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = quality_vs_speed(made_up(NINE, seeds))
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = []
    for axes in figure.axes:
        shown = [t for t in axes.texts if t.get_text().split(" ")[0] in NINE]
        assert len(shown) == len({t.get_text() for t in shown})
        boxes += [(t.get_text(), t.get_window_extent()) for t in shown]
        boxes.append(("legend", axes.get_legend().get_window_extent()))
    assert len(boxes) == 6 + 9 + 2
    overlapping = [(a, b) for (a, x), (b, y) in combinations(boxes, 2) if x.overlaps(y)]
    assert not overlapping
    assert all(b.x1 <= figure.bbox.x1 + 1 for _, b in boxes), "nothing is cut off"


def test_rows_at_the_same_place_are_drawn() -> None:
    """Equal speed and quality, no intervals: nothing to set the scale by."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    same = made_up({n: Made(5.0, speed=100.0, text="dull") for n in ("a", "b")})
    for row in same.cells:
        assert row.eval is not None
        assert row.bench is not None
        assert row.eval.nelbo_nats_per_token is not None
        row.eval.nelbo_nats_per_token.se = None
        row.eval.unigram_nats_per_token = None
        row.bench.steps["8"]["rounds"] = [100.0]
    same.data.pop("reference_text")
    figure = quality_vs_speed(same)
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    assert all(axes.get_window_extent().height > 100 for axes in figure.axes)


def test_one_panel_where_only_one_has_something_to_show() -> None:
    latent = quality_vs_speed(made_up({"vfm": NINE["vfm"]}))
    assert latent is not None
    assert len(latent.axes) == 1
    assert quality_vs_speed(made_up({"vfm": replace(NINE["vfm"], speed=None)})) is None
