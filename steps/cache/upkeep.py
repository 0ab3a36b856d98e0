"""Looking into the cache and clearing it: what `python -m steps.cache` does."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_core.errors import DllmError
from steps.cache.key import flatten
from steps.cache.store import MANIFEST, USED, StepCache, age, damage_of, read_manifest
from steps.locks import hold_if_free

DIFFERENCES_SHOWN = 30
RESUMABLE_S = 86400.0
"""Checkpoints of an interrupted build are worth keeping for a day, whatever space is asked for."""
_SIZES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_AGES = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Stored:
    """An entry as it lies on disk.

    Attributes:
        home: its directory.
        manifest: its manifest; None when unreadable.
        size: bytes.
        used: unix time of the last hit, or of its making.
    """

    home: Path
    manifest: dict[str, Any] | None
    size: int
    used: float

    @property
    def name(self) -> str:
        """`kind/label`, for people."""
        if not (self.home / MANIFEST).exists():
            return f"{self.home.parent.name} (shared by entries)"
        return f"{self.home.parent.name}/{self.manifest['label'] if self.manifest else '? (manifest unreadable)'}"


def entries(cache: StepCache) -> list[Stored]:
    """Return all entries, the most recently used first."""
    found = []
    for home in (cache.runs_dir / "cache").glob("[!.]*/[!.]*"):
        if not home.is_dir():
            continue
        try:
            manifest = read_manifest(home)
        except (OSError, ValueError):
            manifest = None
        mark = home / USED
        used = mark.stat().st_mtime if mark.exists() else max(p.stat().st_mtime for p in [home, *home.rglob("*")])
        found.append(Stored(home, manifest, _size(home), used))
    return sorted(found, key=lambda e: -e.used)


def _size(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def find(cache: StepCache, prefix: str) -> Stored:
    """Return the one entry whose key starts with `prefix`.

    Raises:
        DllmError: none or several.
    """
    matching = [e for e in entries(cache) if e.home.name.startswith(prefix.removesuffix("…"))]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise DllmError(f"No cache entry begins with '{prefix}'.", "List them with: python -m steps.cache ls")
    keys = ", ".join(f"{e.home.name} ({e.name})" for e in matching[:8])
    raise DllmError(f"'{prefix}' is the beginning of {len(matching)} keys.", f"Give more digits of one of: {keys}")


def listing(cache: StepCache) -> Iterator[str]:
    """Yield a line for each entry and one with the sum."""
    total = 0
    for entry in entries(cache):
        total += entry.size
        manifest = entry.manifest or {"run_id": "?", "seconds": 0.0}
        yield (
            f"{entry.home.name}  {show_size(entry.size):>9}  used {age(entry.used):<15} "
            f"took {manifest['seconds']:8.1f} s  run {manifest['run_id']}  {entry.name}"
        )
    yield f"{show_size(total)} in {cache.runs_dir / 'cache'}"


def show_size(size: float) -> str:
    """Return bytes as `12.3 MB`."""
    for name in ("TB", "GB", "MB", "KB"):
        if size >= _SIZES[name]:
            return f"{size / _SIZES[name]:.1f} {name}"
    return f"{size:.0f} B"


# -- why ------------------------------------------------------------------------------------------------------------


def _material(entry: Stored) -> dict[str, Any]:
    return flatten((entry.manifest or {}).get("material", {}))


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, theirs, ours) for every part of two keys that is not the same."""
    absent = "(absent)"
    names = sorted(ours.keys() | theirs.keys())
    pairs = [(n, theirs.get(n, absent), ours.get(n, absent)) for n in names]
    return [p for p in pairs if p[1] != p[2]]


def why(cache: StepCache, prefix: str) -> Iterator[str]:
    """Yield what sets an entry apart from the nearest other one of its kind, field by field."""
    entry = find(cache, prefix)
    yield f"{entry.home.name}  {entry.name}"
    damage = damage_of(entry.home, thorough=True)
    if damage:
        yield f"damaged: {damage}; the next run builds it again"
    if entry.manifest is None:
        return
    made = entry.manifest
    yield f"built by run {made['run_id']}, {age(made['created'])}, in {made['seconds']:.1f} s"
    ours = _material(entry)
    others = [e for e in entries(cache) if e.home.parent == entry.home.parent and e.home != entry.home and e.manifest]
    if not others:
        yield f"the only entry of kind {entry.home.parent.name}; its key is made of:"
        yield from (f"  {name} = {_short(value)}" for name, value in sorted(ours.items()))
        return
    # what the user means to compare with is the last attempt at the same thing
    nearest = min(others, key=lambda e: (e.name != entry.name, len(differences(ours, _material(e))), -e.used))
    changed = differences(ours, _material(nearest))
    yield f"nearest: {nearest.home.name}  {nearest.name}, {age(nearest.manifest['created'])}; it differs in:"
    for name, before, now in changed[:DIFFERENCES_SHOWN]:
        yield f"  {_explained(name)}: {_short(before)} there, {_short(now)} here"
    if len(changed) > DIFFERENCES_SHOWN:
        yield f"  and {len(changed) - DIFFERENCES_SHOWN} more"


def _explained(name: str) -> str:
    section, _, rest = name.partition(".")
    words = {"sources": "source file", "libraries": "version of", "inputs": "content of input", "fields": "setting"}
    return f"{words[section]} {rest}" if section in words else name


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{32,}", text) else (text if len(text) <= 80 else text[:79] + "…")


# -- clearing -------------------------------------------------------------------------------------------------------


def remove(cache: StepCache, entry: Stored) -> bool:
    """Delete an entry, unless a running build holds its key; return whether it is gone."""
    kind, key = entry.home.parent.name, entry.home.name
    with hold_if_free(cache.lock_path(kind, key)) as free:
        if not free:
            return False
        doomed = entry.home.with_name(f".tmp-{key}-removed")
        shutil.rmtree(doomed, ignore_errors=True)
        entry.home.rename(doomed)  # at once, so that nobody hits half an entry
        shutil.rmtree(doomed, ignore_errors=True)
        return True


def parse_size(text: str) -> float:
    """Return bytes of `20GB`, `500 MB`, `0`.

    Raises:
        DllmError: not a size.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?B?)\s*", text.upper())
    unit = (found[2] if found[2].endswith("B") or not found[2] else f"{found[2]}B") if found else None
    try:
        return float(found[1]) * _SIZES[unit]  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise DllmError(f"'{text}' is no size.", "Allowed: a number with KB, MB, GB or TB, e.g. 20GB.") from None


def parse_age(text: str) -> float:
    """Return seconds of `30m`, `12h`, `7d`, `2w`.

    Raises:
        DllmError: not a duration.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([mhdw])\s*", text.lower())
    if found is None:
        raise DllmError(f"'{text}' is no duration.", "Allowed: a number with m, h, d or w, e.g. 7d.")
    return float(found[1]) * _AGES[found[2]]


def collect_garbage(cache: StepCache, keep: float, older_than: float, log: Callable[[str], None]) -> int:
    """Delete leftovers of dead builds, then the least recently used entries until `keep` bytes remain.

    Args:
        cache: the store.
        keep: bytes to keep, work directories included.
        older_than: seconds; nothing used since is deleted, even when more than `keep` remains.
        log: gets a line per deletion.

    Returns:
        Bytes freed.
    """
    now = time.time()
    freed = _clear_leftovers(cache, now - max(older_than, RESUMABLE_S), log)
    remaining = entries(cache)
    total = sum(e.size for e in remaining)
    for entry in reversed(remaining):
        if total <= keep:
            break
        if now - entry.used < older_than or not remove(cache, entry):
            continue
        total -= entry.size
        freed += entry.size
        log(f"removed {entry.home.name}  {show_size(entry.size):>9}  {entry.name}, used {age(entry.used)}")
    return freed


def _clear_leftovers(cache: StepCache, before: float, log: Callable[[str], None]) -> int:
    freed = 0
    for stale in [*(cache.runs_dir / "cache").glob("*/.tmp-*"), *(cache.runs_dir / "work").glob("*/*")]:
        key = stale.name.split("-")[1] if stale.name.startswith(".tmp-") else stale.name
        with hold_if_free(cache.lock_path(stale.parent.name, key)) as free:
            if not free or (stale.parent.parent.name == "work" and stale.stat().st_mtime > before):
                continue
            size = _size(stale)
            shutil.rmtree(stale, ignore_errors=True)
        freed += size
        log(f"removed {show_size(size):>9} left by an unfinished {stale.parent.name}")
    return freed
