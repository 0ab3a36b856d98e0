"""What the suite and its parts agree on: a part measures rows, and every row is on disk as soon as it is measured.

A part is a module of this folder with `run(context)`. It asks `context.row` for each of its measurements, in the order
of their worth: rows that an earlier run kept are not measured again, rows that no longer fit the time are recorded as
not measured, and one that fails leaves the others alone. It runs in a process of its own, which may be killed.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import _report, ceilings

OUT_OF_TIME = f"{_report.NOT_MEASURED}: out of time"
OUT_OF_MEMORY = f"{_report.NOT_MEASURED}: out of memory"
ATTEMPTS = 2
"""How often a row may take its process down (a hang, a kill) before it is left out."""

Measured = dict[str, Any]


class Part(Protocol):
    """A module of this folder."""

    def run(self, context: Context) -> dict[str, Any]:
        """Measure what fits and return what is to be recorded of the part as a whole: definitions, notes, samples."""


@dataclass(frozen=True)
class Context:
    """What a part is given.

    Attributes:
        name: of the part.
        device: where it runs; a CPU in a smoke run only.
        smoke: tiny shapes and one round: the code is exercised, the numbers mean nothing.
        seed: of everything drawn.
        profile: also take a profile of what misses its target.
        rows: what was measured so far.
        work: a directory for checkpoints and other large files; it outlives the process, so that a restart finds it.
        deadline: on the clock of `time.monotonic`; no row is begun that would end later.
    """

    name: str
    device: torch.device
    smoke: bool
    seed: int
    profile: bool
    rows: Rows
    work: Path
    deadline: float

    @property
    def remaining_s(self) -> float:
        """Seconds that are left of the part's time."""
        return self.deadline - time.monotonic()

    def row(
        self,
        name: str,
        measure: Callable[[], Measured],
        *,
        settings: Mapping[str, Any] | None = None,
        needs_s: float = 0.0,
    ) -> Measured | None:
        """Return a row's numbers: those on disk where the same row was measured, else those that `measure` returns.

        Args:
            name: unique within the part; readable, since tables show it.
            measure: returns a dict that JSON can hold, with finite numbers. Memory that it took is given back.
            settings: what the row depends on; a row with others is measured anew.
            needs_s: what it is expected to take; it is not begun where less is left.

        Returns:
            The numbers, or None where they could not be measured; the record says why.
        """
        kept = self.rows.kept(name, settings or {})
        if kept is not None:
            _tell(f"{self.name}: {name}: kept from {kept['date']}, not measured again")
            found: Measured = kept["found"]
            return found
        if self.remaining_s <= needs_s:
            self.rows.miss(name, settings or {}, OUT_OF_TIME)
            _tell(f"{self.name}: {name}: {OUT_OF_TIME}")
            return None
        if self.rows.attempts(name, settings or {}) >= ATTEMPTS:
            why = f"{_report.NOT_MEASURED}: it ended its process {ATTEMPTS} times"
            self.rows.miss(name, settings or {}, why)
            return None
        self.rows.begin(name, settings or {})
        started = time.monotonic()
        try:
            measured = measure()
            require_finite(measured)
        except torch.OutOfMemoryError:
            self.rows.miss(name, settings or {}, OUT_OF_MEMORY)
            _tell(f"{self.name}: {name}: {OUT_OF_MEMORY}")
            return None
        except Exception as error:  # a row that fails must not take the others with it; the record names the cause
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            why = f"{_report.NOT_MEASURED}: {type(error).__name__}: {first}"[:400]
            # a record is committed: no path of this machine
            self.rows.miss(name, settings or {}, why.replace(str(self.work), "work").replace(str(_report.ROOT), "."))
            return None
        finally:
            release(self.device)
        self.rows.keep(name, settings or {}, measured, time.monotonic() - started)
        _tell(f"{self.name}: {name}: measured in {time.monotonic() - started:.1f} s")
        return measured

    def ceilings(self, dtype: str) -> Measured | None:
        """Return what the device can do at best with `bf16` or `fp32`, a row of its own; see `benchmarks.ceilings`."""
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        return self.row(
            f"ceilings, {dtype}",
            lambda: ceilings.measure(self.device, kind, quick=self.smoke),
            settings={"dtype": dtype},
        )


def _tell(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def release(device: torch.device) -> None:
    """Give cached memory back to the device."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of nested dicts and lists with its place, truth values left out."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from numbers(entry, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from numbers(entry, f"{place}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, float(value)


def require_finite(measured: Measured) -> None:
    """Raise for nan and infinity: a record that holds them says nothing.

    Raises:
        ValueError: naming the first.
    """
    for place, number in numbers(measured):
        if not math.isfinite(number):
            raise ValueError(f"{place} is {number}")


def source_digest() -> str:
    """Return a hash of the library and the benchmarks: what a kept row was measured with, committed or not."""
    digest = hashlib.sha256()
    for folder in ("dllm_core", "benchmarks"):
        for path in sorted((_report.ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_report.ROOT).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Rows:
    """The record of a part on disk, written anew, whole, at every change.

    Args:
        path: of the JSON.
        head: commit, hardware, versions and so on; see `_report.header`.
        identity: what a row on disk must have in common with this run to be kept.
    """

    path: Path
    head: dict[str, Any]
    identity: dict[str, Any]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        old = read(self.path)
        if old and old.get("identity") == self.identity:
            self.found = old["rows"]
        elif old:
            self.path.replace(self.path.with_suffix(".previous.json"))
            _tell(f"{self.path.name} was measured with other code, hardware or settings: set aside")

    def _same(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        row = self.found.get(name)
        return row if row is not None and row["settings"] == _as_stored(settings) else None

    def kept(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a row that was measured with these settings."""
        row = self._same(name, settings)
        return row if row is not None and "found" in row else None

    def attempts(self, name: str, settings: Mapping[str, Any]) -> int:
        """Return how often this row was begun and did not come back."""
        row = self._same(name, settings)
        return int(row.get("attempts", 0)) if row is not None else 0

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        """Note that a row is being measured."""
        row = {"attempts": self.attempts(name, settings) + 1}
        self._put(name, settings, {"not_measured": f"{_report.NOT_MEASURED}: stopped while it ran", **row})

    def miss(self, name: str, settings: Mapping[str, Any], why: str) -> None:
        """Note why a row has no numbers; a later run tries again."""
        self._put(name, settings, {"not_measured": why})

    def keep(self, name: str, settings: Mapping[str, Any], found: Measured, seconds: float) -> None:
        """Store a row's numbers."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        commit = {name: self.head.get(name) for name in ("commit", "dirty")}
        self._put(name, settings, {"date": now, **commit, "wall_s": seconds, "found": found})

    def _put(self, name: str, settings: Mapping[str, Any], row: dict[str, Any]) -> None:
        self.found[name] = {"settings": _as_stored(settings), **row}
        self.write()

    def write(self) -> None:
        """Write the record."""
        record = {**self.head, "identity": self.identity, **self.whole, "rows": self.found}
        _report.write(record, self.path)


def _as_stored(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(settings, default=str))


def read(path: Path) -> dict[str, Any]:
    """Return a record on disk, empty where there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found.get("rows"), dict) else {}
