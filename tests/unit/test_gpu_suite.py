"""The GPU suite's own business: rows that are kept, time that is over, targets, how parts end. No GPU needed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _report
from benchmarks.gpu import parts, run_all, targets
from benchmarks.gpu.parts import ATTEMPTS, OUT_OF_MEMORY, OUT_OF_TIME, Context, Rows
from benchmarks.gpu.targets import Target, judge

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"benchmark": "gpu/run_all", "commit": "abc", "dirty": False, "hardware": {"gpu": None}}


def context(folder: Path, *, left_s: float = 60.0, identity: str = "same", profile: bool = False) -> Context:
    rows = Rows(folder / "smoke-ldlm.json", dict(HEAD), {"source": identity})
    deadline = time.monotonic() + left_s
    return Context("ldlm", torch.device("cpu"), True, 0, profile, rows, folder, deadline)


def stored(folder: Path, part: str = "ldlm") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"smoke-{part}.json").read_text())
    return found


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_on_disk_before_the_next_begins_and_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def measure(name: str) -> dict[str, Any]:
        calls.append(name)
        if name == "b":
            assert stored(tmp_path)["rows"]["a"]["found"] == {"speed": 1.5}
            assert "stopped while it ran" in stored(tmp_path)["rows"]["b"]["not_measured"]
        return {"speed": 1.5}

    for _ in range(2):
        part = context(tmp_path)
        assert [part.row(n, lambda n=n: measure(n), settings={"size": (1, 2)}) for n in "ab"] == [{"speed": 1.5}] * 2
    assert calls == ["a", "b"]
    row = stored(tmp_path)["rows"]["a"]
    assert (row["commit"], row["dirty"], row["settings"]) == ("abc", False, {"size": [1, 2]})
    assert {"date", "wall_s"} <= set(row)


def test_other_settings_and_other_code_are_measured_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"n": len(calls)}

    assert context(tmp_path).row("a", measure, settings={"rounds": 3}) == {"n": 1}
    assert context(tmp_path).row("a", measure, settings={"rounds": 4}) == {"n": 2}
    assert context(tmp_path).row("a", measure, settings={"rounds": 4}) == {"n": 2}
    assert "kept from" in capsys.readouterr().err
    assert context(tmp_path, identity="other").row("a", measure, settings={"rounds": 4}) == {"n": 3}
    aside = json.loads((tmp_path / "smoke-ldlm.previous.json").read_text())
    assert aside["rows"]["a"]["found"] == {"n": 2}, "what was measured before is not lost"


def test_no_row_begins_that_would_end_too_late(tmp_path: Path) -> None:
    def never() -> dict[str, Any]:
        raise AssertionError("begun")

    assert context(tmp_path, left_s=10.0).row("long", never, needs_s=11.0) is None
    assert context(tmp_path, left_s=-1.0).row("late", never) is None
    assert {row["not_measured"] for row in stored(tmp_path)["rows"].values()} == {OUT_OF_TIME}
    assert context(tmp_path, left_s=12.0).row("long", lambda: {"x": 1}, needs_s=11.0) == {"x": 1}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("no room"), OUT_OF_MEMORY),
        (RuntimeError(f"first line of {ROOT}/x\nsecond"), "not measured: RuntimeError: first line of ./x"),
    ],
)
def test_a_row_that_fails_leaves_the_others_alone(tmp_path: Path, error: Exception, told: str) -> None:
    def fail() -> dict[str, Any]:
        raise error

    part = context(tmp_path)
    assert part.row("bad", fail) is None
    assert part.row("good", lambda: {"x": 1}) == {"x": 1}
    assert stored(tmp_path)["rows"]["bad"]["not_measured"] == told
    assert part.row("bad", lambda: {"x": 2}) == {"x": 2}, "a later run tries again"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_are_finite_or_no_numbers(tmp_path: Path, value: float) -> None:
    assert context(tmp_path).row("a", lambda: {"deep": [{"ratio": 1.0, "speed": value}]}) is None
    assert f"deep[0].speed is {value}" in stored(tmp_path)["rows"]["a"]["not_measured"]


def test_a_row_that_ends_its_process_is_left_out_in_the_end(tmp_path: Path) -> None:
    for _ in range(ATTEMPTS):
        context(tmp_path).rows.begin("deadly", {})
    assert context(tmp_path).row("deadly", lambda: {"x": 1}) is None
    assert f"ended its process {ATTEMPTS} times" in stored(tmp_path)["rows"]["deadly"]["not_measured"]
    assert context(tmp_path).row("deadly", lambda: {"x": 1}, settings={"size": 1}) == {"x": 1}


def test_the_source_is_library_and_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("dllm_core", "benchmarks/gpu", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(_report, "ROOT", tmp_path)
    seen = [parts.source_digest()]
    for folder in ("docs", "dllm_core", "benchmarks/gpu"):
        (tmp_path / folder / "a.py").write_text("x = 2\n")
        seen.append(parts.source_digest())
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


# -- targets ----------------------------------------------------------------------------------------------------------

LEAST = Target("row", "speed", "a speed", 20_000.0, stretch=31_000.0)
MOST = Target("row", "ratio", "a ratio", 1.1, "most")


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (LEAST, 20_000.0, "met"),
        (LEAST, math.nextafter(20_000.0, 0), "missed"),
        (LEAST, 40_000.0, "met"),
        (MOST, 1.1, "met"),
        (MOST, math.nextafter(1.1, 2), "missed"),
        (MOST, 0.5, "met"),
        (replace(LEAST, bound=None), 3.0, "shown"),
    ],
)
def test_targets_at_their_bound(target: Target, value: float, verdict: str) -> None:
    rows = {"row": {"found": {"headline": {target.number: value}, "passed": True}}}
    told = judge(target, rows)
    assert (told["verdict"], told["measured"]) == (verdict, value)
    wrong = {"row": {"found": {"headline": {target.number: value}, "passed": False}}}
    assert judge(target, wrong)["verdict"] == "missed", "speed with other results is worth nothing"
    assert judge(target, rows, smoke=True)["verdict"] == "not measured"


def test_what_has_no_number_says_why() -> None:
    assert judge(LEAST, {})["verdict"] == "not measured"
    told = judge(LEAST, {"row": {"not_measured": OUT_OF_TIME}})
    assert (told["verdict"], told["measured"], told["why"]) == ("not measured", None, "out of time")
    text = targets.table([("ldlm", told)])
    assert text.splitlines()[1].split("a speed")[1].split() == [
        *[">=", "20,000", "(stretch", "31,000)", "-", "not", "measured:", "out", "of", "time"]
    ]


def test_a_miss_shows_the_two_numbers() -> None:
    numbers = targets.two_numbers({"bytes": 4e9, "flops": 6e12}, {"gb_per_s": 4000.0, "tflop_per_s": 600.0})
    assert numbers == pytest.approx({"bytes_s": 1e-3, "operations_s": 1e-2})
    found = {"headline": {"speed": 1.0}, "two_numbers": numbers, "seconds": 0.025}
    told = judge(LEAST, {"row": {"found": found}})
    assert told["why"] == "bytes 1 ms, operations 10 ms, measured 25 ms"


def test_only_a_row_with_a_target_can_miss() -> None:
    slow, fast = ({"headline": {"tokens_per_s": x, "share_of_roofline": 1, "fast_over_eager": 9}} for x in (1.0, 1e9))
    assert targets.misses("ldlm", targets.HEADLINE_LDLM, slow)
    assert not targets.misses("ldlm", targets.HEADLINE_LDLM, fast)
    assert not targets.misses("ldlm", "another row", slow)


# -- the command ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_all, "start", lambda *given: pytest.fail("a part was begun"))
    assert run_all.main([]) == 2
    told = capsys.readouterr().err
    assert "No usable NVIDIA GPU" in told
    assert "--smoke" in told


def test_unknown_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_all.arguments(["--parts", "decode,speed"])
    assert "['speed']" in capsys.readouterr().err


DRIVER = """
import os, signal, subprocess, sys, time, types
from pathlib import Path
log = Path(sys.argv.pop(1))
part = types.ModuleType("benchmarks.gpu.kernels")

def run(context):
    def measure(name):
        with log.open("a") as file:
            file.write(name)
        if name == "b" and log.read_text().count("b") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "h":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            with log.open("a") as file:
                file.write(f"<{child.pid}>")
            time.sleep(60)
        return {"x": 1.0}

    for name in os.environ["ROWS_OF_THE_TEST"]:
        context.row(name, lambda: measure(name))
    return {"note": "done"}

part.run = run
sys.modules["benchmarks.gpu.kernels"] = part
from benchmarks.gpu import run_all
run_all.GRACE_S = 1.0
sys.exit(run_all.main(sys.argv[1:]))
"""


def driven(folder: Path, rows: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a part that notes what it measures, dies once in row b and hangs in row h."""
    command = [sys.executable, "-c", DRIVER, str(folder / "log"), "--smoke", "--worker", "kernels"]
    places = ["--out", str(folder), "--work", str(folder / "work")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ROWS_OF_THE_TEST": rows}
    return subprocess.run(
        [*command, *places, *words], capture_output=True, text=True, env=env, timeout=120, start_new_session=True
    )


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = driven(tmp_path, "abc")
    assert first.returncode == -9, first.stderr
    assert (tmp_path / "log").read_text() == "ab"
    assert stored(tmp_path, "kernels")["status"] == "running"
    second = driven(tmp_path, "abc")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "log").read_text() == "abbc", "a was measured before the kill and is not measured again"
    assert "a: kept from" in second.stderr
    record = stored(tmp_path, "kernels")
    assert (record["status"], record["note"]) == ("finished", "done")
    assert [row["found"] for row in record["rows"].values()] == [{"x": 1.0}] * 3
    assert {"commit", "seed", "hardware", "versions", "date", "identity"} <= set(record)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


HANGS = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""


def test_a_part_that_hangs_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Rows(tmp_path / "smoke-kernels.json", dict(HEAD), {})
    rows.keep("a", {}, {"x": 1.0}, 0.1)
    rows.begin("h", {})
    command = [sys.executable, "-c", HANGS, str(tmp_path / "child")]
    monkeypatch.setattr(run_all, "worker_command", lambda args, part, limit_s: command)
    monkeypatch.setattr(run_all, "GRACE_S", 1.0)
    args = run_all.arguments(["--smoke", "--parts", "kernels", "--out", str(tmp_path), "--part-limit", "3"])
    begun = time.monotonic()
    assert run_all.run_parts(args) == 1
    assert 4 <= time.monotonic() - begun < 30
    record = stored(tmp_path, "kernels")
    assert record["status"] == "ended after 4 s: it did not end by itself"
    assert record["rows"]["a"]["found"] == {"x": 1.0}
    assert not _is_running(int((tmp_path / "child").read_text()))
    told = capsys.readouterr().out
    assert "1 of 2 rows measured" in told
    assert "h: not measured: stopped while it ran" in told
    assert "not measured: ended after 4 s" in told
    assert [t["verdict"] for t in record["targets"]] == ["not measured"] * len(targets.TARGETS["kernels"])


def test_a_part_ends_itself_with_all_it_started_when_its_time_is_over(tmp_path: Path) -> None:
    """Also where nobody waits for it any more."""
    begun = time.monotonic()
    assert driven(tmp_path, "h", "--part-limit", "5").returncode == -9
    assert time.monotonic() - begun < 50
    assert "stopped while it ran" in stored(tmp_path, "kernels")["rows"]["h"]["not_measured"]
    assert not _is_running(int((tmp_path / "log").read_text().split("<")[1].rstrip(">")))


def test_parts_that_do_not_fit_the_time_are_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[float] = []

    def start(args: Any, part: str, limit_s: float) -> str:
        limits.append(limit_s)
        return "finished"

    monkeypatch.setattr(run_all, "start", start)
    words = ["--smoke", "--parts", "kernels,ldlm", "--out", str(tmp_path), "--part-limit", "300"]
    assert run_all.run_parts(run_all.arguments([*words, "--time-limit", "200"])) == 0
    assert limits == [pytest.approx(200 - run_all.GRACE_S, abs=1)] * 2
    limits.clear()
    assert run_all.run_parts(run_all.arguments([*words, "--time-limit", "50"])) == 1
    assert limits == []
    assert "not begun: no time left" in capsys.readouterr().out


def test_a_machine_without_pydantic_measures_the_kernels_and_says_what_it_lacks(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pydantic'] = None\nfrom benchmarks.gpu import run_all\n"
    code += "done = [run_all.main(['--smoke', '--worker', p, *sys.argv[1:]]) for p in ('kernels', 'decode')]\n"
    code += "print(done)"
    places = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    done = subprocess.run([sys.executable, "-c", code, *places], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "[0, 1]", done.stderr
    errors = stored(tmp_path, "kernels")["rows"][targets.ERRORS]["found"]
    assert "pydantic is not installed" in errors["latent_parts"]
    args = run_all.arguments(["--smoke", "--parts", "decode", "--out", str(tmp_path)])
    told = run_all.close(args, "decode", "failed with exit status 1")
    assert {t["verdict"] for t in told} == {"not measured"}
    assert "pydantic" in told[0]["why"]
