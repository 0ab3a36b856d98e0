"""A card for every trained cell: what it is, what it cost, and how good it is at which speed."""

from __future__ import annotations

from pathlib import Path

from steps.report import notes, sweeps, tables
from steps.report.cells import Cell, gather
from steps.report.costs import amount
from steps.report.schema import Results

PICTURES = ("quality_by_steps", "parallelism")
"""Figures of the report that show what a card says beside the other rows."""


def model_card(results: Results, cell: Cell, pictures: tuple[str, ...] = ()) -> str:
    """Return the card of a cell as Markdown.

    Args:
        results: of the whole grid: y_max of the curves and the text of reference come from all of it.
        cell: which cell.
        pictures: names of the figures that were drawn.
    """
    own = results.model_copy(update={"cells": list(cell.rows)})
    sections = [
        ("Quality on held-out text", tables.quality_table(own), notes.quality(own)),
        ("Generated text", tables.frontier_table(own), notes.text(own)),
        ("Overlap with the true continuation", tables.overlap_table(own), notes.OVERLAP),
        ("Quality by denoising steps", sweeps.steps_table(own), sweeps.steps_note(own)),
        ("Accuracy under parallelism", sweeps.parallelism_table(own), sweeps.parallelism_note(own)),
        ("Health", tables.health_table(own), notes.health(own)),
        ("Speed", tables.speed_table(own), notes.speed(own)),
        ("Cost", tables.cost_table(own), notes.COST),
    ]
    seeds = ", ".join(str(r.seed) for r in cell.done)
    budget = amount(results.budget["value"], str(results.budget["kind"]))
    head = [
        f"# {cell.name}",
        "",
        f"{results.model.get('source', 'unknown')}, converted by `{cell.rows[0].method}` with {budget} a row on "
        f"{results.data.get('source', 'unknown')}; seed{'s' * (len(cell.done) > 1)} {seeds}. Run {results.run_id}, "
        f"{results.created_at[:10]}, commit {(results.git_commit or 'unknown')[:12]}. The whole grid: "
        "[report](../report.md), [all numbers](../results.json).",
    ]
    # a table of a header and a rule alone holds nothing
    body = [f"\n## {title}\n\n{table}\n\n{note}" for title, table, note in sections if table.count("\n") > 1]
    body += [f"\n## Not measured\n\n{reason}" for reason in [" ".join(sweeps.absences(own, "curves"))] if reason]
    shown = [f"![{name.replace('_', ' ')}](../{name}.png)" for name in pictures if name in PICTURES]
    figures = ["\n## Beside the other rows\n", *shown] if shown else []
    return "\n".join([*head, *body, *figures]) + "\n"


def write_cards(results: Results, directory: Path, pictures: tuple[str, ...]) -> list[Path]:
    """Write the card of every trained cell that was finished; return their paths."""
    written = []
    for cell in gather(results):
        if cell.trained and cell.done:
            directory.mkdir(exist_ok=True)
            written.append(directory / f"{cell.name}.md")
            written[-1].write_text(model_card(results, cell, pictures), encoding="utf-8")
    return written
