"""Numbers quoted on pages: compare each with the JSON it comes from, or write it anew.

    python benchmarks/quoted_numbers.py                       # check README.md and docs/, print what differs
    python benchmarks/quoted_numbers.py --write               # put the JSON's values in place of what differs

A number is quoted as `5.15<!-- cells[random_mask].eval.nelbo_nats_per_token.value -->`: the comment, which no reader
sees, stands directly behind it and says where it lies in the file of `benchmarks/results/` that the page linked to last
before it (or begins with a file's name and a colon). It is compared to the digits that are printed.

Keys are joined by dots. `[x]` picks from a map the key x (for keys with dots) and from a list the entry number x; or,
from a list of objects, those whose `row_id` or `name` is x, or whose `key` is v with `[key=v]` (a list of words is
matched joined by `/`). Several entries that match, one a seed, give their mean. ` * 100` and ` / 1e12` change the unit.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
QUOTE = re.compile(rf"(?P<number>{NUMBER})<!--\s*(?:(?P<file>[\w.-]+\.json):\s*)?(?P<place>\S.*?)\s*-->")
LINK = re.compile(r"\]\([^)]*benchmarks/results/(?P<file>[\w.-]+\.json)\)")
SCALE = re.compile(r"^(?P<path>.*?)(?:\s+(?P<sign>[*/])\s+(?P<factor>[\d.e+]+))?$")
STEP = re.compile(r"\[([^\]]+)\]|([^.\[\]]+)")


class QuoteError(Exception):
    """A place that does not lead to a number; the message says why."""


@dataclass(frozen=True)
class Quote:
    """A number on a page and where it comes from.

    Attributes:
        number: as printed.
        start: where it stands in the text.
        line: of the page, from 1.
        file: name of the JSON in `benchmarks/results`.
        place: the path in it, and the change of unit.
    """

    number: str
    start: int
    line: int
    file: str
    place: str


def quotes(text: str) -> Iterator[Quote]:
    """Yield the quotes of a page, from top to bottom.

    Raises:
        QuoteError: a number is quoted before any results file was linked to.
    """
    links = [(link.start(), link["file"]) for link in LINK.finditer(text)]
    for found in QUOTE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        file = found["file"] or next((name for at, name in reversed(links) if at < found.start()), None)
        if file is None:
            raise QuoteError(f"line {line}: {found['number']} is quoted before any file of results is linked to")
        yield Quote(number=found["number"], start=found.start(), line=line, file=file, place=found["place"])


@lru_cache(maxsize=32)
def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuoteError(f"there is no {path.name}") from None


def _matches(entry: Any, wanted: str) -> bool:
    if not isinstance(entry, dict):
        return False
    key, is_pair, value = wanted.partition("=")
    for name in (key,) if is_pair else ("row_id", "name"):
        found = entry.get(name)
        text = "/".join(map(str, found)) if isinstance(found, list) else str(found)
        if text == (value if is_pair else wanted):
            return True
    return False


def _step(node: Any, step: str) -> list[Any]:
    if isinstance(node, dict) and step in node:
        return [node[step]]
    if isinstance(node, list):
        if step.isdigit() and int(step) < len(node):
            return [node[int(step)]]
        return [entry for entry in node if all(_matches(entry, wanted) for wanted in step.split(","))]
    return []


def value(document: Any, place: str) -> float:
    """Return the number at a place of a document.

    Raises:
        QuoteError: the place does not exist or holds no number.
    """
    split = SCALE.match(place)
    assert split is not None
    nodes = [document]
    for bracketed, plain in STEP.findall(split["path"]):
        step = bracketed or plain
        nodes = [inner for node in nodes for inner in _step(node, step)]
        if not nodes:
            raise QuoteError(f"nothing at '{step}' of {split['path']}")
    if any(isinstance(node, bool) or not isinstance(node, int | float) for node in nodes):
        raise QuoteError(f"{split['path']} holds no number")
    factor = float(split["factor"] or 1.0)
    return fmean(nodes) / factor if split["sign"] == "/" else fmean(nodes) * factor


def printed(number: float, like: str) -> str:
    """Return a number with the decimals, separators, sign and leading zero of another one."""
    decimals = len(like.partition(".")[2])
    text = (
        f"{number:{'+' if like.startswith('+') else ''}{',' if ',' in like or abs(number) >= 1000 else ''}.{decimals}f}"
    )
    if "," not in like and re.search(r"\d{4}", like):
        text = text.replace(",", "")
    return re.sub(r"^([-+]?)0\.", r"\1.", text) if like.lstrip("+-").startswith(".") else text


def current(quote: Quote, results: Path = RESULTS) -> str:
    """Return what a quote should print.

    Raises:
        QuoteError: no such file, or nothing at that place.
    """
    return printed(value(_read(results / quote.file), quote.place), quote.number)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that may quote numbers."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rewritten(text: str, results: Path = RESULTS) -> str:
    """Return a page with the values that its quotes should have."""
    for quote in reversed(list(quotes(text))):
        text = text[: quote.start] + current(quote, results) + text[quote.start + len(quote.number) :]
    return text


def stale(text: str, results: Path = RESULTS) -> list[str]:
    """Return a line for every quote of a page that its JSON does not bear out."""
    lines = []
    try:
        for quote in quotes(text):
            where = f"line {quote.line}: {quote.number}, {quote.file}: {quote.place}"
            try:
                now = current(quote, results)
            except QuoteError as error:
                lines.append(f"{where}: {error}")
                continue
            if now != quote.number:
                lines.append(f"{where} is {now}")
    except QuoteError as error:
        lines.append(str(error))
    return lines


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the pages instead of complaining")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check or rewrite every page; return the exit status."""
    args = arguments(argv)
    problems = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if args.write:
            try:
                page.write_text(rewritten(text), encoding="utf-8")
            except QuoteError as error:
                print(f"{page.relative_to(ROOT)}: {error}; left as it was", file=sys.stderr)
            text = page.read_text(encoding="utf-8")
        for line in stale(text):
            print(f"{page.relative_to(ROOT)}: {line}", file=sys.stderr)
            problems += 1
    print(f"{problems} numbers differ from their source" if problems else "every quoted number equals its source")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
