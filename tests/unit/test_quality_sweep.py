"""The sweep of finished cells by hand: settings, one small run from end to end, refusal of a foreign cell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import params
from benchmarks import quality_sweep
from benchmarks.quality_sweep import arguments, as_results, main, overrides
from dllm_core.backbone.backbone import Backbone
from dllm_core.methods.cell import save_cell
from dllm_core.methods.registry import room_method, room_options
from steps.context import Context
from steps.prepare_data import prepare_data
from steps.prepare_model import prepare_model
from steps.report.sweeps import parallelism_table, steps_table
from tests.tiny import TEXT, write_source

LAST = "eval.parallelism.thresholds=0.5,eval.step_sweep.infill_tokens=4,runtime.device=cpu"


def test_the_command_line_becomes_settings_and_set_comes_last() -> None:
    args = arguments(
        ["cell", "--steps", "4,8", "--samples", "3", "--sequences", "5", "--set", f"{LAST},eval.step_sweep.samples=2"]
    )
    spec = params.load(args.preset, cells="ar", overrides=overrides(args))
    assert spec.eval.step_sweep is not None
    assert spec.eval.parallelism is not None
    assert (spec.eval.step_sweep.steps, spec.eval.step_sweep.samples) == ((4, 8), 2)
    assert (spec.eval.parallelism.sequences, spec.eval.parallelism.thresholds) == (5, (0.5,))
    without = params.load("laptop", cells="ar", overrides=overrides(arguments(["cell", "--no-parallelism"])))
    assert without.eval.parallelism is None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    (directory / "text").mkdir()
    for number in range(30):
        (directory / "text" / f"page{number:02}.txt").write_text(f"Page {number} of a book.\n" + TEXT)
    write_source(directory / "model", "llama")
    return directory


def settings(source: Path) -> str:
    return (
        f"model.source={source / 'model'},data.source={source / 'text'},data.max_documents=null,{LAST},"
        "eval.parallelism.factors=[],eval.parallelism.entropy_thresholds=2.0,eval.parallelism.tokens_per_forward=[1,4]"
    )


def finished_cell(directory: Path, runs: Path, source: Path) -> Path:
    """Convert the tiny model as the preset does and save it, slightly moved, as a finished cell."""
    spec = params.load("test", cells="ar", overrides=settings(source))
    ctx = Context(runs_dir=runs, log=lambda line: None)
    model = prepare_model(spec.model, ctx, spec.data)
    prepare_data(spec, model, ctx)
    backbone = Backbone.from_pretrained(model.path)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.01
    method = room_method("random_mask")(backbone, room_options("random_mask")())
    tokenizer = Path(model.path)
    return save_cell(method, directory, cell="random_mask", room="random_mask", seed=0, tokenizer_dir=tokenizer)


def test_a_finished_cell_from_end_to_end(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell, out = finished_cell(tmp_path / "cell", tmp_path / "runs", source), tmp_path / "sweep.json"
    words = [
        str(cell),
        str(cell),
        "--base",
        "--preset",
        "test",
        "--set",
        settings(source),
        "--runs-dir",
        str(tmp_path / "runs"),
    ]
    words += ["--steps", "2,4", "--samples", "2", "--infill-sequences", "3", "--sequences", "3", "--out", str(out)]
    assert main(words) == 0
    record = json.loads(out.read_text())
    assert {"commit", "date", "hardware", "seed", "versions", "command"} <= set(record)
    assert list(record["rows"]) == ["ar", "random_mask", "random_mask 2"]
    first, second = record["rows"]["random_mask"], record["rows"]["random_mask 2"]
    assert first["step_sweep"]["infill"] == second["step_sweep"]["infill"], "the same cell, the same numbers"
    assert first["parallelism"] == second["parallelism"]
    assert {c["aup"]["value"] > 0 or c["best_accuracy"] == 0 for c in first["parallelism"]["curves"]} == {True}
    assert record["rows"]["ar"]["parallelism"]["absent"]
    assert record["reference_text"]["judge_ppl"] > 1
    assert {p.name for p in tmp_path.glob("*.png")} == {"sweep-steps.png", "sweep-parallelism.png"}
    printed = capsys.readouterr().out
    results = as_results(record)
    assert steps_table(results) in printed
    assert parallelism_table(results) in printed
    assert str(tmp_path) not in json.dumps({k: v for k, v in record.items() if k != "settings"}), "no machine path"
    assert all(row["wall_s"] > 0 for row in record["rows"].values())


def test_the_page_holds_what_was_stored(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "sweep.json"
    words = ["--base", "--preset", "test", "--set", settings(source), "--runs-dir", str(tmp_path / "runs")]
    words += ["--steps", "2", "--samples", "2", "--infill-sequences", "2", "--no-parallelism", "--out", str(out)]
    assert main(words) == 0
    written = tmp_path / "docs" / "quality.md"
    written.parent.mkdir()
    monkeypatch.setattr(quality_sweep, "PAGE", written)
    assert main(["--page", "--out", str(out)]) == 0
    page, record = written.read_text(), json.loads(out.read_text())
    assert steps_table(as_results(record)) in page
    assert "Accuracy under parallelism" not in page.split("## Quality")[1], "it was not measured"
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links == ["../results/sweep.json", "../results/sweep-steps.png"]
    assert all((written.parent / link).is_file() for link in links)
    assert (record["commit"] or "unknown")[:10] in page


def test_something_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments([])
    assert "--base or --page" in capsys.readouterr().err


def test_a_cell_of_another_model_is_refused(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = finished_cell(tmp_path / "cell", tmp_path / "runs", source)
    told = json.loads((cell / "cell.json").read_text())
    told["contract"]["num_tokens"] = 12
    (cell / "cell.json").write_text(json.dumps(told))
    words = [str(cell), "--preset", "test", "--set", settings(source), "--runs-dir", str(tmp_path / "runs")]
    assert main([*words, "--out", str(tmp_path / "sweep.json")]) == 2
    assert "knows 12 tokens" in capsys.readouterr().err
    assert not (tmp_path / "sweep.json").exists()
