"""Progress lines, the bar, and what the launcher's screen makes of them."""

from __future__ import annotations

import io
import os

import pytest

from flows.screen import Screen
from steps.progress import Progress, bar, duration, number, parse


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, steps: int = 600, seconds_a_step: float = 0.125, start: int = 0) -> list[str]:
    clock = Clock()
    report = Progress("random_mask", stream=stream, clock=clock)
    for step in range(start, steps + 1):
        report(step, steps, loss=4.3123)
        clock.now += seconds_a_step
    return stream.getvalue().splitlines()


def test_one_line_every_ten_seconds_when_nobody_watches() -> None:
    lines = run(io.StringIO())
    assert lines[0] == "[random_mask] step 0/600 loss 4.31"
    assert [parse(line)[1] for line in lines] == [0, 80, 160, 240, 320, 400, 480, 560, 600]  # type: ignore[index]
    assert lines[1].endswith("eta 65s")
    assert lines[-1] == "[random_mask] step 600/600 loss 4.31"


def test_the_interval_of_lines_can_be_set() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Progress("row", every_s=25.0, stream=stream, clock=clock)
    for step in range(101):
        report(step, 100)
        clock.now += 1.0
    assert [parse(line)[1] for line in stream.getvalue().splitlines()] == [0, 25, 50, 75, 100]  # type: ignore[index]


def test_quick_work_says_little() -> None:
    assert len(run(io.StringIO(), steps=5)) == 1


def test_eta_after_a_resume_counts_only_this_process() -> None:
    """Steps that an earlier process did must not make this one look fast."""
    lines = run(io.StringIO(), start=500, seconds_a_step=1.0)
    assert lines[1].endswith("step 510/600 loss 4.31 eta 90s")


def test_bar_on_a_terminal_redraws_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("DLLM_PROGRESS", raising=False)
    stream = Terminal()
    run(stream)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.count("\r") > 100
    assert "############------------" in text
    assert "\x1b" not in text, "plain characters only, with or without NO_COLOR"


def test_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    run(stream)
    assert "\r" not in stream.getvalue()


def test_watched_task_writes_a_line_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLM_PROGRESS", "watched")
    assert len(run(io.StringIO())) == 76


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[ar] step 3/10 loss 4.3 eta 5s", ("ar", 3, 10, "step 3/10 loss 4.3 eta 5s")),
        ("2026-11-21 07:00:00.000 [1795/train_and_evaluate/5 (pid 1)] [ar] view 1/2", ("ar", 1, 2, "view 1/2")),
        ("2026-11-21 07:00:00.000 [1795/train_and_evaluate/5 (pid 1)] Task is starting.", None),
        ("cache hit train_cell/ar 3f2a91… (from run 1795, 2 days ago)", None),
        ("[ar] unknown total: step 3", None),
    ],
)
def test_progress_lines_are_told_from_others(line: str, expected: object) -> None:
    assert parse(line) == expected


def test_screen_shows_progress_below_the_log() -> None:
    terminal = Terminal()
    screen = Screen(terminal, columns=70)
    prefix = "2026 [17/train/5 (pid 1)] "
    for text in (prefix, "[ar] step 5/10 loss 4.3\n", prefix + "a message\n", prefix + "[ar] step 10/10 loss 4.2\n"):
        screen.write(text)
    screen.close()
    frames = terminal.getvalue().split("\r\x1b[K")
    assert frames[1] == "[ar] ############------------ step 5/10 loss 4.3"
    assert frames[2] == f"{prefix}a message\n{frames[1]}"
    assert frames[3] == f"{prefix}[ar] step 10/10 loss 4.2\n", "the last one stays in the log"


def test_bar_is_never_wider_than_the_terminal() -> None:
    assert len(bar("row", 5, 10, "x" * 200, 80)) < 80


def test_a_terminal_of_no_width_gets_a_whole_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh pseudo-terminal (script, docker -t) says that it has 0 columns."""
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("DLLM_PROGRESS", raising=False)
    terminal = Terminal()
    terminal.fileno = lambda: 1  # type: ignore[method-assign]
    Screen(terminal).write("[ar] step 5/10 loss 4.3\n")
    assert terminal.getvalue() == "\r\x1b[K[ar] ############------------ step 5/10 loss 4.3"
    stream = Terminal()
    Progress("ar", stream=stream)(5, 10, loss=4.3)
    assert stream.getvalue() == "\r[ar] ############------------ step 5/10 loss 4.3"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (99, "99s"), (100, "2m"), (3540, "59m"), (3600, "1h00m"), (7500, "2h05m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (4.312, "4.31"), (120, "120"), (1234.5, "1.23k"), (3_400_000, "3.4M"), (2e9, "2G"), (0, "0")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
