"""Sweeps in the report: areas under curves over all rows, tables, figures, notes on what is absent."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dllm_core.evals.aup import CurvePoint, aup_estimate
from steps.report import RowResult
from steps.report.curve_areas import best_accuracies, concluded
from steps.report.schema import Results
from steps.report.sweeps import parallelism_note, parallelism_table, steps_note, steps_table
from tests.report_rows import training_summary, write_report

GROUPS = (0, 0, 1, 1, 2, 2)
TOKENS = (16.0,) * 6


def point(setting: float, chance: float, forwards: float, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    right = tuple(float(sum(rng.random() < chance for _ in range(16))) for _ in GROUPS)
    found = CurvePoint(right, TOKENS, (forwards,) * 6, GROUPS)
    return {
        "setting": setting,
        "accuracy": found.accuracy.per_token().as_json(),
        "tokens_per_forward": found.tokens_per_forward.per_token().as_json(),
        "per_sequence": found.as_json(),
    }


def curves(chance: float, context: str | None = "both sides", seed: int = 0) -> dict[str, Any]:
    points = [point(0.9, chance, 16.0, seed), point(0.5, chance - 0.02, 4.0, seed + 1)]
    by_rule = [
        {"rule": rule, "task": task, "block_size": size, "block_add_threshold": add, "points": points}
        for rule, size, add in (("threshold", None, None), ("blocks", 8, 1.0), ("blocks", 8, 0.1))
        for task in ("masked", "infill")
    ]
    told = {"mask_ratio": 0.5, "num_sequences": 6}
    return {"curves": by_rule, "context": context, "absent": None, **told}


def swept(steps: tuple[str, ...], accuracy: float, context: str | None = "both sides") -> dict[str, Any]:
    def text(s: str) -> dict[str, Any]:
        gain = {"overlap_1": 0.3, "overlap_1_other": 0.2, "overlap_1_gain": {"value": 0.1, "se": 0.01}}
        return {
            "temperature": 0.7,
            "judge_ppl": 30.0,
            "shuffled_judge_ppl": 900.0,
            "unigram_entropy_nats": 4.8,
            "repetition_4": 0.0,
            "num_forwards": float(s) if s.isdigit() else 64.0,
            "tokens_per_forward": 64 / float(s) if s.isdigit() else 1.0,
            "eval_tokens_per_s": 77.0,
            **gain,
        }

    gap = {
        "accuracy": {"value": accuracy, "se": 0.02},
        "accuracy_other": 0.05,
        "accuracy_gain": {"value": accuracy - 0.05, "se": 0.03},
        "tokens_per_forward": 4.0,
        "num_forwards": 8.0,
    }
    return {
        "frontier": {s: [text(s)] for s in steps},
        "infill": dict.fromkeys(steps, gap) if context else {},
        "infill_context": context,
        "infill_absent": None if context else "generates whole continuations and cannot fill in a gap",
        "infill_sequences": 6,
        "batch_size": 4,
    }


def row(name: str, evaluation: dict[str, Any], method: str = "random_mask") -> RowResult:
    return RowResult(
        row_id=name,
        name=name,
        method=method,
        seed=0,
        status="ok",
        trained=True,
        train=training_summary(),
        evaluation={"unigram_nats_per_token": 6.8, "num_documents": 3, **evaluation},
    )


EXTRA = [
    row("sure", {"step_sweep": swept(("4", "8"), 0.4), "parallelism": curves(0.6)}),
    row("unsure", {"step_sweep": swept(("4", "8"), 0.3), "parallelism": curves(0.4, seed=7)}),
    row("in_blocks", {"parallelism": curves(0.9, "left and own block", seed=3)}),
    row(
        "written",
        {
            "step_sweep": swept(("ar",), 0.2, "left"),
            "parallelism": {
                "curves": [],
                "context": None,
                "absent": "writes token by token",
                "mask_ratio": 0.5,
                "num_sequences": 6,
            },
        },
    ),
    row("latent", {"step_sweep": swept(("4", "8"), 0.0, None)}),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_report(tmp_path_factory.mktemp("report"), extra=EXTRA)


@pytest.fixture(scope="module")
def results(report: Any) -> Results:
    return Results.model_validate_json(Path(report.results_path).read_text())


def test_the_best_accuracy_is_that_of_all_rows_with_the_same_view() -> None:
    found = [r.evaluation["parallelism"] for r in EXTRA if r.evaluation and "parallelism" in r.evaluation]
    best = best_accuracies(found)
    sure, unsure, blocks = (
        max(100 * p["accuracy"]["value"] for c in row["curves"] for p in c["points"]) for row in found[:3]
    )
    assert best == {
        (task, context): value
        for task in ("masked", "infill")
        for context, value in (("both sides", max(sure, unsure)), ("left and own block", blocks))
    }
    assert blocks > sure > unsure, "else nothing was tested"


def test_areas_are_in_the_results_and_single_sequences_are_not(results: Results) -> None:
    raw = EXTRA[1].evaluation["parallelism"]
    y_max = 100 * max(p["accuracy"]["value"] for p in EXTRA[0].evaluation["parallelism"]["curves"][0]["points"])
    by_hand = aup_estimate([CurvePoint.from_json(p["per_sequence"]) for p in raw["curves"][0]["points"]], y_max)
    cell = next(c for c in results.cells if c.row_id == "unsure")
    assert cell.eval is not None
    assert cell.eval.parallelism is not None
    curve = cell.eval.parallelism.curves[0]
    assert by_hand is not None
    assert curve.aup is not None
    assert (curve.aup.value, curve.aup.se) == (by_hand.value, by_hand.se)
    assert curve.best_accuracy == y_max
    assert "per_sequence" not in cell.model_dump_json()


def test_a_curve_without_points_has_no_area() -> None:
    empty = {"curves": [{"rule": "factor", "task": "masked", "points": []}], "context": None}
    assert concluded(empty, best_accuracies([empty]))["curves"][0]["aup"] is None


def line(table: str, *wanted: str) -> list[str]:
    (found,) = [
        cells
        for text in table.splitlines()
        if all(w in (cells := [c.strip() for c in text.split("|")][1:-1]) for w in wanted)
    ]
    return found


def test_steps_stand_beside_the_benchmarks_speed_or_the_evaluations_in_brackets(results: Results) -> None:
    table = steps_table(results)
    header = [c.strip() for c in table.splitlines()[0].split("|")][1:-1]
    timed, untimed = line(table, "sure", "8"), line(table, "sure", "4")
    assert timed[header.index("tok/s")] == "100.0", "the benchmark ran 8 steps"
    assert untimed[header.index("tok/s")] == "(77.0)"
    assert timed[header.index("infill acc")] == "40.0 ± 2.0"
    assert timed[header.index("less control")] == "+35.0 ± 3.0"
    assert timed[header.index("overlap gain")] == "+10.0 ± 1.0"
    assert timed[header.index("judge ppl")] == "30.0"
    latent = line(table, "latent", "8")
    assert latent[header.index("infill acc")] == "-", "absent is no zero"
    assert line(table, "written", "ar")[header.index("tok/forward")] == "1.00"


def test_notes_give_reasons_for_what_is_absent(results: Results) -> None:
    note = steps_note(results)
    assert "No infill of latent: it generates whole continuations" in note
    assert "written sees of the text around a gap: left" in note
    told = parallelism_note(results)
    assert "No curves of written: it writes token by token." in told
    assert "in_blocks sees of the text around a gap: left and own block" in told
    assert "2601.07568" in told


def test_curves_are_one_line_each_with_their_area(results: Results) -> None:
    table = parallelism_table(results)
    assert len(table.splitlines()) == 2 + 3 * 6
    sure = line(table, "sure", "masked tokens", "threshold")
    assert sure[3:5] == ["0.9, 0.5", "1.00, 4.00"]
    assert "±" in sure[6]
    assert line(table, "sure", "masked tokens", "entropy threshold, blocks of 8, the next from 10 % on")
    assert line(table, "sure", "masked tokens", "entropy threshold, blocks of 8, one after another")


def test_the_report_has_sections_and_figures_only_where_something_was_measured(report: Any, tmp_path: Path) -> None:
    text = Path(report.markdown_path).read_text()
    for section in ("## Quality by denoising steps", "## Accuracy under parallelism"):
        assert section in text
    assert {"quality_by_steps", "parallelism"} <= set(report.figures)
    assert all(Path(report.figures[n]).stat().st_size > 5000 for n in ("quality_by_steps", "parallelism"))
    plain = write_report(tmp_path)
    assert "Accuracy under parallelism" not in Path(plain.markdown_path).read_text()
    assert "Quality by denoising steps" not in Path(plain.markdown_path).read_text()
    assert not {"quality_by_steps", "parallelism"} & set(plain.figures)


def test_every_number_is_in_the_csv(report: Any) -> None:
    lines = (Path(report.directory) / "results.csv").read_text().splitlines()
    start = "sure,sure,random_mask,0,"
    assert f"{start}eval/step_sweep/8/T=0.7/judge_ppl,30.0," in lines
    assert f"{start}eval/infill/8/accuracy,0.4,0.02" in lines
    assert any(text.startswith(f"{start}eval/parallelism/masked/threshold/aup,") for text in lines)
    assert any(text.startswith(f"{start}eval/parallelism/infill/blocks-8-0.1/accuracy@0.9,") for text in lines)


def test_every_trained_cell_has_a_card_with_its_own_curves(report: Any, results: Results) -> None:
    cards = Path(report.directory) / "model_cards"
    finished = {c.name for c in results.cells if c.trained and c.status == "ok"}
    assert {p.stem for p in cards.iterdir()} == finished
    card = (cards / "unsure.md").read_text()
    whole = parallelism_table(results)
    for text in card.splitlines():
        assert not text.startswith("| sure")
    area = line(whole, "unsure", "masked tokens", "threshold")[6]
    assert area in card, "the area is the grid's: y_max comes from all rows"
    assert "](../parallelism.png)" in card
    assert "No curves of written: it writes token by token." in (cards / "written.md").read_text()
    for target in ("report.md", "results.json", "parallelism.png"):
        assert (cards / ".." / target).is_file()
