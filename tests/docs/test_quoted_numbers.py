"""Numbers on pages equal the JSON they come from, to the printed digits; the tool that checks them is checked first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import quoted_numbers
from benchmarks.quoted_numbers import QuoteError, printed, quotes, rewritten, stale, value

DOCUMENT = {
    "steps": 49,
    "accuracy": {"0.5": {"value": 0.15234}},
    "cells": [
        {"row_id": "a-seed0", "name": "a", "loss": 5.0, "flops": 23.27e12},
        {"row_id": "a-seed1", "name": "a", "loss": 6.0, "flops": 23.27e12},
        {"row_id": "b", "name": "b", "loss": 1701.4, "flops": 1.0},
    ],
    "differences": [
        {"rows": ["a", "b"], "metric": "nelbo", "value": -0.217},
        {"rows": ["a", "b"], "metric": "block_nelbo", "value": 0.5},
    ],
}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("steps", 49),
        ("accuracy[0.5].value * 100", 15.234),
        ("cells[b].loss", 1701.4),
        ("cells[2].loss", 1701.4),
        ("cells[a-seed1].loss", 6.0),
        ("cells[a].loss", 5.5),
        ("cells[a].flops / 1e12", 23.27),
        ("differences[rows=a/b,metric=nelbo].value", -0.217),
    ],
)
def test_places_lead_to_numbers(place: str, number: float) -> None:
    assert value(DOCUMENT, place) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("place", ["nothing", "cells[c].loss", "cells[b].name", "cells", "cells[b].loss.more"])
def test_places_that_lead_nowhere_are_errors(place: str) -> None:
    with pytest.raises(QuoteError):
        value(DOCUMENT, place)


@pytest.mark.parametrize(
    ("number", "like", "text"),
    [
        (5.1453, "5.2", "5.1"),
        (5.1453, "9.99", "5.15"),
        (0.4272, ".43", ".43"),
        (-0.2167, "-0.1", "-0.2"),
        (0.2, "+1.0", "+0.2"),
        (1700.6, "1,650", "1,701"),
        (1700.6, "1650", "1701"),
        (1700.6, "900", "1,701"),
        (48.7, "50", "49"),
    ],
)
def test_numbers_are_printed_like_the_ones_they_replace(number: float, like: str, text: str) -> None:
    assert printed(number, like) == text


def test_a_stale_number_is_found_and_rewritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(DOCUMENT))
    (tmp_path / "other.json").write_text(json.dumps({"x": 2.25}))
    page = (
        "See [run](../benchmarks/results/run.json): 50<!-- steps --> steps,\n"
        "loss 1,701<!-- cells[b].loss -->, and 2.2<!-- other.json: x --> elsewhere, 3.5 bare.\n"
    )
    complaints = stale(page, tmp_path)
    assert len(complaints) == 1
    assert "line 1" in complaints[0]
    assert complaints[0].endswith("is 49")
    fresh = rewritten(page, tmp_path)
    assert fresh == page.replace("50<!--", "49<!--")
    assert stale(fresh, tmp_path) == []


def test_a_missing_file_a_wrong_place_and_a_quote_without_source_are_found(tmp_path: Path) -> None:
    link = "[run](../benchmarks/results/run.json) "
    assert "no run.json" in stale(link + "1<!-- x -->", tmp_path)[0]
    (tmp_path / "here.json").write_text("{}")
    assert "nothing at 'x'" in stale("[r](benchmarks/results/here.json) 1<!-- x -->", tmp_path)[0]
    assert "before any file" in stale("1<!-- x -->", tmp_path)[0]


PAGES = quoted_numbers.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(quoted_numbers.ROOT)))
def test_every_quoted_number_equals_its_source(page: Path) -> None:
    found = stale(page.read_text())
    assert not found, "python benchmarks/quoted_numbers.py --write\n" + "\n".join(found)


def test_pages_quote_numbers() -> None:
    counts = {page.name: len(list(quotes(page.read_text()))) for page in PAGES}
    for name in ("ar", "random_mask", "repr_align", "repr_align_trajectory", "ldlm", "reproduce", "hardware"):
        assert counts[f"{name}.md"] >= 5, name


def _sections(text: str) -> list[str]:
    return re.split(r"(?m)^(?=#{1,6} )", text)


def _bare(section: str) -> list[str]:
    """Return decimals, and integers of three digits or more, that name no source (code, links and tags left out)."""
    text = quoted_numbers.QUOTE.sub("", section)
    for skip in (
        r"(?s)```.*?```",
        r"(?m)^ {4}.*$",
        r"(?s)<!--.*?-->",
        r"`[^`]*`",
        r"\[[^\]]*\]\([^)]*\)",
        r"arXiv:\S+",
    ):
        text = re.sub(skip, "", text)
    return re.findall(r"(?<![\w.,-])\d+\.\d+|(?<![\w.,-])\d[\d,]{2,}(?![\w-])", text)


@pytest.mark.parametrize("page", sorted(quoted_numbers.ROOT.glob("docs/methods/*.md")), ids=lambda p: p.stem)
def test_results_of_a_method_are_all_quoted(page: Path) -> None:
    for section in _sections(page.read_text()):
        if section.startswith("## How it did here") and next(quoted_numbers.QUOTE.finditer(section), None):
            bare = _bare(section)
            assert not bare, f"{page.name}: {bare} stand without their place in the JSON"


def test_bare_numbers_are_seen() -> None:
    assert _bare("a 5.15 b, 1,701 c and 23<!-- x --> d") == ["5.15", "1,701"]
    assert _bare("`T=0.7`, 8 steps, [5.1](x/5.2.json), arXiv:2605.06885, 2026-11-21, 4.4<!-- x -->") == []
