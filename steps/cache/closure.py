"""Which source files a step runs, found by reading imports, and a hash of what they say.

The closure is computed, not declared: a forgotten declaration would serve stale results. It follows every `import`
statement (also inside functions) and every `import_module("literal")` from the root modules through the packages of
this repository. Not followed: imports under `if TYPE_CHECKING` (they do not run) and `INFRASTRUCTURE`.

The hash of a module is that of its syntax tree without docstrings: comments, docstrings and layout cost no re-run.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = frozenset({"dllm_core", "steps", "params"})

INFRASTRUCTURE = frozenset(
    {
        "dllm_core.errors",  # how a failure is worded changes no result
        "params",  # settings: their values stand in the fields of a key, so a new setting costs no re-run
        "steps.cache",
        "steps.context",
        "steps.failures",
        "steps.grid",
        "steps.locks",
        "steps.machine",  # what it decides (device, dtype) stands in the fields as well
        "steps.plan",
        "steps.progress",
        "steps.tracking",
        "steps.watchdog",
    }
)
"""Modules (with all below them) that carry, store, announce or record results and cannot change them."""


def is_infrastructure(module: str) -> bool:
    """Return whether `module` is, or lies below, an excluded module."""
    parts = module.split(".")
    return any(".".join(parts[:n]) in INFRASTRUCTURE for n in range(1, len(parts) + 1))


def source_of(module: str, root: Path = ROOT) -> Path | None:
    """Return the file of a module of this repository, or None when there is no such module. Imports nothing."""
    package, _, name = module.rpartition(".")
    if module.split(".")[0] not in PACKAGES:
        return None
    places = [root.joinpath(*package.split("."))] if package else [root]
    if root == ROOT and package in sys.modules:  # a room may live outside the tree, on the `__path__` of its package
        places += [Path(p) for p in getattr(sys.modules[package], "__path__", ())]
    elif package and not places[0].is_dir():
        parent = source_of(package, root)
        places = [parent.parent] if parent is not None and parent.name == "__init__.py" else []
    for place in places:
        for candidate in (place / name / "__init__.py", place / f"{name}.py"):
            if candidate.is_file():
                return candidate
    return None


@lru_cache(maxsize=4096)
def _read(path: Path, size: int, mtime_ns: int, module: str) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports = tuple(sorted(set(_imports(tree, module, is_package=path.name == "__init__.py"))))
    return hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest(), imports


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return tree


def _running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, leaving out the bodies of `if TYPE_CHECKING:`."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[str]:
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in _running_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (
                f"{origin}.{alias.name}" for alias in node.names
            )  # may be submodules; if not, they resolve to nothing
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "import_module" and isinstance(node.args[0].value, str):
                yield node.args[0].value


def _submodules(path: Path, module: str) -> Iterator[str]:
    for below in sorted(path.parent.rglob("*.py")):
        parts = below.relative_to(path.parent).with_suffix("").parts
        yield ".".join([module, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def closure(roots: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Return {module: sha256} of everything that `roots` import inside this repository.

    Args:
        roots: module names; a package stands for all its modules.
        root: directory that holds the packages.

    Raises:
        ModuleNotFoundError: a root does not exist.
    """
    found: dict[str, str] = {}
    pending: list[str] = []
    for name in roots:
        path = source_of(name, root)
        if path is None:
            raise ModuleNotFoundError(f"cache root '{name}' is no module of {sorted(PACKAGES)}")
        pending += [name, *(_submodules(path, name) if path.name == "__init__.py" else ())]
    while pending:
        name = pending.pop()
        if name in found or is_infrastructure(name):
            continue
        path = source_of(name, root)
        if path is None:
            continue
        stat = path.stat()
        found[name], imports = _read(path, stat.st_size, stat.st_mtime_ns, name)
        parts = name.split(".")
        pending += (".".join(parts[:n]) for n in range(1, len(parts)))  # importing a.b.c runs a and a.b
        pending += (i for i in imports if i.split(".")[0] in PACKAGES)
    return dict(sorted(found.items()))
