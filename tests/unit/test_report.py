"""The report: schema, paired comparisons, refusal to rank, tables and pictures."""

from __future__ import annotations

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from steps.report import RowResult
from steps.report.build import below, publish_latest
from steps.report.cell_links import link_cells
from steps.report.compare import PerSequence, paired_difference
from steps.report.schema import Results
from steps.report.summary import headline
from steps.report.tables import markdown_table
from tests.report_rows import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_report(tmp_path_factory.mktemp("report"))


def test_results_json_round_trips_through_its_schema(report: Any) -> None:
    results = Results.model_validate_json(Path(report.results_path).read_text())
    assert [c.row_id for c in results.cells] == ["random_mask", "repr_align_all", "ar_tuned", "repr_align_4"]
    assert results.cells[3].status == "failed"
    assert results.cells[3].error == "RuntimeError: boom"
    assert results.cells[0].cost is not None
    assert results.cells[0].cost.flops == pytest.approx(1e12), "the teacher is in the sum already"
    broken = json.loads(Path(report.results_path).read_text()) | {"surprise": 1}
    with pytest.raises(ValidationError):
        Results.model_validate(broken)


def test_one_seed_is_not_ranked_and_the_failure_is_told(report: Any) -> None:
    text = "\n".join(report.lines)
    assert "Not ranked: 1 seed" in text
    assert "repr_align_4 failed (RuntimeError: boom)" in text
    assert "unigram floor 6.80, all below it" in text
    assert "On this training run 1 of 1 difference is beyond evaluation error" in text
    assert "1 pair of rows that share a network, at all steps: 1 tie" in text


def test_degenerate_text_is_named(report: Any) -> None:
    found = Results.model_validate_json(Path(report.results_path).read_text())
    assert not any("worth nothing" in line for line in headline(found))
    assert found.cells[0].eval is not None
    for point in found.cells[0].eval.frontier:
        point["unigram_entropy_nats"] = 1.0
    (line,) = [line for line in headline(found) if "worth nothing" in line]
    assert "random_mask (entropy 1.0) (held-out text: entropy 5.8 nats)" in line
    assert "worth nothing yet at any temperature tried: random_mask" in line


def test_every_figure_is_drawn_and_published(report: Any) -> None:
    names = {"quality_vs_speed", "loss_curves", "mask_ratio_vs_loss", "frontier", "prediction_strip", "commit_order"}
    assert set(report.figures) == names
    latest = Path(report.directory).parent / "latest"
    assert {p.name for p in latest.iterdir()} == {p.name for p in Path(report.directory).iterdir()}
    assert all(Path(p).stat().st_size > 5000 for p in report.figures.values())


def test_reports_that_end_together_take_turns(tmp_path: Path) -> None:
    """Both moved the old copy away, and the second found its place taken: a finished grid ended with a traceback."""
    directories = [tmp_path / "reports" / f"run{i}" for i in range(4)]
    for directory in directories:
        directory.mkdir(parents=True)
        (directory / "report.md").write_text(directory.name)
    (tmp_path / "reports" / ".latest-new").mkdir()  # of a run that was killed while it copied
    (tmp_path / "reports" / ".latest-new" / "stray.png").touch()
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda d: publish_latest(d, print), directories * 10):
            pass
    latest = tmp_path / "reports" / "latest"
    assert [p.name for p in latest.iterdir()] == ["report.md"]
    assert (latest / "report.md").read_text() in {d.name for d in directories}
    assert {p.name for p in latest.parent.iterdir()} == {"latest", ".latest-lock", *(d.name for d in directories)}


def test_cells_have_a_readable_path(report: Any) -> None:
    cells = Path(report.directory).parent / "latest" / "cells"
    assert sorted(p.name for p in cells.iterdir()) == ["ar_tuned", "random_mask", "repr_align_all"]
    assert (cells / "random_mask" / "cell.json").is_file()


def test_a_row_that_is_only_measured_is_a_cell_on_the_base_models_files(tmp_path: Path, tiny_source_dir: Path) -> None:
    from dllm_core.backbone.conversion import convert
    from dllm_core.methods.cell import load_cell, read_cell

    base = tmp_path / "runs" / "cache" / "model"
    convert(tiny_source_dir, base, alignment="shifted")
    row = RowResult("ar", "ar", "ar", 0, "ok", False, options={"tuned": False})
    cells = tmp_path / "runs" / "reports" / "1" / "cells"
    cells.parent.mkdir(parents=True)
    for _ in range(2):  # a report is written again when a run is resumed
        link_cells(cells, [row], base)
    (tmp_path / "runs").rename(tmp_path / "moved")
    found = tmp_path / "moved" / "reports" / "1" / "cells" / "ar"
    assert read_cell(found).options == {"tuned": False}
    weights = load_cell(found).state_dict()
    stored = load_file(tmp_path / "moved" / "cache" / "model" / "model.safetensors")
    assert any(torch.equal(weights[f"backbone.model.{name}"], tensor) for name, tensor in stored.items())
    assert (found / "model.safetensors").is_symlink(), "weights are not copied"
    assert load_cell(found).tokenizer("a").input_ids


def test_bounds_and_exact_values_stand_in_different_columns(report: Any) -> None:
    lines = Path(report.markdown_path).read_text().splitlines()
    header = next(line for line in lines if line.startswith("| row") and "NELBO" in line)
    columns = [c.strip() for c in header.split("|")]
    ar = next(line for line in lines if line.startswith("| ar_tuned")).split("|")
    mdm = next(line for line in lines if line.startswith("| random_mask")).split("|")
    assert ar[columns.index("NELBO")].strip() == "-"
    assert ar[columns.index("exact nll")].strip() == "2.700 ± 0.020"
    assert mdm[columns.index("exact nll")].strip() == "-"


def test_csv_is_tidy(report: Any) -> None:
    lines = (Path(report.directory) / "results.csv").read_text().splitlines()
    assert lines[0] == "row_id,cell,method,seed,metric,value,se"
    assert "random_mask,random_mask,random_mask,0,eval/nelbo_nats_per_token,5.5,0.02" in lines
    assert "random_mask,random_mask,random_mask,0,bench/tokens_per_s@8,100.0," in lines


def test_paired_difference_against_the_textbook_formula() -> None:
    rng = random.Random(1)
    common = [rng.gauss(50, 10) for _ in range(30)]
    tokens = [rng.randint(5, 20) for _ in range(30)]
    a = [c + t * 0.1 + rng.gauss(0, 0.5) for c, t in zip(common, tokens, strict=True)]
    found = paired_difference(PerSequence(a, tokens), PerSequence(common, tokens), ("a", "b"), "nelbo")
    assert found is not None
    ratio = (sum(a) - sum(common)) / sum(tokens)
    d = [x - y - ratio * t for x, y, t in zip(a, common, tokens, strict=True)]
    variance = sum(v * v for v in d) / (len(d) - 1)
    mean_tokens = sum(tokens) / len(tokens)
    assert found.difference == pytest.approx(ratio)
    assert found.se == pytest.approx(math.sqrt(variance / len(d)) / mean_tokens)
    assert found.resolved, "the pairing removes the common variation, so a shift of .1 nats stands out"


def test_rows_scored_on_other_tokens_are_not_compared() -> None:
    assert paired_difference(PerSequence([1, 2], [3, 3]), PerSequence([1, 2], [3, 4]), ("a", "b"), "nelbo") is None


def test_markdown_table_is_aligned() -> None:
    table = markdown_table(["row", "x"], [["a", "1.0"], ["long name", "10.0"]])
    assert len({len(line) for line in table.splitlines()}) == 1


def test_schema_page_names_every_field() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "results_schema.md").read_text()
    schema = Results.model_json_schema()
    models = {"Results": schema, **schema["$defs"]}
    missing = [f"{m}.{f}" for m, s in models.items() for f in s["properties"] if f"`{f}`" not in page]
    assert not missing, missing


def test_a_report_names_no_directory_of_this_machine(tmp_path: Path) -> None:
    told = {"path": f"{tmp_path}/cache/model/1/payload", "source": "embedded:x", "num": 3, "other": "elsewhere/cache"}
    assert below(tmp_path, told) == {**told, "path": "cache/model/1/payload"}
