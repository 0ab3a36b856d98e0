"""Build once, keep, find again: the store behind every expensive step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_core.errors import ResourceError
from steps.cache.key import key_of, material
from steps.locks import hold

MANIFEST = "manifest.json"
PAYLOAD = "payload"
USED = "last_used"
ALWAYS_HASHED_BYTES = 1 << 20

Build = Callable[[Path, Path], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A finished result.

    Attributes:
        path: directory with the files that the build wrote. Read only.
        result: what the build returned, after a round trip through JSON.
        key: 16 hex digits.
        kind: step kind.
        label: what was built, e.g. the row.
        hit: it was there already.
        origin: id of the run that built it.
        seconds: what building it took.
        created: unix time.
    """

    path: Path
    result: dict[str, Any]
    key: str
    kind: str
    label: str
    hit: bool
    origin: str
    seconds: float
    created: float


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass
class StepCache:
    """The step cache below one runs directory.

    Attributes:
        runs_dir: holds `cache/`, `work/` and the locks.
        run_id: recorded as the origin of what this process builds.
        use_cache: False ignores (and replaces) what earlier runs built; what this very run built still counts.
        log: gets one line per hit, repair and wait.
    """

    runs_dir: Path
    run_id: str = "local"
    use_cache: bool = True
    log: Callable[[str], None] = field(default=_print)

    def get_or_build(
        self,
        kind: str,
        fields: Mapping[str, Any],
        *,
        inputs: Mapping[str, str],
        roots: Iterable[str],
        libraries: Iterable[str],
        build: Build,
        label: str,
    ) -> Entry:
        """Return the entry for these dependencies, building it when there is none.

        Args:
            kind: step kind; a directory name.
            fields: JSON-able settings that the step reads, and only those.
            inputs: {name: content hash} of what it reads.
            roots: modules whose import closure inside this repository is hashed; a package stands for all of it.
            libraries: distributions whose version changes the result.
            build: `build(payload_dir, work_dir) -> JSON-able dict`. Files of the result go to `payload_dir`, which is
                empty; `work_dir` (checkpoints) is kept when the build fails or the process is killed, and is given to
                the next attempt at the same key. What it raises is passed on and nothing is stored.
            label: what is built, for people.

        Raises:
            ResourceError: the runs directory cannot be written.
        """
        parts = material(kind, fields, inputs, roots, libraries)
        key = key_of(parts)
        entry = self._find(kind, key, label)
        if entry is not None:
            return entry
        try:
            lock = hold(self.lock_path(kind, key), f"{kind}/{label}", self.log)
            with lock:  # look again: another process may have built it between the look and the lock
                entry = self._find(kind, key, label, report_damage=True)
                return entry or self._build(parts, key, build, label)
        except (PermissionError, NotADirectoryError) as error:
            if not os.access(self.runs_dir, os.W_OK):
                raise ResourceError(f"Cannot write to '{self.runs_dir}' ({error.strerror}).", _WRITABLE) from error
            raise

    def entry_dir(self, kind: str, key: str) -> Path:
        """Return where an entry lies or would lie."""
        return self.runs_dir / "cache" / kind / key

    def work_dir(self, kind: str, key: str) -> Path:
        """Return the directory for checkpoints of a build; it outlives a kill."""
        return self.runs_dir / "work" / kind / key

    def lock_path(self, kind: str, key: str) -> Path:
        """Return the lock file of a key."""
        return self.runs_dir / "cache" / ".locks" / f"{kind}-{key}"

    # -- finding ----------------------------------------------------------------------------------------------------

    def _find(self, kind: str, key: str, label: str, *, report_damage: bool = False) -> Entry | None:
        home = self.entry_dir(kind, key)
        if not home.is_dir():
            return None
        damage = damage_of(home)
        if damage:
            if report_damage:
                self.log(f"cache entry {kind}/{label} {key[:6]}… is damaged ({damage}): building it again")
            return None
        manifest = read_manifest(home)
        if not self.use_cache and manifest["run_id"] != self.run_id:
            return None
        with contextlib.suppress(OSError):  # a store that can only be read still serves
            (home / USED).touch()
        entry = _entry(home, manifest, label=label, hit=True)
        self.log(f"cache hit {kind}/{label} {key[:6]}… (from run {entry.origin}, {age(entry.created)})")
        return entry

    # -- building ---------------------------------------------------------------------------------------------------

    def _build(self, parts: dict[str, Any], key: str, build: Build, label: str) -> Entry:
        kind = parts["kind"]
        home = self.entry_dir(kind, key)
        work = self._open_work(kind, key, parts, label)
        home.parent.mkdir(parents=True, exist_ok=True)
        for stale in home.parent.glob(f".tmp-{key}-*"):  # we hold the lock: whoever made it is dead
            shutil.rmtree(stale, ignore_errors=True)
        temporary = home.parent / f".tmp-{key}-{uuid.uuid4().hex[:8]}"
        (temporary / PAYLOAD).mkdir(parents=True)
        started = time.monotonic()
        try:
            result = json.loads(json.dumps(build(temporary / PAYLOAD, work)))
            manifest = {
                "key": key,
                "kind": kind,
                "label": label,
                "run_id": self.run_id,
                "created": time.time(),
                "seconds": time.monotonic() - started,
                "material": parts,
                "result": result,
                "files": _describe(temporary / PAYLOAD),
            }
            write_json(temporary / MANIFEST, manifest)
            _sync(temporary)
            _replace(temporary, home)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        return _entry(home, manifest, label=label, hit=False)

    def _open_work(self, kind: str, key: str, parts: dict[str, Any], label: str) -> Path:
        work = self.work_dir(kind, key)
        note = work / "key.json"
        if not self.use_cache and work.exists():
            try:
                ours = json.loads(note.read_text(encoding="utf-8"))["run_id"] == self.run_id
            except (OSError, ValueError, KeyError):
                ours = False
            if not ours:
                shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_json(note, {"run_id": self.run_id, "kind": kind, "key": key, "label": label, "material": parts})
        return work


_WRITABLE = "Make it writable, or choose another place with --runs-dir DIR (or the variable DLLM_RUNS)."


def age(created: float) -> str:
    """Return how long ago a unix time was, in words."""
    seconds = max(0.0, time.time() - created)
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def read_manifest(home: Path) -> dict[str, Any]:
    """Return the manifest of an entry directory."""
    manifest: dict[str, Any] = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def damage_of(home: Path, *, thorough: bool = False) -> str | None:
    """Say what is wrong with an entry, or None.

    Sizes are always compared. Contents are hashed when a file is small, or its modification time is not the one
    recorded, or with `thorough`: a hit must not cost a read of every checkpoint.
    """
    try:
        manifest = read_manifest(home)
        files = manifest["files"]
        missing = {"result", "run_id", "created", "material", "seconds"} - manifest.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest unreadable: {type(error).__name__}"
    if missing:
        return f"manifest lacks {sorted(missing)}"
    for name, wanted in files.items():
        path = home / PAYLOAD / name
        try:
            stat = path.stat()
        except OSError:
            return f"{name} is missing"
        if stat.st_size != wanted["bytes"]:
            return f"{name} has {stat.st_size} bytes instead of {wanted['bytes']}"
        doubtful = stat.st_size <= ALWAYS_HASHED_BYTES or stat.st_mtime_ns != wanted["mtime_ns"]
        if (doubtful or thorough) and file_hash(path) != wanted["sha256"]:
            return f"{name} has other contents than were written"
    return None


def file_hash(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, sort_keys=True)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def _entry(home: Path, manifest: dict[str, Any], *, label: str, hit: bool) -> Entry:
    return Entry(
        path=home / PAYLOAD,
        result=manifest["result"],
        key=manifest["key"],
        kind=manifest["kind"],
        label=label,
        hit=hit,
        origin=manifest["run_id"],
        seconds=manifest["seconds"],
        created=manifest["created"],
    )


def _describe(payload: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in payload.rglob("*") if p.is_file()):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        stat = path.stat()
        files[path.relative_to(payload).as_posix()] = {
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": file_hash(path),
        }
    return files


def _sync(directory: Path) -> None:
    """Flush directory entries, deepest first, so that a rename never outruns what it renames."""
    below = [p for p in directory.rglob("*") if p.is_dir()]
    for path in [*sorted(below, reverse=True), directory]:
        _sync_one(path)


def _sync_one(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, home: Path) -> None:
    if home.exists():  # damaged, or replaced on purpose
        trash = home.parent / f".tmp-{home.name}-{uuid.uuid4().hex[:8]}"
        os.replace(home, trash)
        os.replace(temporary, home)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        os.replace(temporary, home)
    _sync_one(home.parent)
