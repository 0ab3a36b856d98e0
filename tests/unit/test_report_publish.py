"""Publishing: README block and leaderboard section from the JSON, twice the same, old reports included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steps.report import figures
from steps.report.leaderboard import enter
from steps.report.publish import default_name, publish, rewrite
from steps.report.schema import SCHEMA_VERSION, Results
from tests.report_rows import Made, made_up

ROOT = Path(__file__).resolve().parents[2]
STORED = sorted((ROOT / "benchmarks" / "results").glob("grid-*.json")) + sorted(
    (ROOT / "benchmarks" / "results").glob("ldlm_hour-*.json")
)
CELLS = {
    "ar": Made(3.0, "exact", speed=30.0, trained=False),
    "random_mask": Made(5.1, offsets=(0.0, 0.02, -0.02)),
    "repr_align_all": Made(5.4, offsets=(0.01, -0.01, 0.0), teacher=0.3),
    "vfm": Made(None, speed=800.0, new_params=9_000_000),
}


@pytest.fixture
def quick_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second or two; where the picture is not the question, an empty one will do."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(figures, "quality_vs_speed", lambda results: Figure(figsize=(1, 1)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    (tmp_path / "docs" / "LEADERBOARD.md").write_text("# Board\n\n<!-- grids -->\n<!-- /grids -->\n\nbelow\n")
    return tmp_path


def written(root: Path, results: Results) -> Path:
    path = root / "results.json"
    path.write_text(results.model_dump_json())
    return path


def pages(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_twice_is_the_same_as_once(root: Path) -> None:
    source = written(root, made_up(CELLS, (0, 1, 2)))
    stored = publish(source, root)
    once = pages(root)
    assert publish(source, root) == stored
    assert pages(root) == once
    assert publish(stored, root) == stored, "what was published can be published again"
    assert pages(root) == once


@pytest.mark.usefixtures("quick_picture")
def test_three_seeds_are_one_line_a_cell_everywhere(root: Path) -> None:
    results = made_up(CELLS, (0, 1, 2))
    stored = publish(written(root, results), root)
    assert "-3seeds-" in stored.name
    for page in ("README.md", "docs/LEADERBOARD.md"):
        text = (root / page).read_text()
        assert "-seed0" not in text
        (row,) = [line for line in text.splitlines() if line.startswith("| random_mask ")]
        assert "5.10 ± 0.15 (sd 0.02)" in row
        assert "Means over 3 seeds" in text
        assert "not ranked." not in text
        assert "By likelihood random_mask leads" in text
    back = Results.model_validate_json(stored.read_text())
    assert len(back.cells) == 12, "every seed stays in the JSON"


@pytest.mark.usefixtures("quick_picture")
def test_a_leaderboard_section_names_its_origin(root: Path) -> None:
    results = made_up(CELLS)
    stored = publish(written(root, results), root)
    board = (root / "docs" / "LEADERBOARD.md").read_text()
    assert board.startswith("# Board\n")
    assert board.endswith("<!-- /grids -->\n\nbelow\n")
    section = board.split(f"### {stored.stem}\n")[1]
    for told in ("`run`", f"commit {'a' * 10}", "seeds 0", "test, 2 cores", results.created_at[:10], f"{stored.name})"):
        assert told in section
    assert "One seed: quality is not ranked." in section


def test_newer_grids_stand_on_top_and_replace_only_themselves() -> None:
    page = "a\n<!-- grids -->\n<!-- /grids -->\nb\n"
    page = enter(page, "one", "### one\n\nfirst\n")
    page = enter(page, "two", "### two\n\nsecond\n")
    assert page.index("### two") < page.index("### one")
    changed = enter(page, "one", "### one\n\nchanged\n")
    assert changed == page.replace("first", "changed")
    assert enter(changed, "one", "### one\n\nchanged\n") == changed
    with pytest.raises(ValueError, match="exactly once"):
        enter("no markers", "one", "x")


@pytest.mark.usefixtures("quick_picture")
def test_the_leaderboard_alone_leaves_the_readme(root: Path) -> None:
    before = (root / "README.md").read_text()
    publish(written(root, made_up(CELLS)), root, readme=False)
    assert (root / "README.md").read_text() == before
    assert "| random_mask " in (root / "docs" / "LEADERBOARD.md").read_text()


@pytest.mark.usefixtures("quick_picture")
def test_another_run_of_the_same_day_needs_a_name(root: Path) -> None:
    results = made_up(CELLS)
    first = publish(written(root, results), root)
    other = written(root, results.model_copy(update={"run_id": "run2"}))
    before = pages(root)
    with pytest.raises(ValueError, match="holds run run1, not run2: give this one a --name"):
        publish(other, root)
    assert pages(root) == before
    named = publish(other, root, name="grid-made-again")
    assert named.name == "grid-made-again.json"
    assert first.read_bytes() == before[str(first.relative_to(root))]
    assert default_name(results) == first.stem


@pytest.mark.usefixtures("quick_picture")
@pytest.mark.parametrize("stored", STORED, ids=lambda p: p.stem)
def test_every_stored_grid_can_be_published(root: Path, stored: Path) -> None:
    version = json.loads(stored.read_text())["schema_version"]
    assert version.startswith("1.")
    copy = root / "benchmarks" / "results" / stored.name
    copy.write_bytes(stored.read_bytes())
    publish(copy, root)
    once = pages(root)
    assert Results.model_validate_json(copy.read_text()).schema_version == SCHEMA_VERSION
    publish(copy, root)
    assert pages(root) == once


@pytest.mark.usefixtures("quick_picture")
def test_the_repository_shows_what_its_json_says(root: Path) -> None:
    """README and leaderboard are what publishing the stored grids gives: nobody edited a number by hand."""
    readme = (ROOT / "README.md").read_text()
    board = (ROOT / "docs" / "LEADERBOARD.md").read_text()
    (root / "README.md").write_text(readme)
    (root / "docs" / "LEADERBOARD.md").write_text(board)
    shown = [p for p in STORED if f"### {p.stem}\n" in board]
    assert shown
    for path in shown:
        copy = root / "benchmarks" / "results" / path.name
        copy.write_bytes(path.read_bytes())
        publish(copy, root, readme=f"({copy.relative_to(root)})" in readme)
    assert (root / "docs" / "LEADERBOARD.md").read_text() == board
    assert (root / "README.md").read_text() == readme


def test_readme_has_the_markers_once() -> None:
    assert "new numbers" in rewrite((ROOT / "README.md").read_text(), "new numbers")
    with pytest.raises(ValueError, match="exactly once"):
        rewrite("no markers", "x")
