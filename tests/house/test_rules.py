"""The house rules that no other tool checks: budgets, names, where printing and unpickling are allowed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dllm_core", "params", "steps", "flows", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
CORE_MAY_IMPORT = {"torch", "transformers", "safetensors", "pydantic", "dllm_core"}

SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def _trees(paths: list[Path] = SOURCES) -> Iterator[tuple[Path, ast.Module]]:
    for path in paths:
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def _module_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield imports that run when the module is imported: not those inside functions or TYPE_CHECKING blocks."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            pending += node.body + node.orelse
        elif isinstance(node, (ast.Try, ast.ClassDef)):
            pending += node.body


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 20


def test_files_are_within_budget() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := p.read_text().count("\n")) > MAX_FILE_LINES}
    assert not long, f"split by concept (limit {MAX_FILE_LINES} lines): {long}"


def test_functions_are_within_budget() -> None:
    long = [
        f"{path}:{node.lineno} {node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_nothing_is_called_utils() -> None:
    bad = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(r"util|helper|misc|common", p.stem)]
    assert not bad, f"name the concept instead: {bad}"


def test_library_does_not_print_or_parse_arguments() -> None:
    found = []
    for path, tree in _trees([p for p in SOURCES if p.relative_to(ROOT).parts[:2] != ("dllm_core", "cli")]):
        if path.parts[0] != "dllm_core":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{path}:{node.lineno} print")
            if isinstance(node, ast.Import) and any(a.name == "argparse" for a in node.names):
                found.append(f"{path}:{node.lineno} argparse")
    assert not found, found


def test_library_imports_only_its_four_dependencies_at_module_level() -> None:
    allowed = CORE_MAY_IMPORT | set(sys.stdlib_module_names)
    # loaded by the dispatch, and only where a kernel runs: `tests/kernels/test_dispatch.py`
    kernels = {p.relative_to(ROOT) for p in (ROOT / "dllm_core" / "kernels").glob("*/triton.py")}
    assert kernels
    found = [
        f"{path}:{line} {name}"
        for path, tree in _trees()
        if path.parts[0] in ("dllm_core", "benchmarks")
        for line, name in _module_level_imports(tree)
        if name not in allowed | ({"benchmarks"} if path.parts[0] == "benchmarks" else set())
        and not (name == "triton" and path in kernels)
    ]
    assert not found, found


def test_steps_import_nothing_heavy_at_module_level() -> None:
    heavy = {"torch", "transformers", "mlflow", "pandas", "matplotlib", "datasets", "pyarrow", "numpy"}
    found = [
        f"{path}:{line} {name}"
        for path, tree in _trees()
        if path.parts[0] in ("steps", "params", "flows")
        for line, name in _module_level_imports(tree)
        if name in heavy
    ]
    assert not found, found


def test_nothing_is_unpickled() -> None:
    found = []
    for path, tree in _trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            if node.func.attr in ("load", "loads") and isinstance(owner, ast.Name) and owner.id in ("torch", "pickle"):
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                if not safe:
                    found.append(f"{path}:{node.lineno}")
    assert not found, found


@pytest.mark.parametrize("pattern", [r"/home/\w+", r"/Users/\w+", r"(?<![\w.])/(work|root|opt|mnt|tmp)/"])
def test_no_machine_path_is_committed(pattern: str) -> None:
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".lock"}
    skip = {".venv", "runs", ".git", "tests"}
    files = [
        p for p in ROOT.rglob("*") if p.suffix in suffixes and p.is_file() and p.relative_to(ROOT).parts[0] not in skip
    ]
    found = [str(p.relative_to(ROOT)) for p in files if re.search(pattern, p.read_text(errors="ignore"))]
    assert not found, found


def test_every_room_and_package_is_named_in_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {
        contract["name"]: set(contract.get("modules") or contract.get("source_modules", [])) for contract in contracts
    }
    rooms = {f"dllm_core.methods.{path.parent.name}" for path in (ROOT / "dllm_core/methods").glob("*/method.py")}
    assert named["rooms stand on what is beside them, not on each other"] == rooms
    parts = {
        f"dllm_core.{path.stem}"
        for path in (ROOT / "dllm_core").iterdir()
        if path.suffix in ("", ".py") and path.stem[0] not in "_."
    }
    assert named["nothing in the library knows its command line"] == parts - {"dllm_core.cli"}
