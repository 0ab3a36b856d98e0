"""The import closure: what a step runs is found, what it does not run is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from steps.cache.closure import INFRASTRUCTURE, ROOT, closure, source_of

TREE = {
    "dllm_core/__init__.py": "",
    "dllm_core/a.py": "from dllm_core.b import f\nimport json\n",
    "dllm_core/b.py": "def f():\n    from dllm_core import late\n    return late\n",
    "dllm_core/late.py": "x = 1\n",
    "dllm_core/typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dllm_core import late\n"
    "else:\n    from dllm_core import otherwise\n",
    "dllm_core/otherwise.py": "",
    "dllm_core/room/__init__.py": "",
    "dllm_core/room/method.py": "from . import parts\nfrom ..b import f\n",
    "dllm_core/room/parts.py": "",
    "dllm_core/room/deep/__init__.py": "",
    "dllm_core/room/deep/leaf.py": "",
    "dllm_core/dynamic.py": "from importlib import import_module\nimport_module('dllm_core.late')\n",
    "dllm_core/circle.py": "import dllm_core.square\n",
    "dllm_core/square.py": "import dllm_core.circle\n",
    "steps/__init__.py": "",
    "steps/cache/__init__.py": "import dllm_core.late\n",
    "steps/work.py": "from steps.cache import StepCache\nfrom params import schema\nimport torch\n",
    "params/__init__.py": "",
    "params/schema.py": "",
    "flows/__init__.py": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("dllm_core.a", "dllm_core dllm_core.a dllm_core.b dllm_core.late"),
        ("dllm_core.typed", "dllm_core dllm_core.otherwise dllm_core.typed"),
        (
            "dllm_core.room.method",
            "dllm_core dllm_core.b dllm_core.late dllm_core.room dllm_core.room.method dllm_core.room.parts",
        ),
        (
            "dllm_core.room",
            "dllm_core dllm_core.b dllm_core.late dllm_core.room dllm_core.room.deep dllm_core.room.deep.leaf "
            "dllm_core.room.method dllm_core.room.parts",
        ),
        ("dllm_core.dynamic", "dllm_core dllm_core.dynamic dllm_core.late"),
        ("dllm_core.circle", "dllm_core dllm_core.circle dllm_core.square"),
        ("steps.work", "steps steps.work"),
    ],
)
def test_closure_follows_imports(tree: Path, root: str, expected: str) -> None:
    assert list(closure([root], tree)) == expected.split()


def test_edit_far_away_changes_the_hash_of_that_module_only(tree: Path) -> None:
    before = closure(["dllm_core.a"], tree)
    (tree / "dllm_core/late.py").write_text("x = 2\n")
    after = closure(["dllm_core.a"], tree)
    assert {m for m in after if after[m] != before[m]} == {"dllm_core.late"}


def test_edit_outside_the_closure_changes_nothing(tree: Path) -> None:
    before = closure(["dllm_core.a"], tree)
    (tree / "dllm_core/room/parts.py").write_text("y = 1\n")
    (tree / "steps/cache/__init__.py").write_text("y = 1\n")
    assert closure(["dllm_core.a"], tree) == before


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""A docstring."""\nx = 1  # a comment\n', True),
        ("x    =    1\n\n\n", True),
        ("x = 1.0\n", False),
        ("x = 1\ny = 2\n", False),
        ("x = '1'\n", False),
    ],
)
def test_only_what_runs_counts(tree: Path, text: str, same: bool) -> None:
    before = closure(["dllm_core.late"], tree)
    (tree / "dllm_core/late.py").write_text(text)
    assert (closure(["dllm_core.late"], tree) == before) is same


def test_unknown_root_is_an_error(tree: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"dllm_core\.nothing"):
        closure(["dllm_core.nothing"], tree)


def test_every_excluded_module_exists() -> None:
    assert all(source_of(m, ROOT) for m in INFRASTRUCTURE)


def test_real_room_reaches_its_code_but_not_its_neighbours() -> None:
    found = closure(["dllm_core.methods.random_mask"])
    assert "dllm_core.methods.random_mask.method" in found
    assert "dllm_core.methods.protocol" in found
    assert not any(m.startswith(("dllm_core.methods.trajectory", "steps.cache")) for m in found)


def test_room_outside_the_tree_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy room may live on the extended `__path__` of its package (tests do that)."""
    import dllm_core.methods

    room = tmp_path / "toy_room_elsewhere"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "method.py").write_text("x = 1\n")
    monkeypatch.setattr(dllm_core.methods, "__path__", [*dllm_core.methods.__path__, str(tmp_path)])
    assert "dllm_core.methods.toy_room_elsewhere.method" in closure(["dllm_core.methods.toy_room_elsewhere"])
