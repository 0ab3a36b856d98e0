"""Links resolve, commands parse with the real parsers, published files are explained, estimates are today's."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import params
from benchmarks import memory_estimates, quality_sweep
from dllm_core.cli import arguments as library_arguments
from flows import launcher

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
REPRODUCE = (DOCS / "reproduce.md").read_text()


# -- links ------------------------------------------------------------------------------------------------------------


def _without_code(text: str) -> str:
    return re.sub(r"(?s)```.*?```|`[^`\n]*`", "", text)


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"(?m)^#{1,6} (.+)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _broken(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    assert _broken(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One title\n[a](page.md#one-title) [b](page.md#other) [c](gone.md) [d](https://x.y) `[e](f.md)`\n"
    )
    assert _broken(page) == ["page.md#other", "gone.md"]


# -- commands ---------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in place of what a program would do once its arguments are read."""


def _commands(text: str) -> Iterator[str]:
    for block in re.findall(r"(?s)```bash\n(.*?)```", text):
        for line in block.splitlines():
            command = line.partition(" #")[0].strip()
            if command.startswith(("python ", "make ")):
                yield command


def _parse_grid(words: list[str]) -> None:
    """Read the arguments of `run` as the launcher does, and the settings that they name; nothing is run."""
    assert words[0] == "run", words
    options, unknown = launcher._parser().parse_known_args(words[1:])
    assert not unknown, f"no such argument: {unknown}"
    params.load(options.preset, cells=options.cells, overrides=options.set, seeds=options.seeds)


def _parse_program(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a program as its user would and stop it once its own parser is content."""
    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def _parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
        assert {w for w in words if "=" not in w} <= targets, command
    elif words[0] == "flows/compare_grid.py":
        _parse_grid(words[1:])
    elif words[:2] == ["-m", "dllm_core"]:
        library_arguments.parse(words[2:])
    elif words[0] == "-m":
        _parse_program(words[1], words[2:], monkeypatch)
    else:
        assert (ROOT / words[0]).is_file(), command
        _parse_program(words[0].removesuffix(".py").replace("/", "."), words[1:], monkeypatch)


COMMANDS = sorted({command for page in PAGES for command in _commands(page.read_text())})


def test_there_are_commands_to_check() -> None:
    assert sum(command in COMMANDS for command in _commands(REPRODUCE)) >= 9


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _parse(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python flows/compare_grid.py run --sets train.lr=1",
        "python flows/compare_grid.py run --preset laptops",
        "python flows/compare_grid.py run --set budget.kinds=tokens",
        "python benchmarks/decode.py --round 14 --stepz 8",
        "python -m steps.report.publish",
        "python -m dllm_core sample --stepz 4",
        "python benchmarks/gone.py",
        "make grids",
    ],
)
def test_a_wrong_command_is_seen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        _parse(command, monkeypatch)


# -- what the pages must cover ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_every_published_file_is_explained(path: Path) -> None:
    assert f"](../benchmarks/results/{path.name})" in REPRODUCE


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("quality_sweep-cpu.json")))
def test_the_page_on_quality_is_that_of_its_file(path: Path) -> None:
    found = quality_sweep.page(json.loads(path.read_text()), path)
    assert quality_sweep.PAGE.read_text() == found, "python benchmarks/quality_sweep.py --page"


@pytest.mark.parametrize("path", sorted((DOCS / "figures").glob("*.png")), ids=lambda p: p.stem)
def test_every_figure_is_explained(path: Path) -> None:
    stored = path.with_suffix(".json").name
    made_by_publish = (ROOT / "benchmarks" / "results" / stored).is_file() and stored in REPRODUCE
    assert made_by_publish or f"docs/figures/{path.name}" in REPRODUCE


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_benchmark_with_a_command_line_is_named(path: Path) -> None:
    if "__main__" in path.read_text():
        assert f"benchmarks/{path.name}" in REPRODUCE or path.name in REPRODUCE


def test_memory_estimates_are_those_of_the_code() -> None:
    page = (DOCS / "hardware.md").read_text()
    found, table = memory_estimates.text(), memory_estimates.table()
    assert memory_estimates.rewritten(page, found) == page, "python benchmarks/memory_estimates.py --write"
    assert found in page
    for cell in params.cell_names():
        assert f"| `{cell}` |" in table


def test_unmeasured_gpus_say_so() -> None:
    rows = [line for line in (DOCS / "hardware.md").read_text().splitlines() if re.match(r"\| one .*GPU", line)]
    measured = [p for p in (ROOT / "benchmarks" / "results").glob("*.json") if "cuda" in p.name]
    assert rows
    assert measured or all(row.count("not measured") == 2 for row in rows)


def _grids() -> list[dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").glob("*.json")]
    return [results for results in found if "cells" in results]


def test_what_is_said_to_be_unmeasured_is() -> None:
    measured = {row["name"] for results in _grids() for row in results["cells"] if row["status"] == "ok"}
    table = (DOCS / "hardware.md").read_text().split("## Measured")[1].split("## Estimated")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert measured == {cell for line in lines if "not measured" not in line for cell in re.findall(r"`(\w+)`", line)}
    unpublished = re.search(r"Presets (.*?)\s+have not been run", REPRODUCE, flags=re.DOTALL)
    assert unpublished is not None
    assert not set(re.findall(r"`(\w+)`", unpublished[1])) & {results["preset"] for results in _grids()}


LANDSCAPE = (
    "LLaDA",
    "Dream",
    "Open-dCoder",
    "d3LLM",
    "Fast-dLLM",
    "DiffusionGemma",
    "Gemini Diffusion",
    "Seed Diffusion",
    "Mercury",
    "BD3-LM",
)


def test_the_landscape_names_every_peer_with_a_source() -> None:
    text = (DOCS / "landscape.md").read_text()
    rows = [
        line for line in text.splitlines() if line.rstrip(" |").endswith(("primary", "second-hand", "not re-checked"))
    ]
    for peer in LANDSCAPE:
        named = [row for row in rows if peer in row]
        assert named, peer
        assert all("](https://" in row or "card" in row for row in named), peer
