"""A row without a likelihood bound in the report: named, compared by what it has, never mixed with bounds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from steps.report import RowResult
from steps.report.cells import Cell, gather
from steps.report.compare import PerSequence, concluded, paired_difference
from steps.report.curves import health_curves, loss_curve, still_rising
from steps.report.schema import Results
from steps.report.summary import headline
from steps.report.tables import health_lines
from steps.tracking import numbers
from tests.report_rows import REFERENCE, training_summary, write_report

ROOT = Path(__file__).resolve().parents[2]
DIAGNOSTICS = {
    "reconstruction_accuracy": 0.953,
    "reconstruction_accuracy_noisy": 0.901,
    "decode_accuracy_from_x0_hat": {"0.2": 0.8, "0.4": 0.55, "0.6": 0.3},
    "latent_effective_rank": 41.26,
    "shuffle_test": {"plain": 0.95, "shuffled": 0.02},
    "adaptive_bin_losses": {str(i): i / 10 for i in range(20)},
    "decoder_margin_nats": None,
}


def point(temperature: float, **more: Any) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "judge_ppl": 500.0,
        "judge": "base (self-judged)",
        "unigram_entropy_nats": 5.6,
        "repetition_4": 0.01,
        "steps": 16,
        "overlap_1": 0.2,
        "overlap_1_other": 0.19,
        "overlap_1_gain": {"value": 0.01, "se": 0.02},
        **more,
    }


def latent_row(metrics: Path) -> RowResult:
    lines = [
        {
            "step": i,
            "train/loss": 2.0,
            "train/ce_nats": 1.0,
            "train/reconstruction_accuracy": i / 100,
            "train/diffusion_mse": 1 - i / 100,
        }
        for i in range(90)
    ]
    metrics.write_text("\n".join(map(json.dumps, lines)))
    evaluation = {
        "nelbo_nats_per_token": None,
        "unigram_nats_per_token": 6.8,
        "masked_accuracy": {},
        "frontier": [point(0.7), point(1.0, judge_ppl=900.0)],
        "samples": [{"prompt": "My fellow", "continuation": " latents", "temperature": 0.7, "steps": 16}],
        "history": None,
        "per_sequence": {},
        "diagnostics": DIAGNOSTICS,
        "num_documents": 3,
    }
    return RowResult(
        "ldlm",
        "ldlm",
        "ldlm",
        0,
        "ok",
        True,
        metrics_path=str(metrics),
        train=training_summary(),
        evaluation=evaluation,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("report")
    return write_report(directory, [latent_row(directory / "latent.jsonl")])


def loaded(report: Any) -> Results:
    return Results.model_validate_json(Path(report.results_path).read_text())


def table_of(report: Any, title: str) -> list[str]:
    section = Path(report.markdown_path).read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")]


def test_only_the_latent_row_has_no_bound(report: Any) -> None:
    assert [c.name for c in gather(loaded(report)) if c.latent] == ["ldlm"], "the failed row is not one of them"


def test_its_likelihood_columns_hold_nothing_and_the_note_says_why(report: Any) -> None:
    row = next(line for line in table_of(report, "Quality on held-out text") if line.startswith("| ldlm"))
    assert {cell.strip() for cell in row.split("|")[2:-1]} == {"-"}
    text = Path(report.markdown_path).read_text()
    assert "ldlm: generated through continuous latents, which have neither a bound nor" in text
    assert "clustered by document (3 held-out documents)" in text


def test_health_has_a_line_a_figure_and_a_column_a_row(report: Any) -> None:
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table_of(report, "Health of latent rows")]
    assert lines[0] == ["figure", "ldlm"]
    found = dict(lines[2:])
    assert found["reconstruction accuracy"] == "0.953"
    assert found["decode accuracy from x0 hat (0.2 / 0.4 / 0.6)"] == "0.8 / 0.55 / 0.3"
    assert found["adaptive bin losses (20 values: least / median / most)"] == "0 / 1 / 1.9"
    assert found["decoder margin nats"] == "-"
    assert len(found) == len(DIAGNOSTICS)


def test_rows_with_other_figures_share_a_table() -> None:
    assert health_lines({"a": {"0.2": 1.0}}) == {"a (0.2)": "1"}
    assert health_lines({"count": 12345, "tiny": 0.00012345, "large": 12345.6}) == {
        "count": "12,345",
        "tiny": "0.000123",
        "large": "12,346",
    }


def test_opening_lines_stay_short_and_tell_the_latent_row(report: Any) -> None:
    lines = report.lines
    assert len(lines) <= 8
    likelihood = next(line for line in lines if line.startswith("Likelihood"))
    assert "ldlm" not in likelihood
    told = next(line for line in lines if line.startswith("Without a bound: ldlm"))
    assert "ldlm +1.0 ± 5.0, not shown to follow its prompt" in told


def test_reconstruction_is_told_beside_the_figures_of_health(report: Any) -> None:
    text = Path(report.markdown_path).read_text().split("## Health of latent rows\n")[1].split("\n## ")[0]
    assert "ldlm 95.3 %, 90.1 % from noised latents, still rising when training ended (+18.0 points" in text


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"unigram_entropy_nats": 2.0}, "ldlm (entropy 2.0)"),
        ({"unigram_entropy_nats": None, "repetition_4": 0.8}, "ldlm (80 % repeated 4-grams)"),
        ({"judge_ppl": 5000.0}, "ldlm (judge ppl 5,000)"),
        ({"shuffled_judge_ppl": 510.0}, "ldlm (judge ppl 500, 510 with its tokens shuffled)"),
        ({}, None),
    ],
)
def test_degenerate_latent_text_is_never_silent(report: Any, figures: dict[str, Any], told: str | None) -> None:
    results = loaded(report)
    results.data["reference_text"] = {**REFERENCE, "shuffled_judge_ppl": 1375.0}
    evaluation = next(r.eval for r in results.cells if r.row_id == "ldlm")
    assert evaluation is not None
    for entry in evaluation.frontier:
        entry.update(figures)

    def worthless() -> str:
        return next(line for line in headline(results) if line.startswith("Text")).partition("worth nothing")[2]

    assert ("ldlm" in worthless()) == bool(told)
    assert told is None or told in worthless()
    results.data["reference_text"]["judge_ppl"] = 1000.0
    silent = ("ldlm" in worthless()) != bool(told)
    by_judge = bool({"judge_ppl", "shuffled_judge_ppl"} & set(figures))
    assert silent == by_judge, "a judge that does not tell text from shuffled tokens is not believed"
    evaluation.frontier[1].update(point(1.0, shuffled_judge_ppl=2000.0))
    assert "ldlm" not in worthless(), "one good temperature is enough"


def test_one_document_is_told(report: Any) -> None:
    results = loaded(report)
    assert not any("one document" in line for line in headline(results))
    for row in results.cells:
        if row.eval:
            row.eval.num_documents = 1
    assert any("held-out sequences are of one document" in line for line in headline(results))


def test_text_tables_hold_every_row_and_the_held_out_text(report: Any) -> None:
    text = table_of(report, "Generated text")
    assert sum(line.startswith("| ldlm") for line in text) == 2
    assert text[-1].startswith("| held-out text")
    assert [c.strip() for c in text[-1].split("|")[4:8:3]] == ["16.0", "5.80"]
    (first, _) = [line for line in table_of(report, "Overlap with the true continuation") if line.startswith("| ldlm")]
    assert [c.strip() for c in first.split("|")[2:6]] == ["0.7", "20.0", "19.0", "+1.0 ± 2.0"]


def test_csv_and_tracker_get_every_number(report: Any) -> None:
    lines = (Path(report.directory) / "results.csv").read_text().splitlines()
    assert "ldlm,ldlm,ldlm,0,eval/diagnostics/reconstruction_accuracy,0.953," in lines
    assert "ldlm,ldlm,ldlm,0,eval/diagnostics/decode_accuracy_from_x0_hat@0.4,0.55," in lines
    assert "ldlm,ldlm,ldlm,0,eval/frontier/T=0.7/overlap_1_gain,0.01,0.02" in lines
    found = numbers({"diagnostics": DIAGNOSTICS, "frontier": [point(0.7)]}, "eval")
    assert found["eval/diagnostics/decode_accuracy_from_x0_hat/0.4"] == 0.55
    assert (found["eval/frontier/T0.7/overlap_1_gain"], found["eval/frontier/T0.7/overlap_1_gain/se"]) == (0.01, 0.02)
    assert all(re.fullmatch(r"[\w\-. /]+", name) for name in found), "names that MLflow takes"


def test_figures_of_latent_rows(report: Any) -> None:
    assert {"latent_health", "quality_vs_speed"} <= set(report.figures)
    curves = {r.row_id: r.train.health for r in loaded(report).cells if r.train}
    assert set(curves["ldlm"]) == {"reconstruction_accuracy", "diffusion_mse"}
    assert curves["random_mask"] == {}


def test_reports_of_the_first_schema_still_load() -> None:
    stored = ROOT / "benchmarks" / "results" / "grid-laptop-equal-tokens-2026-11-21.json"
    first = json.loads(stored.read_text()) | {"schema_version": "1.0"}
    for new in ("contrasts", "speed_contrasts"):
        first.pop(new, None)
    for comparison in first["comparisons"]:
        comparison.pop("clusters", None)
    results = concluded(Results.model_validate(first))
    assert len(results.contrasts) == len(results.comparisons) == 13
    assert len(results.speed_contrasts) == 12
    assert headline(results)


def test_speed_between_measured_numbers_of_steps_is_interpolated_in_time(report: Any) -> None:
    rows = {r.row_id: r for r in loaded(report).cells}
    bench = rows["ldlm"].bench
    assert bench is not None
    steps = {
        s: {"tokens_per_s": {"median": v, "ci95": [0.9 * v, 1.2 * v]}, "num_forwards": 1}
        for s, v in (("8", 100.0), ("32", 25.0))
    }
    row = rows["ldlm"].model_copy(update={"bench": bench.model_copy(update={"steps": steps})})
    cell = Cell("ldlm", (row,))
    found = {n: cell.speed_at(n) for n in (8, 16, 4, 64)}
    assert [(s.value, s.measured) for s in found.values() if s] == [
        (pytest.approx(100.0), True),
        (pytest.approx(50.0), False),
        (pytest.approx(200.0), False),
        (pytest.approx(12.5), False),
    ], "a step takes as long wherever it is"
    assert found[16] is not None
    assert (found[16].low, found[16].high) == (pytest.approx(45.0), pytest.approx(60.0)), "so do its ends"
    assert cell.speed_at(None) is None
    ar = Cell("ar_tuned", (rows["ar_tuned"],)).speed_at(16)
    assert ar is not None
    assert (ar.value, ar.measured) == (100.0, True)
    assert Cell("repr_align_4", (rows["repr_align_4"],)).speed_at(8) is None


def test_a_resumed_run_counts_its_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "train/loss": 3.0, "train/a_mse": 9.0},
        {"step": 2, "train/loss": 2.5, "train/a_mse": 8.0},
        {"step": 1, "train/loss": 2.0, "train/a_mse": 7.0},
        {"step": 2, "eval/other": 1.0},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert health_curves(path) == {"a_mse": [(1.0, 7.0), (2.0, 8.0)]}
    assert [p["loss"] for p in loss_curve(path)] == [2.0, 2.5]
    assert health_curves(tmp_path / "none") == {}


def test_still_rising_compares_the_last_two_fifths() -> None:
    assert still_rising([(i, float(i)) for i in range(20)]) == pytest.approx(4.0)
    assert still_rising([(i, 1.0) for i in range(20)]) == 0.0
    assert still_rising([(i, float(i)) for i in range(19)]) == 0.0, "too short to tell"


def test_differences_are_clustered_by_document() -> None:
    """Copies of a sequence add no certainty; a single document gives no comparison at all."""
    once = paired_difference(PerSequence([3, 9, 4], [2, 5, 3]), PerSequence([1, 4, 4], [2, 5, 3]), ("a", "b"), "nelbo")
    first = PerSequence([3, 9, 4] * 4, [2, 5, 3] * 4, [0, 1, 2] * 4)
    second = PerSequence([1, 4, 4] * 4, [2, 5, 3] * 4, [0, 1, 2] * 4)
    copied = paired_difference(first, second, ("a", "b"), "nelbo")
    assert once is not None
    assert copied is not None
    assert (copied.difference, copied.se) == pytest.approx((once.difference, once.se))
    lone = PerSequence(first.nats, first.tokens, [0] * 12)
    assert paired_difference(lone, second, ("a", "b"), "nelbo") is None
