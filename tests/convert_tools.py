"""Running the conversion of the GPU suite, in this process or in one where much is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from steps.report.schema import Results
from tests.tiny import TEXT, write_source

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("metaflow", "mlflow", "matplotlib", "pandas", "rich", "datasets", "pyarrow", "scipy", "platformdirs", "peft")
"""What a borrowed machine lacks, or may lack."""
HIDE = """
import runpy, sys

class Hiding:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)

ABSENT = set(sys.argv[1].split(","))
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SETTINGS = {
    "data.prompt_tokens": 8,
    "data.response_tokens": 16,
    "data.train_sequences": 24,
    "budget.value": 640,
    "train.batch_size": 4,
    "bench.rounds": 2,
    "bench.steps": "[4]",
    "runtime.threads": 1,
}


def write_inputs(directory: Path) -> list[str]:
    """Write a tiny model and a text, and return the arguments that name them."""
    text = directory / "text"
    text.mkdir(parents=True)
    for number in range(30):
        (text / f"page{number:02}.txt").write_text(f"Page {number} of a book.\n" + TEXT[: 60 + number])
    model = write_source(directory / "source", layers=4, max_length=64)
    return ["--model", str(model), "--data", str(text)]


def small(place: Path, inputs: list[str], *more: str) -> list[str]:
    """Return the arguments of a conversion that takes seconds.

    Args:
        place: gets results and step cache.
        inputs: of `write_inputs`.
        more: arguments.
    """
    sets = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    places = ["--out", str(place / "out"), "--runs-dir", str(place / "runs"), "--carried", str(place / "carried")]
    return ["--preset", "test", "--device", "cpu", *inputs, *places, *sets, *more]


def where_much_is_missing(
    arguments: list[str], absent: tuple[str, ...] = ABSENT, **environment: str
) -> subprocess.Popen[str]:
    """Start the command in a process that cannot import what is absent."""
    import os

    command = [sys.executable, "-c", HIDE, ",".join(absent), str(ROOT / "benchmarks" / "gpu" / "convert.py")]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(place: Path) -> Results:
    """Return what a conversion wrote, checked against the report's schema."""
    return Results.model_validate_json((place / "out" / "convert-results.json").read_text(encoding="utf-8"))
