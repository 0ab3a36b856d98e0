"""The step cache: what a key is made of, that nothing broken is ever served, and that work is done once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.cache import Entry, StepCache
from steps.cache import key as keys
from steps.cache.store import damage_of, read_manifest

ROOT = Path(__file__).resolve().parents[2]


def write_a_file(payload: Path, work: Path) -> dict[str, Any]:
    (payload / "below").mkdir()
    (payload / "below" / "weights.bin").write_bytes(b"0123456789")
    return {"answer": 42, "pair": (1, 2)}


def get(cache: StepCache, build: Callable[..., Any] = write_a_file, **changed: Any) -> Entry:
    settings: dict[str, Any] = {
        "fields": {"lr": 0.1, "steps": 3},
        "inputs": {"data": "abc"},
        "roots": ["dllm_core.data.batch", "dllm_core.data.order"],
        "libraries": ["pytest"],
        "label": "row",
        **changed,
    }
    return cache.get_or_build("toy", settings.pop("fields"), build=build, **settings)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, lines: list[str]) -> StepCache:
    return StepCache(tmp_path / "runs", "run-1", log=lines.append)


def never(payload: Path, work: Path) -> dict[str, Any]:
    raise AssertionError("built although it was there")


def test_second_time_is_a_hit_with_the_same_result(cache: StepCache, lines: list[str]) -> None:
    built = get(cache)
    later = get(StepCache(cache.runs_dir, "run-2", log=lines.append), never)
    assert (built.hit, later.hit) == (False, True)
    assert built.result == later.result == {"answer": 42, "pair": [1, 2]}
    assert later.origin == "run-1"
    assert (later.path / "below" / "weights.bin").read_bytes() == b"0123456789"
    assert lines == [f"cache hit toy/row {built.key[:6]}… (from run run-1, just now)"]


def test_results_are_copies(cache: StepCache) -> None:
    get(cache).result["answer"] = 0
    assert get(cache, never).result["answer"] == 42


@pytest.mark.parametrize(
    "changed",
    [
        {"fields": {"lr": 0.2, "steps": 3}},
        {"fields": {"lr": 0.1, "steps": 3, "more": None}},
        {"fields": {"lr": 0.1, "steps": "3"}},
        {"inputs": {"data": "abd"}},
        {"inputs": {"data": "abc", "anchors": "x"}},
        {"roots": ["dllm_core.data.batch"]},
        {"libraries": ["pytest", "hypothesis"]},
    ],
    ids=lambda c: str(c),
)
def test_key_changes_with_what_it_depends_on(cache: StepCache, changed: dict[str, Any]) -> None:
    assert get(cache, **changed).key != get(cache).key


@pytest.mark.parametrize(
    "changed",
    [
        {"fields": {"steps": 3, "lr": 0.1}},
        {"label": "another name"},
        {"roots": ["dllm_core.data.order", "dllm_core.data.batch"]},
        {"libraries": ["pytest", "pytest"]},
    ],
    ids=lambda c: str(c),
)
def test_key_ignores_order_and_labels(cache: StepCache, changed: dict[str, Any]) -> None:
    get(cache)
    assert get(cache, never, **changed).hit


def test_key_changes_with_a_library_version(cache: StepCache, monkeypatch: pytest.MonkeyPatch) -> None:
    before = get(cache).key
    monkeypatch.setattr(keys, "version", lambda name: "99.0")
    assert get(cache).key != before


def test_kind_is_part_of_the_key() -> None:
    parts = [keys.material(kind, {}, {}, [], []) for kind in ("a", "b")]
    assert keys.key_of(parts[0]) != keys.key_of(parts[1])


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
def test_canonical_text_survives_json(value: dict[str, Any]) -> None:
    text = keys.canonical(value)
    assert keys.canonical(json.loads(text)) == text


@pytest.mark.parametrize("bad", [float("nan"), Path("x"), object()])
def test_what_has_no_canonical_form_is_refused(cache: StepCache, bad: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        get(cache, fields={"bad": bad})


def test_a_clock_that_is_set_back_makes_no_negative_time(cache: StepCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step took is charged to rows; it was the difference of two wall clocks."""
    now = time.time()

    def set_back(payload: Path, work: Path) -> dict[str, Any]:
        monkeypatch.setattr(time, "time", lambda: now - 3600)
        return {}

    assert 0 <= get(cache, set_back).seconds < 60


def test_failure_is_not_stored_and_the_work_directory_is_kept(cache: StepCache) -> None:
    def fail(payload: Path, work: Path) -> dict[str, Any]:
        (payload / "half").write_text("x")
        (work / "checkpoint").write_text("step 7")
        raise RuntimeError("no")

    def go_on(payload: Path, work: Path) -> dict[str, Any]:
        return {"from": (work / "checkpoint").read_text()}

    with pytest.raises(RuntimeError, match="no"):
        get(cache, fail)
    assert not list((cache.runs_dir / "cache" / "toy").iterdir())
    entry = get(cache, go_on)
    assert entry.result == {"from": "step 7"}
    assert not cache.work_dir("toy", entry.key).exists()


def spoil_bytes(home: Path) -> None:
    (home / "payload" / "below" / "weights.bin").write_bytes(b"012345678X")


def spoil_bytes_and_time(home: Path) -> None:
    path = home / "payload" / "below" / "weights.bin"
    stat = path.stat()
    spoil_bytes(home)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def spoil_size(home: Path) -> None:
    (home / "payload" / "below" / "weights.bin").write_bytes(b"0123")


def spoil_file(home: Path) -> None:
    (home / "payload" / "below" / "weights.bin").unlink()


def spoil_manifest(home: Path) -> None:
    path = home / "manifest.json"
    path.write_text(path.read_text()[:-20])


def spoil_manifest_keys(home: Path) -> None:
    (home / "manifest.json").write_text('{"files": {}}')


def spoil_everything(home: Path) -> None:
    shutil.rmtree(home / "payload")
    (home / "manifest.json").unlink()


SPOILERS = [
    spoil_bytes,
    spoil_bytes_and_time,
    spoil_size,
    spoil_file,
    spoil_manifest,
    spoil_manifest_keys,
    spoil_everything,
]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_damage_is_found_reported_once_and_rebuilt(
    cache: StepCache, lines: list[str], spoil: Callable[[Path], None]
) -> None:
    first = get(cache)
    spoil(first.path.parent)
    again = get(cache)
    assert not again.hit
    assert (again.path / "below" / "weights.bin").read_bytes() == b"0123456789"
    assert len(lines) == 1
    assert "damaged" in lines[0]
    assert get(cache, never).hit


def test_large_file_is_hashed_again_only_when_touched(cache: StepCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit on a checkpoint must not read it; a file written to since must be read."""

    def big(payload: Path, work: Path) -> dict[str, Any]:
        (payload / "big").write_bytes(b"x" * 100)
        return {}

    home = get(cache, big).path.parent
    monkeypatch.setattr("steps.cache.store.ALWAYS_HASHED_BYTES", 10)
    stat = (home / "payload" / "big").stat()
    (home / "payload" / "big").write_bytes(b"y" * 100)
    assert damage_of(home) is not None
    os.utime(home / "payload" / "big", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert damage_of(home) is None
    assert damage_of(home, thorough=True) is not None


def test_without_cache_builds_again_and_replaces_but_finds_its_own(cache: StepCache, lines: list[str]) -> None:
    get(cache)
    fresh = StepCache(cache.runs_dir, "run-2", use_cache=False, log=lines.append)
    assert not get(fresh).hit
    assert get(fresh, never).hit
    assert get(StepCache(cache.runs_dir, "run-3", log=lines.append), never).origin == "run-2"


def test_without_cache_ignores_checkpoints_of_other_runs(cache: StepCache) -> None:
    def fail(payload: Path, work: Path) -> dict[str, Any]:
        (work / "checkpoint").touch()
        raise RuntimeError

    def look(payload: Path, work: Path) -> dict[str, Any]:
        return {"found": (work / "checkpoint").exists()}

    with pytest.raises(RuntimeError):
        get(cache, fail)
    fresh = StepCache(cache.runs_dir, "run-2", use_cache=False)
    assert get(fresh, look).result == {"found": False}
    with pytest.raises(RuntimeError):
        get(fresh, fail, fields={"other": 1})
    assert get(fresh, look, fields={"other": 1}).result == {"found": True}


def test_unwritable_runs_directory_is_said_in_two_lines(tmp_path: Path) -> None:
    from dllm_core.errors import DllmError

    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DllmError, match="Cannot write"):
        get(StepCache(blocked / "runs"))


# -- several processes ----------------------------------------------------------------------------------------------

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from steps.cache import StepCache
cache = StepCache(Path({runs!r}), "other", log=lambda line: print(line, flush=True))
def get(build):
    return cache.get_or_build("toy", {{"lr": 0.1, "steps": 3}}, inputs={{"data": "abc"}},
        roots=["dllm_core.data.batch", "dllm_core.data.order"], libraries=["pytest"], build=build, label="row")
"""


def python(cache: StepCache, body: str) -> subprocess.Popen[str]:
    code = PREAMBLE.format(root=str(ROOT), runs=str(cache.runs_dir)) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_kill_during_a_build_leaves_no_entry_and_the_next_one_builds(cache: StepCache) -> None:
    child = python(
        cache,
        """
        def build(payload, work):
            (payload / "half").write_text("x")
            (work / "checkpoint").write_text("step 7")
            os.kill(os.getpid(), signal.SIGKILL)
        get(build)
        """,
    )
    assert child.wait(20) == -signal.SIGKILL
    kept: list[str] = []

    def build(payload: Path, work: Path) -> dict[str, Any]:
        kept.append((work / "checkpoint").read_text())
        assert not list(payload.iterdir())
        return {"n": 1}

    entry = get(cache, build)
    assert not entry.hit
    assert kept == ["step 7"]
    left = [p.name for p in (cache.runs_dir / "cache" / "toy").iterdir()]
    assert left == [entry.key], "leftovers of the killed build were cleared"


def _count_builds(runs: str, barrier: Any) -> None:
    barrier.wait()

    def build(payload: Path, work: Path) -> dict[str, Any]:
        with (Path(runs) / "built").open("a") as handle:
            handle.write("x")
        time.sleep(0.3)
        return {}

    get(StepCache(Path(runs), log=lambda line: None), build)


def test_concurrent_builders_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    (tmp_path / "runs").mkdir()
    workers = [context.Process(target=_count_builds, args=(str(tmp_path / "runs"), barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert (tmp_path / "runs" / "built").read_text() == "x"


def test_waits_for_a_live_owner_and_takes_over_from_a_killed_one(cache: StepCache, lines: list[str]) -> None:
    """The owner sits in a build; we wait, saying for whom. It is killed; we build at once."""
    child = python(cache, "get(lambda payload, work: (print('building', flush=True), time.sleep(60)))")
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "building"
    killer = multiprocessing.get_context("fork").Process(target=_kill_later, args=(child.pid, 1.0))
    killer.start()
    started = time.monotonic()
    entry = get(cache)
    waited = time.monotonic() - started
    killer.join()
    child.wait(10)
    assert not entry.hit
    assert 0.8 < waited < 20
    assert len(lines) == 1
    assert f"waiting for toy/row: in use by pid {child.pid}" in lines[0]


def _kill_later(pid: int, delay: float) -> None:
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)


def test_hit_imports_nothing_heavy(cache: StepCache) -> None:
    get(cache)
    child = python(
        cache,
        """
        assert get(None).hit
        heavy = {"torch", "transformers", "mlflow", "pandas", "numpy", "matplotlib", "metaflow", "datasets"}
        print(sorted(heavy & set(sys.modules)))
        """,
    )
    out, _ = child.communicate(timeout=30)
    assert out.splitlines()[-1] == "[]"


def test_manifest_says_what_the_key_was_made_of(cache: StepCache) -> None:
    parts = read_manifest(get(cache).path.parent)["material"]
    assert parts["fields"] == {"lr": 0.1, "steps": 3}
    assert set(parts["sources"]) >= {"dllm_core", "dllm_core.data.order", "dllm_core.data.batch"}
    assert parts["libraries"]["pytest"] == pytest.__version__
