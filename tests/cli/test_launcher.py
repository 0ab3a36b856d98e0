"""The command line of the grid: what reaches Metaflow, and with which status it ends (bad input: test_bad_input.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import launcher

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "flows" / "compare_grid.py"


class Never:
    """A flow that must not be reached."""

    def __init__(self) -> None:
        raise AssertionError(f"Metaflow was started with {sys.argv}")


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Return a function that runs the launcher in this process, up to the start of Metaflow."""
    monkeypatch.setenv("DLLM_RUNS", str(tmp_path / "runs"))

    def go(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(FLOW), *arguments])
        return launcher.main(Never)

    return go


def test_missing_value_is_a_usage_error(launch: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("run", "--preset") == 2  # type: ignore[operator]
    assert "--preset" in capsys.readouterr().err


def test_dry_run_starts_nothing_and_writes_nothing(
    launch: object, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert launch("run", "--preset", "test", "--dry-run") == 0  # type: ignore[operator]
    assert "random_mask" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_settings_reach_metaflow_resolved(launch: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from params import GridSpec

    seen: list[str] = []

    def flow() -> None:
        seen.extend(sys.argv)
        raise SystemExit(0)

    arguments = ["--preset", "test", "--set", "train.lr=2e-4", "--no-cache", "--max-workers", "2", "--tag", "x"]
    monkeypatch.setattr(sys, "argv", [str(FLOW), "run", *arguments])
    assert launcher.main(flow) == 0
    spec = GridSpec.model_validate_json(seen[seen.index("--settings") + 1])
    assert spec.train.lr == 2e-4
    assert {"--no-cache", "--run-id-file"} <= set(seen)
    assert seen[seen.index("--max-workers") + 1] == "2"
    assert "--set train.lr=2e-4" in seen[seen.index("--command-line") + 1]


def test_an_interrupt_before_the_start_is_no_traceback(
    launch: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def impatient(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steps.plan.validate", impatient)
    assert launch("run", "--preset", "test") == launcher.INTERRUPTED  # type: ignore[operator]
    assert capsys.readouterr().err == "\nInterrupted; nothing was started.\n"


@pytest.mark.parametrize(("ended", "status"), [(0, 0), (1, 1), (2, 2), (None, 0), ("text", 1)])
def test_status_of_metaflow_is_kept(monkeypatch: pytest.MonkeyPatch, ended: object, status: int) -> None:
    def flow() -> None:
        raise SystemExit(ended)

    monkeypatch.setattr(sys, "argv", [str(FLOW), "resume"])
    assert launcher.main(flow) == status


def test_environment_is_a_default_not_an_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("METAFLOW_USER", "USER", "USERNAME", "METAFLOW_DATASTORE_SYSROOT_LOCAL", "DLLM_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("METAFLOW_RUN_MAX_WORKERS", "4")
    rest = launcher.prepare_environment(["run", "--runs-dir", str(tmp_path), "--preset", "test"])
    assert rest == ["run", "--preset", "test"]
    assert os.environ["METAFLOW_RUN_MAX_WORKERS"] == "4"
    assert os.environ["METAFLOW_RESUME_MAX_WORKERS"] == "1"
    assert os.environ["METAFLOW_USER"] == "dllm"
    assert os.environ["DLLM_RUNS"] == os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] == str(tmp_path)


@pytest.mark.parametrize("arguments", [["--runs-dir"], ["--runs-dir="], ["--runs-dir", "--cells", "ar"]], ids=" ".join)
def test_a_runs_directory_without_a_name_starts_nothing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--runs-dir "$RUNS"` with an unset variable ran the whole laptop grid in runs/."""
    monkeypatch.setenv("DLLM_RUNS", "kept")
    with pytest.raises(SystemExit) as ended:
        launcher.prepare_environment(["run", *arguments])
    assert ended.value.code == launcher.BAD_INPUT
    assert capsys.readouterr().err.splitlines()[0] == "error: --runs-dir names no directory."
    assert os.environ["DLLM_RUNS"] == "kept"


@pytest.mark.parametrize("form", [["--run-id-file", "FILE"], ["--run-id-file=FILE"]], ids=" ".join)
def test_the_users_file_for_the_run_id_is_left_to_the_user(
    form: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two the last wins: with `=` the user's file was never written."""
    file = tmp_path / "id"
    given = [word.replace("FILE", str(file)) for word in form]

    def flow() -> None:
        assert sys.argv[1:] == ["resume", *given]
        file.write_text("77")
        raise SystemExit(1)

    monkeypatch.setattr(sys, "argv", [str(FLOW), "resume", *given])
    assert launcher.main(flow) == 1
    assert "--origin-run-id 77" in capsys.readouterr().err


def test_a_sign_that_the_terminal_lacks_is_replaced(tmp_path: Path) -> None:
    """An ellipsis in the line of a cache hit ended the task where the encoding has none."""
    code = "from flows import launcher; launcher.prepare_environment([]); print('cache hit 3f2a…')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "cache hit 3f2a?\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["run", "--tag", "resume"], "run"),
        (["--datastore", "local", "resume"], "resume"),
        (["--quiet", "step", "train_and_evaluate"], "step"),
        (["show"], "show"),
        ([], ""),
        (["--help"], ""),
    ],
)
def test_sub_command_is_found(arguments: list[str], command: str) -> None:
    assert launcher.command_of(arguments)[0] == command


@pytest.mark.parametrize("arguments", [("show",), ("run", "--help")], ids=" ".join)
def test_metaflows_own_commands_pass_through(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("USER", "USERNAME", "LOGNAME", "METAFLOW_USER")}
    environment["DLLM_RUNS"] = str(tmp_path / "runs")
    done = subprocess.run(
        [sys.executable, str(FLOW), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert ("train_and_evaluate" if arguments == ("show",) else "--preset") in text
    assert "--settings" not in text, "what only the launcher sets is hidden"
