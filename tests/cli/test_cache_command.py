"""`python -m steps.cache`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from dllm_core.errors import DllmError
from steps.cache import Entry, StepCache
from steps.cache.__main__ import main
from steps.cache.upkeep import parse_age, parse_size
from steps.locks import hold


@pytest.fixture
def cache(tmp_path: Path) -> StepCache:
    return StepCache(tmp_path, "run-1", log=lambda line: None)


def put(cache: StepCache, label: str, size: int = 1000, kind: str = "toy", **fields: Any) -> Entry:
    def build(payload: Path, work: Path) -> dict[str, Any]:
        (payload / "data").write_bytes(b"x" * size)
        return {}

    settings = {"label": label, "train": {"lr": 0.1, "steps": 3}, **fields}
    return cache.get_or_build(
        kind, settings, inputs={}, roots=["dllm_core.data.batch"], libraries=[], build=build, label=label
    )


def run(cache: StepCache, *arguments: str) -> int:
    return main([*arguments, "--runs-dir", str(cache.runs_dir)])


def use_at(entry: Entry, ago: float) -> None:
    mark = entry.path.parent / "last_used"
    mark.touch()
    os.utime(mark, (time.time() - ago, time.time() - ago))


def test_ls_shows_entries_and_their_sum(cache: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    entry = put(cache, "random_mask", size=2000)
    assert run(cache, "ls") == 0
    first, total = capsys.readouterr().out.splitlines()
    assert entry.key in first
    assert "toy/random_mask" in first
    assert "run-1" in first
    assert total.endswith(f" KB in {cache.runs_dir / 'cache'}")


def test_ls_shows_a_store_that_entries_share(cache: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    (cache.runs_dir / "cache" / "anchors-store" / "0123").mkdir(parents=True)
    (cache.runs_dir / "cache" / "anchors-store" / "0123" / "chunk").write_bytes(b"x" * 500)
    assert run(cache, "ls") == 0
    assert "anchors-store (shared by entries)" in capsys.readouterr().out


def test_empty_cache_can_be_listed(cache: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cache, "ls") == 0
    assert capsys.readouterr().out.startswith("0 B in")


def test_why_names_the_fields_that_differ_from_the_nearest(
    cache: StepCache, capsys: pytest.CaptureFixture[str]
) -> None:
    put(cache, "a", train={"lr": 0.9, "steps": 9})
    near = put(cache, "a", train={"lr": 0.1, "steps": 4})
    put(cache, "a", kind="other")
    put(cache, "b")  # one field away, but another row
    entry = put(cache, "a")
    assert run(cache, "why", entry.key[:8]) == 0
    out = capsys.readouterr().out
    assert f"nearest: {near.key}" in out
    assert out.splitlines()[-1] == "  setting train.steps: 4 there, 3 here"


def test_why_names_the_source_file_that_changed(
    cache: StepCache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, "a")
    monkeypatch.setattr("steps.cache.key.closure", lambda roots: {"dllm_core.data.batch": "0" * 64})
    assert run(cache, "why", put(cache, "a").key) == 0
    assert "source file dllm_core.data.batch: " in capsys.readouterr().out


def test_why_of_the_only_entry_lists_what_its_key_is_made_of(
    cache: StepCache, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = put(cache, "a")
    assert run(cache, "why", entry.key) == 0
    assert "fields.train.lr = 0.1" in capsys.readouterr().out


def test_why_reports_damage(cache: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    entry = put(cache, "a")
    (entry.path / "data").write_bytes(b"y" * 1000)
    assert run(cache, "why", entry.key) == 0
    assert "damaged: data has other contents" in capsys.readouterr().out


def test_rm_removes(cache: StepCache) -> None:
    entry = put(cache, "a")
    assert run(cache, "rm", entry.key[:10]) == 0
    assert not entry.path.exists()


def test_rm_leaves_what_is_being_built(cache: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    entry = put(cache, "a")
    with hold(cache.lock_path("toy", entry.key), "x", print):
        assert run(cache, "rm", entry.key) == 0
    assert entry.path.exists()
    assert "in use" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("why", "zz"), ("rm", "zz"), ("gc", "--keep", "lots")], ids=" ".join)
def test_wrong_arguments_get_two_lines(
    cache: StepCache, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(cache, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_ambiguous_key_lists_the_candidates(cache: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [put(cache, str(i)).key for i in range(20)]
    shared = next(k[0] for k in keys if sum(o[0] == k[0] for o in keys) > 1)
    assert run(cache, "rm", shared) == 2
    assert len(list((cache.runs_dir / "cache" / "toy").iterdir())) == 20


def test_gc_removes_the_least_recently_used_until_it_fits(cache: StepCache) -> None:
    entries = {name: put(cache, name, size=100_000) for name in "abc"}
    for ago, name in enumerate("bac"):
        use_at(entries[name], 1000 * ago)
    assert run(cache, "gc", "--keep", "220KB") == 0
    assert {n for n, e in entries.items() if e.path.exists()} == {"a", "b"}


def test_gc_keeps_what_was_used_lately(cache: StepCache) -> None:
    entries = {name: put(cache, name) for name in "ab"}
    use_at(entries["a"], 8 * 86400)
    assert run(cache, "gc", "--keep", "0", "--older-than", "7d") == 0
    assert {n for n, e in entries.items() if e.path.exists()} == {"b"}


def test_gc_clears_leftovers_but_not_fresh_checkpoints(cache: StepCache) -> None:
    stale, fresh, half = (
        cache.work_dir("toy", "0123456789abcdef"),
        cache.work_dir("toy", "1123456789abcdef"),
        cache.runs_dir / "cache" / "toy" / ".tmp-2123456789abcdef-00000000",
    )
    for directory in (stale, fresh, half):
        directory.mkdir(parents=True)
        (directory / "checkpoint").write_bytes(b"x")
    os.utime(stale, (time.time() - 2 * 86400,) * 2)
    assert run(cache, "gc", "--keep", "20GB") == 0
    assert [d.exists() for d in (stale, fresh, half)] == [False, True, False]


@pytest.mark.parametrize(("text", "size"), [("20GB", 20e9), ("1.5 tb", 1.5e12), ("300", 300), ("2M", 2e6), ("0", 0)])
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600)])
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 years"])
def test_bad_ages(text: str) -> None:
    with pytest.raises(DllmError, match="no duration"):
        parse_age(text)
