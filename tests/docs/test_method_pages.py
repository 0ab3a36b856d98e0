"""Every method has a page, every page is in the index, and each says what a reader needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import params
from dllm_core.methods.registry import room_names

ROOT = Path(__file__).resolve().parents[2]
METHODS = ROOT / "docs" / "methods"
PAGES = sorted(p for p in METHODS.glob("*.md") if p.name != "README.md")
SECTIONS = ("## Idea", "## Equations", "## What we chose, and why", "## What it costs")
RESULT = "## How it did here"


def _index() -> dict[str, tuple[set[str], str]]:
    """Return page -> (cells, room) of the index's table."""
    rows = re.findall(r"(?m)^\| (`[^|]+`) \| `(\w+)` \| \[[^\]]+\]\(([\w.]+)\)", (METHODS / "README.md").read_text())
    return {page: (set(re.findall(r"`(\w+)`", cells)), room) for cells, room, page in rows}


def test_every_cell_and_every_room_has_a_page_in_the_index() -> None:
    index = _index()
    assert set().union(*(cells for cells, _ in index.values())) == set(params.cell_names())
    assert {room for _, room in index.values()} == set(room_names())
    for page, (cells, room) in index.items():
        assert (METHODS / page).is_file(), page
        for cell in cells:
            assert params.load("laptop", cells=cell).cells[0].method == room, cell


def test_every_page_is_in_the_index() -> None:
    assert {p.name for p in PAGES} == set(_index())


def _has_picture(text: str) -> bool:
    drawn = re.findall(r"(?s)```(mermaid)?\n(.*?)```", text)
    return any(kind == "mermaid" or re.search(r"-->|──►", body) for kind, body in drawn) or "](../figures/" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_has_its_sections_a_picture_its_sources_and_its_code(page: Path) -> None:
    text = page.read_text()
    places = [text.find(f"\n{title}\n") for title in SECTIONS]
    assert min(places) > 0, f"missing: {[t for t, at in zip(SECTIONS, places, strict=True) if at < 0]}"
    assert places == sorted(places)
    assert _has_picture(text), "no mermaid or ASCII diagram"
    cells, room = _index()[page.name]
    assert f"`dllm_core/methods/{room}" in text
    for cell in cells:
        assert f"params/cells/{cell}.yaml" in text
    if room != "ar":
        assert "](https://arxiv.org/abs/" in text, "no source"
    assert text.count("\n") <= 125, "longer than two screens"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_published_row_says_how_it_did(page: Path) -> None:
    cells, _ = _index()[page.name]
    published = set()
    for path in (ROOT / "benchmarks" / "results").glob("grid-*.json"):
        results = json.loads(path.read_text())
        published |= {row["name"] for row in results["cells"] if row["status"] == "ok"}
    if not cells & published:
        return
    text = page.read_text()
    assert f"\n{RESULT}\n" in text, f"{sorted(cells & published)} are in benchmarks/results"
    told = text.split(RESULT)[1]
    files = set(re.findall(r"benchmarks/results/([\w.-]+\.json)", told))
    assert files, "names no file"
    seeds = [len(json.loads((ROOT / "benchmarks" / "results" / name).read_text()).get("seeds", [])) for name in files]
    for count, words in ((1, "one seed"), (3, "three seeds")):
        assert count not in seeds or words in told.lower(), f"a file it links to has {words}, which has to be said"
