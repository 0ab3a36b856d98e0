"""The conversion of the GPU suite: within its time, resumed where it was, and its record the report's."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import params
from benchmarks.gpu import convert, convert_clock, convert_grid, convert_rows
from benchmarks.gpu.convert_clock import TimeUp, time_limit
from benchmarks.gpu.convert_estimate import RATES, estimate, h200
from benchmarks.gpu.convert_rows import UNFINISHED, KeptRows, row_key
from steps.report.build import RowResult
from steps.report.publish import publish
from steps.report.schema import Results
from tests.convert_tools import results, small, where_much_is_missing, write_inputs

# -- the clock --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _terminate() -> Iterator[None]:
    """No test leaves a handler behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def patience(seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    raise AssertionError("nothing stopped it")


def test_work_is_stopped_when_its_time_is_over() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeUp), time_limit(0.2):
        patience()
    assert 0.2 <= time.monotonic() - begun < 5


def test_a_signal_from_outside_stops_it_too() -> None:
    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        patience()

    with pytest.raises(TimeUp), time_limit(60):
        interrupted()


def test_without_time_nothing_is_begun() -> None:
    with pytest.raises(TimeUp), time_limit(0.0):
        raise AssertionError("it was begun")


def test_failures_are_not_taken_for_the_end_of_the_time() -> None:
    def records_failures() -> str:
        try:
            patience()
        except Exception as error:
            return str(error)
        return "done"

    with pytest.raises(TimeUp), time_limit(0.1):
        records_failures()
    with pytest.raises(SystemExit) as left, time_limit(60):
        raise SystemExit(5)
    assert left.value.code == 5


def test_what_ends_in_time_is_left_alone() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.2)


def test_a_stop_that_was_swallowed_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that had just done its last step notes the signal and ends by itself; what follows has to stop."""
    monkeypatch.setattr(convert_clock, "AGAIN_S", 0.1)
    noted: list[int] = []

    def notes_the_first() -> None:
        outer = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
        while not noted:
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, outer)
        patience()

    with pytest.raises(TimeUp), time_limit(0.1):
        notes_the_first()


def test_tidying_up_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_clock, "AGAIN_S", 0.05)
    tidied: list[bool] = []

    def tidies_up() -> None:
        try:
            patience()
        finally:
            time.sleep(0.3)
            tidied.append(True)

    with pytest.raises(TimeUp), time_limit(0.1):
        tidies_up()
    assert tidied


# -- settings ---------------------------------------------------------------------------------------------------------


def test_every_row_there_is_is_converted() -> None:
    spec = convert_grid.settings(short=True)
    known = {p.stem for p in (Path(params.__file__).parent / "cells").glob("*.yaml")}
    assert {cell.name for cell in spec.cells} == known
    assert spec.seeds == (0,)


def test_every_cut_cuts_something() -> None:
    whole = convert_grid.settings().model_dump(mode="json")
    cells = {cell["name"]: cell for cell in whole["cells"]}
    for key in convert_grid.SHORT:
        cut = convert_grid.settings(short=True).model_dump(mode="json")
        path = key.split(".")
        before, after = whole, cut
        if path[0] == "cells":
            before, after = cells, {cell["name"]: cell for cell in cut["cells"]}
            path = path[1:]
        for part in path:
            before, after = before[part], after[part]
        assert before != after, key


def test_cuts_of_rows_that_are_left_out_are_left_out() -> None:
    spec = convert_grid.settings(cells="ar,ar_tuned", short=True, overrides=["eval.nelbo_samples=3"])
    assert [cell.name for cell in spec.cells] == ["ar", "ar_tuned"]
    assert spec.eval.nelbo_samples == 3, "what is set wins"
    assert spec.bench.batch_sizes == (1,)


def test_the_cut_preset_is_expected_to_fit_half_an_hour() -> None:
    """By the plan's own counts, at both ends of what is likely; nothing of it is measured."""
    from steps import plan

    totals = [plan.validate(convert_grid.settings(short=True), dry_run=True, machine=h200(*r)).cost for r in RATES]
    assert totals[0].total_s < 25 * 60
    assert totals[1].total_s < totals[0].total_s
    told = estimate(convert_grid.settings(short=True))
    assert f": {totals[0].total_s / 60:.0f} min" in told
    assert all(f"  {name}  " in told for name in totals[0].rows)


def test_a_rows_key_follows_what_its_numbers_depend_on() -> None:
    def key(name: str, *overrides: str, cells: str | None = None, seeds: str = "0") -> str:
        spec = convert_grid.settings("test", cells=cells, seeds=seeds, overrides=overrides)
        return row_key(spec, next(row for row in spec.rows() if row.cell.name == name))

    plain = key("random_mask")
    assert key("random_mask", cells="ar,random_mask") == plain, "other rows are not its business"
    assert key("random_mask", "bench.rounds=7") == plain, "its speed is not kept with it"
    assert key("random_mask", seeds="0,1") == plain, "the same seed in a larger grid"
    assert key("random_mask", seeds="1") != plain
    for other in ("eval.nelbo_samples=3", "budget.value=999", "cells.random_mask.train.lr=1e-5", "data.split_seed=1"):
        assert key("random_mask", other) != plain, other
    branch = key("repr_align_trajectory")
    assert key("repr_align_trajectory", "cells.repr_align_all.train.lr=1e-5") != branch, "it continues from that row"


# -- whole conversions ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def call(tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("DLLM_RUNS", "")  # restored afterwards

    def run(*more: str, place: str = "first") -> int:
        return convert.main(small(tmp_path / place, inputs, *more))

    return run


def stop_at(monkeypatch: pytest.MonkeyPatch, place: str, *, step: int = 0) -> None:
    """Let the time be over when the work arrives at a place."""
    from steps import benchmark, evaluate_cell, train_run

    if place == "training":
        record = train_run.Recorder.record

        def recorded(self: Any, row: dict[str, Any]) -> None:
            record(self, row)
            if row["step"] == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(train_run.Recorder, "record", recorded)
        return
    module = {"evaluation": evaluate_cell, "benchmark": benchmark}[place]

    def stopped(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        patience()

    monkeypatch.setattr(module, "_measure", stopped)


def measured(found: Results) -> dict[str, Any]:
    """Return what does not depend on the clock."""
    rows = {}
    for row in found.cells:
        told = row.model_dump(exclude={"origin", "bench"})
        for part, name in (("train", "tokens_per_s"), ("eval", "eval_s"), ("cost", "train_s")):
            if told[part]:
                told[part].pop(name)
        for name in ("extraction_s", "peak_memory_gb"):
            (told["cost"] or {}).pop(name, None)
        rows[row.row_id] = told
    return {"rows": rows, "comparisons": [c.model_dump() for c in found.comparisons], "seeds": found.seeds}


def test_it_runs_where_trackers_and_plots_are_missing_and_can_be_published(tmp_path: Path, inputs: list[str]) -> None:
    """Another process, since this one has all of it; the drawing is done here, as it will be."""
    process = where_much_is_missing(small(tmp_path, inputs, "--cells", "ar,ar_tuned,block_causal,repr_align_all"))
    said, _ = process.communicate(timeout=240)
    assert process.returncode == convert.OK, said
    found = results(tmp_path)
    assert [row.row_id for row in found.cells] == ["ar", "ar_tuned", "block_causal", "repr_align_all"]
    assert {row.status for row in found.cells} == {"ok"}
    assert {tuple(row.bench.steps) for row in found.cells if row.bench} == {("ar",), ("4",)}
    assert found.versions["metaflow"], "the record names what is installed"
    assert found.command.startswith("python benchmarks/gpu/convert.py --preset test")
    assert str(tmp_path) not in (tmp_path / "out" / "convert-results.json").read_text()
    told = {
        name: float(said.split(f"{name}, bound minus likelihood of ar_tuned, nats/token: ")[1].split()[0])
        for name in convert.COMPARED
    }
    values = {row.name: row.eval for row in found.cells}
    tuned = values["ar_tuned"].exact_nats_per_token.value
    assert told["block_causal"] == pytest.approx(
        values["block_causal"].block_nelbo_nats_per_token.value - tuned, abs=1e-4
    )
    assert told["repr_align_all"] == pytest.approx(
        values["repr_align_all"].nelbo_nats_per_token.value - tuned, abs=1e-4
    )
    assert "ar_tuned (T=1.0): " in said, "a text of every row"

    page = tmp_path / "page"
    (page / "benchmarks" / "results").mkdir(parents=True)
    (page / "docs").mkdir()
    (page / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    (page / "docs" / "LEADERBOARD.md").write_text("<!-- grids -->\n<!-- /grids -->\n")
    stored = publish(tmp_path / "out" / "convert-results.json", page, name="gpu")
    assert Results.model_validate_json(stored.read_text()).cells == found.cells
    assert (page / "docs" / "figures" / "gpu.png").stat().st_size > 10_000
    assert "block_causal" in (page / "README.md").read_text()


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory, inputs: list[str]) -> Results:
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DLLM_RUNS", "")
        assert convert.main(small(place, inputs, "--cells", "random_mask")) == convert.OK
    return results(place)


@pytest.mark.parametrize("place", ["training", "evaluation", "benchmark"])
def test_a_call_that_is_stopped_is_gone_on_with(
    place: str,
    call: Callable[..., int],
    tmp_path: Path,
    never_stopped: Results,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    cells = ("--cells", "random_mask")
    with monkeypatch.context() as patched:
        stop_at(patched, place, step=4)
        assert call(*cells) == convert.CALL_AGAIN
    said = capsys.readouterr()
    out = tmp_path / "first" / "out"
    if place == "benchmark":
        assert "not finished: benchmark" in said.err
        (row,) = results(tmp_path / "first").cells
        assert row.status == "ok"
        assert row.bench is None
    else:
        assert "not finished: random_mask" in said.err
        assert not list(out.glob("convert-*")), "no row, no results"

    assert call(*cells) == convert.OK
    said = capsys.readouterr()
    assert ("continues after step 4 of 10" in said.out) == (place == "training")
    assert ("cache hit train_cell/random_mask" in said.out) == (place != "training")
    assert measured(results(tmp_path / "first")) == measured(never_stopped)
    assert results(tmp_path / "first").cells[0].bench is not None


def test_a_deadline_leaves_the_other_rows_for_the_next_call(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The clock jumps to the end while the second row trains; the third is not begun."""
    cells = ("--cells", "ar,ar_tuned,random_mask")
    jumped: list[float] = []
    with monkeypatch.context() as patched:
        patched.setattr(convert_grid.Conversion, "remaining_s", property(lambda self: 1.0 if jumped else 100.0))
        from steps import train_run

        record = train_run.Recorder.record

        def recorded(self: Any, row: dict[str, Any]) -> None:
            record(self, row)
            jumped.append(0.0)
            os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(train_run.Recorder, "record", recorded)
        assert call(*cells, "--deadline", "120") == convert.CALL_AGAIN
    assert "not finished: ar_tuned, random_mask" in capsys.readouterr().err
    found = results(tmp_path / "first")
    assert [(r.row_id, r.status, r.error) for r in found.cells] == [
        ("ar", "ok", None),
        ("ar_tuned", "failed", UNFINISHED),
        ("random_mask", "failed", UNFINISHED),
    ]
    assert all(row.bench is None for row in found.cells), "speed is measured of all rows together"
    assert call(*cells) == convert.OK
    assert {row.status for row in results(tmp_path / "first").cells} == {"ok"}


def test_a_benchmark_is_not_begun_in_vain(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It has no half-way: with too little time left for it the next call begins with it."""
    with monkeypatch.context() as patched:
        done = lambda self: 0.01 if set(self.kept.rows) == set(self.keys) else 100.0  # noqa: E731
        patched.setattr(convert_grid.Conversion, "remaining_s", property(done))
        assert call("--cells", "ar", "--deadline", "120") == convert.CALL_AGAIN
    said = capsys.readouterr()
    assert "[benchmark] no time was left" in said.out
    assert "[benchmark] round" not in said.out
    assert call("--cells", "ar", "--deadline", "120") == convert.OK
    assert results(tmp_path / "first").cells[0].bench is not None


def test_a_benchmark_is_begun_at_the_latest_by_the_next_call(tmp_path: Path, inputs: list[str]) -> None:
    spec = convert_grid.settings("test", cells="ar", model=inputs[1], data=inputs[3], overrides=["bench.rounds=9999"])
    long = convert_grid.Conversion(spec, "", tmp_path, time.monotonic() + 100)._benchmark_s()
    assert long == pytest.approx(50.0, abs=1.0), "half of a call, however long it takes"
    assert convert_grid.Conversion(spec, "", tmp_path, float("inf"))._benchmark_s() == 0.0


def test_a_failed_row_costs_the_others_nothing(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("DLLM_FAIL_CELL", "random_mask")
    cells = ("--cells", "ar,random_mask,ar_tuned")
    assert call(*cells) == convert.FAILED
    said = capsys.readouterr()
    assert "failed: random_mask" in said.err
    assert "made to fail" in said.out + said.err
    assert {row.row_id: row.status for row in results(tmp_path / "first").cells} == {
        "ar": "ok",
        "random_mask": "failed",
        "ar_tuned": "ok",
    }
    monkeypatch.delenv("DLLM_FAIL_CELL")
    assert call(*cells) == convert.OK
    assert {row.status for row in results(tmp_path / "first").cells} == {"ok"}


def test_rows_of_a_machine_that_is_gone_are_not_trained_again(
    call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    """All that came back is the small file; the row that is missing is trained, the others are taken over."""
    assert call("--cells", "ar_tuned,random_mask") == convert.OK
    before = results(tmp_path / "first")
    kept = (tmp_path / "first" / "out" / "convert-rows.json.gz").read_bytes()
    told = json.loads(gzip.decompress(kept))
    del told["rows"]["random_mask"]
    out = tmp_path / "second" / "out"
    out.mkdir(parents=True)
    (out / "convert-rows.json.gz").write_bytes(gzip.compress(json.dumps(told).encode()))
    capsys.readouterr()
    assert call("--cells", "ar_tuned,random_mask", place="second") == convert.OK
    said = capsys.readouterr().out
    assert "[ar_tuned] step" not in said
    assert "[random_mask] step" in said
    assert "ar_tuned: its weights stayed on another machine" in said
    after = results(tmp_path / "second")
    assert measured(after) == measured(before)
    assert {row.row_id: row.bench is not None for row in after.cells} == {"ar_tuned": False, "random_mask": True}


def test_bad_settings_are_told_in_two_lines(call: Callable[..., int], capsys: Any) -> None:
    assert call("--cells", "random_mast") == convert.BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert said[-2].startswith("error: ")
    assert "Did you mean 'random_mask'?" in said[-1]


# -- kept rows --------------------------------------------------------------------------------------------------------


def test_kept_rows_are_those_of_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "kept.json.gz"
    rows = [RowResult(name, name, name, 0, "ok", False) for name in ("ar", "random_mask")]
    keys = {row.row_id: f"key of {row.row_id}" for row in rows}
    kept = KeptRows(path, "bench", {"model": {}, "data": {}, "hardware": {}, "versions": {}})
    for row in rows:
        kept.put(keys[row.row_id], "", row)
    kept.bench = {"rows": {}, "ties": []}
    kept.write()
    assert KeptRows.load(path, keys, "bench") == kept
    assert KeptRows.load(path, keys, "other settings of the benchmark").bench is None
    fewer = KeptRows.load(path, {**keys, "random_mask": "other"}, "bench")  # other settings are another row
    assert list(fewer.rows) == ["ar"]
    assert fewer.bench is None
    assert KeptRows.load(tmp_path / "nowhere", keys, "bench").rows == {}
    renamed = KeptRows.load(path, {"ar-seed0": keys["ar"], "ar-seed1": "key of another seed"}, "bench")
    assert {name: row["result"]["row_id"] for name, row in renamed.rows.items()} == {"ar-seed0": "ar-seed0"}
    assert renamed.rows["ar-seed0"]["metrics"] == kept.rows["ar"]["metrics"]


def test_seeds_are_worked_off_one_after_the_other(tmp_path: Path) -> None:
    """So that a grid of one seed is whole when the time is over."""
    spec = convert_grid.settings("test", cells="repr_align_trajectory,repr_align_all,ar", seeds="0,1")
    conversion = convert_grid.Conversion(spec, "", tmp_path, float("inf"))
    conversion.__dict__["shared"] = SimpleNamespace(model=SimpleNamespace(num_layers=2))
    assert [row.row_id for row in conversion.order()] == [
        f"{name}-seed{seed}" for seed in (0, 1) for name in ("repr_align_trajectory", "repr_align_all", "ar")
    ]


def test_quality_is_ranked_only_when_every_row_is_there(tmp_path: Path) -> None:
    spec = convert_grid.settings("test", cells="ar,ar_tuned", seeds="0,1,2")
    about = {"model": {}, "data": {}, "hardware": {}, "versions": {}, "commit": "abc", "dirty": True}
    kept = KeptRows(tmp_path / "kept.json.gz", "bench", about)
    for row in spec.rows()[:-1]:
        kept.put("key", "", RowResult(row.row_id, row.cell.name, "ar", row.seed, "ok", False))
    found = kept.results(spec, "run", "command")
    assert not found.ranked
    assert (found.git_commit, found.git_dirty) == ("abc", True)
    last = spec.rows()[-1]
    kept.put("key", "", RowResult(last.row_id, last.cell.name, "ar", last.seed, "ok", False))
    assert kept.results(spec, "run", "command").ranked


def test_main_numbers_of_a_row() -> None:
    told = {
        "trained": True,
        "evaluation": {"nelbo_nats_per_token": {"value": 5.0, "se": None}, "frontier": [{"temperature": 0.5}]},
        "train": {"tokens_per_s": 100.0, "wall_s": 2.0, "flops": 3e15, "peak_memory_gb": None},
    }
    assert convert_rows.numbers(told) == {
        "likelihood": "nelbo",
        "nats_per_token": 5.0,
        "text_temperature": 0.5,
        "train_tokens_per_s": 100.0,
        "train_s": 2.0,
        "pflop": 3.0,
    }
