"""The decoding benchmark on a tiny model: its record, its targets, and that rows which are compared do the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from benchmarks import ar_loops, decode, decode_parts, decode_targets
from benchmarks.decode_models import Models
from benchmarks.decode_record import Check, Measurement, Ratio, Record
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.conversion import convert
from dllm_core.errors import DllmError
from tests.tiny import NUM_TOKENS, tiny_backbone, write_source

ROOT = Path(__file__).resolve().parents[2]
GRID = ROOT / "benchmarks" / "results" / "grid-laptop-nine-rows-2026-11-21.json"
SMALL = ["--device", "cpu", "--dtype", "fp32", "--canvases", "4+8,3+6", "--steps", "4,2", "--batch-sizes", "1,2"]
SMALL += ["--rules", "confidence,p2,threshold=0.5", "--block-size", "4", "--variant-steps", "4"]
SMALL += ["--block-causal-canvas", "8+8", "--steps-per-block", "2", "--rounds", "2"]


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("decode") / "plain")


@pytest.fixture(scope="module")
def run(plain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return the record of a run over all parts, and what it printed."""
    folder = tmp_path_factory.mktemp("decode_run")
    words = ["--model", str(plain_model), "--workdir", str(folder / "work"), "--out", str(folder / "out.json")]
    done = subprocess.run(
        [sys.executable, "benchmarks/decode.py", *words, *SMALL, "--quality", str(GRID)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    raw = json.loads((folder / "out.json").read_text())
    return SimpleNamespace(raw=raw, record=Record.model_validate(raw), out=done.stdout, err=done.stderr, folder=folder)


def part(record: Record, name: str) -> Measurement:
    return next(m for m in record.measurements() if m.part == name)


# -- the record -------------------------------------------------------------------------------------------------------


def test_the_record_says_what_was_measured_and_on_what(run: SimpleNamespace) -> None:
    raw = run.raw
    assert {"commit", "dirty", "seed", "hardware", "date", "versions", "settings", "command"} <= set(raw)
    assert raw["gpu"] == "not measured"
    assert raw["weights"] == "converted, untrained: speed only"
    assert any(told.startswith("decoder pass: quick (") for told in raw["implementations"])
    assert any(told.startswith("token_stats: reference (DLLM_KERNELS=") for told in raw["implementations"])
    assert str(run.folder) not in json.dumps(raw)
    with pytest.raises(ValidationError):
        Record.model_validate({**raw, "speed": 1.0})
    with pytest.raises(ValidationError):
        Record.model_validate({**raw, "cpu": [{**raw["cpu"][0], "steps": "eight"}]})


def test_parts_differ_from_the_base_point_in_one_factor(run: SimpleNamespace) -> None:
    found = [(m.part, m.prompt_tokens, m.new_tokens, m.batch_size, m.steps) for m in run.record.measurements()]
    assert found[:3] == [("sweep", 4, 8, 1, 4), ("ar", 4, 8, 1, 8), ("block_causal", 8, 8, 1, 4)]
    assert sorted(found[3:]) == [
        ("caches", 4, 8, 1, 4),
        ("rules", 4, 8, 1, 4),
        ("sweep", 3, 6, 1, 4),
        ("sweep", 4, 8, 1, 2),
        ("sweep", 4, 8, 2, 4),
    ]
    rows = {m.part: list(m.rows) for m in run.record.measurements()}
    assert rows["sweep"] == ["ours", "masked_rows", "plain"]
    assert rows["ar"] == ["ours", "block_causal", "ar", "ar_hf_generate", "ar_dynamic", "ar_static", "ar_slots"]
    assert rows["caches"] == ["ours", "ours_blocks", "ours_prefix", "ours_dual", "ours_delayed"]
    assert rows["rules"] == ["ours", "ours_p2", "ours_threshold=0.5"]


def test_rows_that_are_compared_give_the_same_tokens_in_fp32(run: SimpleNamespace) -> None:
    for m in run.record.measurements():
        if m.part in ("sweep", "ar", "block_causal"):
            assert set(m.same_tokens) == set(m.rows) - {m.reference} - (
                {"ours", "block_causal"} if m.part == "ar" else set()
            )
            assert set(m.same_tokens.values()) == {1.0}, m.part
    assert part(run.record, "block_causal").check == Check(
        rows=("exact", "uncached"), same_tokens=1.0, same_passes=1.0, passed=True
    )
    assert part(run.record, "block_causal").same_tokens == {"exact": 1.0}


def test_passes_are_those_of_the_setting(run: SimpleNamespace) -> None:
    for m in run.record.measurements():
        for name, row in m.rows.items():
            assert row.num_forwards == (m.new_tokens if name.startswith("ar") else m.steps)
            assert len(row.rounds) == 2
    assert part(run.record, "caches").reference == "ours_blocks"
    assert set(part(run.record, "caches").drift) == {"ours_prefix", "ours_dual", "ours_delayed"}
    assert all(d.num_tokens > 0 for d in part(run.record, "caches").drift.values())
    assert part(run.record, "caches").configs["ours_blocks"]["block_size"] == 4
    assert part(run.record, "caches").configs["ours"]["block_size"] is None
    assert part(run.record, "rules").configs["ours_threshold=0.5"]["sampler_config"]["threshold"] == 0.5


def test_the_best_ar_row_is_the_fastest_one_timed(run: SimpleNamespace) -> None:
    m = part(run.record, "ar")
    speeds = {name: row.tokens_per_s.median for name, row in m.rows.items() if name.startswith("ar")}
    assert m.ar_best == max(speeds, key=lambda name: speeds[name])
    for ours in [name for name in m.rows if not name.startswith("ar")]:
        best = decode_targets.ratio_of(m, (ours, "ar_best"))
        named = decode_targets.ratio_of(m, (ours, m.ar_best))
        assert best is not None
        assert named is not None
        assert (best.ratio, best.ci95) == (named.ratio, named.ci95)


def test_targets_follow_from_the_ratios(run: SimpleNamespace) -> None:
    record = run.record
    judged = {t.name: t for t in record.targets}
    assert set(judged) == {target.name for target in decode_targets.TARGETS}
    assert [p.where for p in judged["ours_over_plain"].at] == ["4 steps", "2 steps"]
    for result in judged.values():
        told = {p.verdict for p in result.at}
        assert all((p.verdict == "met") == (p.ratio >= result.least) for p in result.at)
        assert result.verdict == ("missed" if "missed" in told else "met")
    assert judged["ours_over_plain"].at[0].ratio == record.measurements()[0].ratios[0].ratio


def test_the_plan_comes_first_and_the_results_last(run: SimpleNamespace) -> None:
    assert "minutes) without loading" in run.err
    assert run.err.index("minutes) without loading") < run.err.index("round 1 of")
    assert all(p.measured_s is not None and p.rounds == 2 and p.estimated_s > 0 for p in run.record.plan)
    assert "the best AR loop" in run.out
    assert "tokens of exact and uncached in fp32: the same" in run.out
    assert run.out.index("Targets, stated for") < run.out.index("Quality of both")
    assert f"  {'ar':<24} 3.05 +- 0.10 nats per token (exact); text at T=" in run.out
    assert "of those cells, not of the weights timed here" in run.out


def test_nothing_of_the_grid_is_needed(plain_model: Path, tmp_path: Path) -> None:
    words = ["--model", str(plain_model), "--workdir", str(tmp_path), "--out", str(tmp_path / "out.json"), *SMALL]
    script = (
        "import sys; from benchmarks import decode, schedule\n"
        f"assert decode.main({[*words, '--parts', 'ar', '--rounds', '1']!r}) == 0\n"
        "found = {m.partition('.')[0] for m in sys.modules} & {'steps', 'params', 'flows', 'metaflow', 'mlflow'}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


# -- targets ----------------------------------------------------------------------------------------------------------


def measured(name: str, rows: tuple[str, str], ratio: float, **more: Any) -> Measurement:
    ratios = [Ratio(rows=rows, ratio=ratio, ci95=(ratio - 0.1, ratio + 0.1), verdict="faster")]
    place = {"prompt_tokens": 32, "new_tokens": 128, "batch_size": 1, "steps": 8}
    return Measurement(**{"part": name, "ratios": ratios, **place, **more})


def judged(*found: Measurement, on_gpu: bool = False) -> dict[str, tuple[str, list[str]]]:
    results = decode_targets.judge(found, on_gpu=on_gpu)
    return {t.name: (t.verdict, [p.verdict for p in t.at]) for t in results}


def test_a_target_is_met_from_its_ratio_on_and_missed_below() -> None:
    rows = ("ours", "plain")
    assert judged(measured("sweep", rows, 1.6))["ours_over_plain"] == ("met", ["met"])
    assert judged(measured("sweep", rows, 1.599))["ours_over_plain"] == ("missed", ["missed"])
    both = judged(measured("sweep", rows, 1.7), measured("sweep", rows, 1.5, steps=128))
    assert both["ours_over_plain"] == ("missed", ["met", "missed"])
    assert both["ours_over_masked_rows"] == ("not measured", [])
    assert judged(measured("ar", ("ours", "ar_best"), 2.99))["ours_over_ar_best"] == ("missed", ["missed"])
    assert judged(measured("ar", ("ours", "ar_best"), 3.0))["ours_over_ar_best"] == ("met", ["met"])


def test_other_settings_than_the_target_says_do_not_count() -> None:
    rows = ("ours", "plain")
    base = measured("sweep", rows, 1.7)
    others = [measured("sweep", rows, 1.0, batch_size=4), measured("sweep", rows, 1.0, new_tokens=64)]
    assert judged(base, *others)["ours_over_plain"] == ("met", ["met"])
    sixteen = measured("ar", ("ours", "ar_best"), 9.0, steps=16)
    assert judged(sixteen)["ours_over_ar_best"] == ("not measured", [])
    assert judged(base, on_gpu=True)["ours_over_plain"] == ("not measured", [])


@pytest.mark.parametrize(("passed", "verdict"), [(True, "met"), (False, "missed")])
def test_speed_with_other_tokens_is_worth_nothing(passed: bool, verdict: str) -> None:
    rows = ("exact", "uncached")
    check = Check(rows=rows, same_tokens=1.0 if passed else 0.9, same_passes=1.0, passed=passed)
    assert judged(measured("block_causal", rows, 5.0, check=check))["exact_over_uncached"] == (verdict, [verdict])


def test_what_is_not_measured_says_why() -> None:
    missing = measured("ar", ("ours", "ar_best"), 9.0, ratios=[], not_measured="not measured: out of memory")
    (result,) = (t for t in decode_targets.judge([missing], on_gpu=False) if t.name == "ours_over_ar_best")
    assert (result.verdict, result.why) == ("not measured", "not measured: out of memory")
    text = decode_targets.table([result])
    assert "not measured ours at 8 steps over the best AR loop with a cache: >= 3x (not measured: out of" in text


# -- quality ----------------------------------------------------------------------------------------------------------


def test_quality_is_what_the_report_says() -> None:
    from steps.report.schema import Results
    from steps.report.texts import verdicts

    found = {row.name: row for row in decode_targets.quality_of(GRID).rows}
    told = verdicts(Results.model_validate_json(GRID.read_text()))
    assert {name: row.text.passes for name, row in found.items() if row.text} == {
        name: verdict.passes for name, verdict in told.items()
    }
    stored = {row["name"]: row["eval"] for row in json.loads(GRID.read_text())["cells"]}
    for name, field in (("ar", "exact_nats_per_token"), ("random_mask", "nelbo_nats_per_token")):
        likelihood = found[name].likelihood
        assert likelihood is not None
        assert likelihood.nats_per_token == stored[name][field]["value"]
    assert found["ldlm"].likelihood is None


def test_quality_that_is_not_given_is_not_measured() -> None:
    assert decode_targets.quality_table("not measured").startswith("Quality of both: not measured")


def test_a_file_that_is_no_grid_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none.json", ROOT / "benchmarks" / "results" / "train-cpu.json"):
        with pytest.raises(DllmError, match=rf"{path.name}' is no grid's results"):
            decode_targets.quality_of(path)
    assert decode.main(["--model", "nowhere", "--quality", str(tmp_path / "none.json")]) == 2
    assert "no grid's results" in capsys.readouterr().err


# -- autoregressive loops ---------------------------------------------------------------------------------------------


@torch.no_grad()
def without_cache(model: Any, prompts: list[torch.Tensor], new: int) -> list[list[int]]:
    rows = []
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(new):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        rows.append(ids)
    return rows


def test_every_ar_loop_gives_what_no_cache_gives(family: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "plain", family)
    convert(source, tmp_path / "model", alignment="shifted")
    base = ar_loops.base_model(tmp_path / "model", torch.float32, "cpu")
    backbone = Backbone.from_pretrained(tmp_path / "model")
    prompts = list(torch.randint(0, NUM_TOKENS, (2, 5)))
    from transformers import AutoModelForCausalLM

    expected = without_cache(AutoModelForCausalLM.from_pretrained(source).eval(), prompts, 12)
    for loop in (ar_loops.hf_generate, ar_loops.dynamic_cache, ar_loops.static_cache):
        out = loop(base, prompts, 12)
        assert [row.tolist() for row in out.sequences] == expected, loop.__name__
        assert (out.new_tokens, out.num_forwards) == ([12, 12], 12)
        assert out.first_token_s > 0
    assert [row.tolist() for row in ar_loops.slot_cache(backbone, prompts, 12).sequences] == expected
    calls: list[int] = []

    def forward(**given: Any) -> Any:
        calls.append(given["input_ids"].shape[1])
        return base(**given)

    again = ar_loops.static_cache(base, prompts, 12, forward)
    assert [row.tolist() for row in again.sequences] == expected
    assert calls == [1] * 11, "the prompt has another shape and runs as it is"


def test_no_loop_stops_at_an_end_of_text(tmp_path: Path) -> None:
    """The one token that the model ever writes is its end of text; speed is compared at equal length."""
    source = write_source(tmp_path / "plain")
    convert(source, tmp_path / "model", alignment="shifted")
    base = ar_loops.base_model(tmp_path / "model", torch.float32, "cpu")
    (row,) = without_cache(base, [torch.tensor([5, 6])], 4)
    base.generation_config.eos_token_id = base.config.eos_token_id = row[3]
    assert ar_loops.hf_generate(base, [torch.tensor([5, 6])], 4).sequences[0].tolist() == row
    assert base.generation_config.eos_token_id == row[3]


# -- time and mistakes ------------------------------------------------------------------------------------------------


def test_rounds_fill_the_limit_and_costs_are_learnt() -> None:
    setting = decode_parts.Setting(10, 10, 1, 5)
    assert setting.units == 100
    rows = {name: decode_parts.Row(lambda index: None, 100.0) for name in ("ours", "plain")}  # type: ignore[arg-type, return-value]
    part = decode_parts.Part("sweep", setting, rows, (), "plain", 3)
    costs = decode_parts.Costs(ours=0.01, ar=1.0)
    costs.learn("plain", 50.0, 1.0)
    assert costs.rounds(part, 20, 31.0) == (10, 30.0)
    assert costs.rounds(part, 8, 31.0) == (8, 24.0)
    assert costs.rounds(part, 20, 1.0) == (3, 9.0)
    assert costs.rounds(part, 2, 1.0) == (2, 6.0)
    assert costs.seconds("ar_slots", 3.0) == 3.0
    assert costs.seconds("ours_prefix", 100.0) == costs.seconds("ours", 100.0) == 1.0


def words(plain_model: Path, tmp_path: Path, *more: str) -> list[str]:
    place = ["--model", str(plain_model), "--workdir", str(tmp_path), "--out", str(tmp_path / "out.json")]
    return [*place, *SMALL, *more]


def test_no_part_is_begun_after_the_limit(
    plain_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(words(plain_model, tmp_path, "--time-limit", "0")) == 0
    record = Record.model_validate_json((tmp_path / "out.json").read_text())
    assert {m.not_measured for m in record.measurements()} == {"not measured: no time left"}
    assert {t.verdict for t in record.targets} == {"not measured"}
    assert record.quality == "not measured"
    assert "not measured: no time left" in capsys.readouterr().out


def test_an_estimate_measures_and_writes_nothing(
    plain_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(words(plain_model, tmp_path, "--estimate")) == 0
    told = capsys.readouterr().err
    assert "round 1 of" not in told
    assert told.count(" rounds ") == 8
    assert not (tmp_path / "out.json").exists()


def test_the_product_has_every_combination(plain_model: Path, tmp_path: Path) -> None:
    directory, _ = decode.converted(str(plain_model), tmp_path, 0)
    args = decode.arguments(words(plain_model, tmp_path, "--product"))
    found = decode_parts.parts(Models(directory, torch.float32, "cpu", 0, 4), args)
    sweeps = {str(p.setting) for p in found if p.name == "sweep"}
    variants = [p for p in found if p.name == "product"]
    assert len(sweeps) == len(variants) == 2 * 2 * 2
    assert {str(p.setting) for p in variants} == sweeps
    rules, caches = ("ours", "ours_p2", "ours_threshold=0.5"), ("", "_blocks", "_prefix", "_dual", "_delayed")
    assert set(variants[0].rows) == {rule + cache for rule in rules for cache in caches}
    assert ("ours_p2_dual", "ours_p2_blocks") in variants[0].pairs
    assert ("ours_p2", "ours") in variants[0].pairs


def test_work_is_what_runs_through_the_network(plain_model: Path, tmp_path: Path) -> None:
    directory, _ = decode.converted(str(plain_model), tmp_path, 0)
    args = decode.arguments(words(plain_model, tmp_path))
    models = Models(directory, torch.float32, "cpu", 0, 4)
    for part in decode_parts.parts(models, args):
        if part.name not in ("caches", "block_causal"):
            continue
        for name, row in part.rows.items():
            backbone = models.backbone
            seen: list[int] = []
            handle = backbone.layers[0].register_forward_pre_hook(
                lambda _, a, kw, seen=seen: seen.append((a[0] if a else kw["hidden_states"]).shape[:2].numel()),
                with_kwargs=True,
            )
            row.decode(0)
            handle.remove()
            assert sum(seen) == row.units, name


def test_a_check_fails_where_rows_differ(plain_model: Path, tmp_path: Path) -> None:
    directory, _ = decode.converted(str(plain_model), tmp_path, 0)
    models = Models(directory, torch.float32, "cpu", 0, 4)
    args = decode.arguments(words(plain_model, tmp_path, "--parts", "block_causal"))
    (part,) = decode_parts.parts(models, args)
    assert decode.check(models, part).passed
    other = replace(part.rows["exact"].config, sampler_config="random")  # type: ignore[arg-type]
    changed = replace(part.rows["exact"], config=other)
    part = replace(part, rows={**part.rows, "exact": changed})
    found = decode.check(models, part)
    assert not found.passed
    assert found.same_passes < 1


def test_an_inexact_cache_fails_the_run(plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Check(rows=("exact", "uncached"), same_tokens=0.5, same_passes=1.0, passed=False)
    monkeypatch.setattr(decode, "check", lambda models, part: wrong)
    assert decode.main(words(plain_model, tmp_path, "--parts", "block_causal")) == 1
    record = Record.model_validate_json((tmp_path / "out.json").read_text())
    assert {t.name: t.verdict for t in record.targets}["exact_over_uncached"] == "missed"


def test_a_block_causal_model_keeps_its_blocks_and_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_backbone(model_block=2).save_pretrained(tmp_path / "blocks")
    assert decode.main(words(tmp_path / "blocks", tmp_path)) == 2
    assert "Give --parts block_causal" in capsys.readouterr().err
    assert decode.main(words(tmp_path / "blocks", tmp_path, "--parts", "block_causal")) == 0
    record = Record.model_validate_json((tmp_path / "out.json").read_text())
    assert part(record, "block_causal").steps == 4 * 2, "four blocks of two tokens in two steps each"
    assert record.weights == "as given"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--parts", "sweeps"], "Did you mean 'sweep'"),
        (["--rules", "confident"], "Did you mean 'confidence'"),
        (["--caches", "prefixed"], "Did you mean 'prefix'"),
        (["--variant-steps", "1"], "Give at least 2 steps"),
        (["--device", "cuda"], "no usable GPU"),
    ],
)
def test_mistakes_are_told_in_two_lines(
    plain_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode.main(words(plain_model, tmp_path, *more)) == 2
    assert told in capsys.readouterr().err


def test_a_missing_model_is_told_in_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["--model", str(tmp_path / "none"), "--workdir", str(tmp_path)]) == 2
    assert "no model directory" in capsys.readouterr().err


def test_out_of_memory_is_told_apart(plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Measurement:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode, "measure", full)
    assert decode.main(words(plain_model, tmp_path, "--parts", "sweep")) == 0
    record = Record.model_validate_json((tmp_path / "out.json").read_text())
    assert {m.not_measured for m in record.measurements()} == {"not measured: out of memory"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_benchmark_runs_on_a_gpu(plain_model: Path, tmp_path: Path) -> None:
    command = words(plain_model, tmp_path, "--device", "cuda", "--dtype", "bf16", "--compile", "--steps", "2")
    assert decode.main(command) == 0
    record = Record.model_validate_json((tmp_path / "out.json").read_text())
    assert record.cpu == "not measured"
    assert {t.verdict for t in record.targets} == {"not measured"}
    assert "ar_static_compiled" in part(record, "ar").rows
