"""report.md: what to choose, how the run was made, the tables and what must be known of them, figures, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steps.report import notes, sweeps, tables
from steps.report.cells import gather
from steps.report.costs import amount
from steps.report.schema import Results


def render_markdown(results: Results, lines: Sequence[str], figure_names: Sequence[str]) -> str:
    """Return report.md; its first ten lines are the title and `lines`, which say what to choose."""
    budget = amount(results.budget["value"], str(results.budget["kind"]))
    head = [f"# Which conversion for {budget} a row? ({results.preset}, {notes.seeds(results)})", ""]
    head += [f"- {line}" for line in lines]
    sections = [
        ("Quality on held-out text", tables.quality_table(results), notes.quality(results)),
        ("Differences between rows", tables.contrast_table(results), notes.differences(results)),
        ("Generated text", tables.frontier_table(results), notes.text(results)),
        ("Overlap with the true continuation", tables.overlap_table(results), notes.OVERLAP),
        ("Health of latent rows", tables.health_table(results), notes.health(results)),
        ("Speed", tables.speed_table(results), notes.speed(results)),
        ("Speed ratios of rows that share one network", tables.speed_contrast_table(results), notes.ratios(results)),
        ("Quality by denoising steps", sweeps.steps_table(results), sweeps.steps_note(results)),
        ("Accuracy under parallelism", sweeps.parallelism_table(results), sweeps.parallelism_note(results)),
        ("Cost", tables.cost_table(results), notes.COST),
    ]
    body = [f"\n## {title}\n\n{table}\n\n{note}" for title, table, note in sections if table.count("\n") > 1]
    pictures = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figure_names]
    figures = ["\n## Figures\n", *pictures] if pictures else []
    samples = _samples(results)
    told = ["\n## Samples\n", _SAMPLES_NOTE, "", samples] if samples else []
    return "\n".join([*head, "\n## This run\n", *_facts(results), *body, *figures, *told]) + "\n"


def _facts(results: Results) -> list[str]:
    """Return how the numbers came about."""
    machine = results.hardware
    hardware = ", ".join(str(v) for v in (machine.get("gpu"), machine.get("cpu"), _cores(machine)) if v)
    done = sum(r.status == "ok" for r in results.cells)
    commit = f"{(results.git_commit or 'unknown')[:12]}{' + local changes' if results.git_dirty else ''}"
    return [
        f"Run {results.run_id}, {done} of {len(results.cells)} rows finished, preset {results.preset}, seeds "
        f"{', '.join(map(str, results.seeds))}; {results.created_at}, commit {commit}, "
        f"{hardware or 'hardware not recorded'}." + (f" Command: `{results.command}`" if results.command else ""),
        "",
        f"Base model: {results.model.get('source', 'unknown')}; text: {results.data.get('source', 'unknown')}. A line "
        "of a table is a cell (a conversion method, or an autoregressive reference), its numbers means over the "
        "seeds; every number of every seed is in results.csv and results.json.",
    ]


def _cores(machine: dict[str, Any]) -> str | None:
    count = machine.get("threads")
    return None if count is None else f"{count} thread{'' if count == 1 else 's'}"


_SAMPLES_NOTE = "One continuation a cell (first seed, lowest temperature): the end of the prompt ⟶ what the cell wrote."


def _samples(results: Results) -> str:
    parts = []
    for cell in gather(results):
        samples = [s for row in cell.measured if row.eval for s in row.eval.samples]
        for sample in samples[:1]:
            text = sample["continuation"].strip().replace("\n", " ")
            prompt = sample["prompt"].strip()[-160:].replace("\n", " ")
            parts.append(f"**{cell.name}** (T={sample.get('temperature')}): {prompt} ⟶ {text}")
    return "\n\n".join(parts)
