"""docs/LEADERBOARD.md: a section a grid between two markers, written from its JSON; the rest of the page is kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

START, END = "<!-- grids -->", "<!-- /grids -->"


def section(stem: str, *, headline: Sequence[str], table: str, legend: str, provenance: str) -> str:
    """Return the section of a grid: where it comes from, what it says, its rows, and how to read them."""
    said = "\n".join(f"- {line}" for line in headline)
    links = f"[JSON](../benchmarks/results/{stem}.json), [picture](figures/{stem}.png)"
    return f"### {stem}\n\n{provenance}. {links}\n\n{said}\n\n{table}\n\n{legend}\n"


def enter(page: str, stem: str, new: str) -> str:
    """Return the page with the section of a grid replaced, or put on top if it is new.

    Raises:
        ValueError: the markers are not there exactly once, in this order.
    """
    found = re.fullmatch(f"(.*{re.escape(START)}\n)(.*)({re.escape(END)}.*)", page, flags=re.DOTALL)
    if found is None or page.count(START) != 1 or page.count(END) != 1:
        raise ValueError(f"docs/LEADERBOARD.md needs {START} ... {END} exactly once")
    before, grids, after = found.groups()
    sections = [part.strip() + "\n" for part in re.split(r"(?m)^(?=### )", grids) if part.strip()]
    title = f"### {stem}\n"
    known = [part.startswith(title) for part in sections]
    sections = [new if same else part for part, same in zip(sections, known, strict=True)]
    if not any(known):
        sections.insert(0, new)
    return f"{before}\n" + "\n".join(sections) + f"\n{after}"
