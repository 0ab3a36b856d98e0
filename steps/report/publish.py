"""Put a finished grid into the README and the leaderboard: `python -m steps.report.publish RESULTS.json`.

Copies results.json to benchmarks/results/, draws the picture from it, rewrites the block between the two `results`
markers of the README, and the grid's section of docs/LEADERBOARD.md, so that no number in them is typed by hand. Doing
it twice changes nothing. Reports of every 1.x schema can be published.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steps.report import figures, leaderboard, notes, summary, tables
from steps.report.cells import Cell, gather
from steps.report.compare import concluded
from steps.report.costs import amount
from steps.report.schema import Results

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- results -->", "<!-- /results -->"
HEADER = ("row", "nats/token", "", "overlap", "ppl @ H", "tok/s", "TFLOP", "train s", "new params")


def block(results: Results, stored: Path, picture: Path, root: Path = ROOT) -> str:
    """Return the README's results block."""
    answer = summary.headline(results)[0]
    return "\n".join(
        [
            START,
            f"![Quality and speed of every row]({os.path.relpath(picture, root)})",
            "",
            f"**{answer}** ({notes.seeds(results)}, {amount(results.budget['value'], str(results.budget['kind']))} a "
            "row)",
            "",
            tables.markdown_table(HEADER, lines(results)),
            "",
            f"{legend(results)} {provenance(results)}; [all numbers]({os.path.relpath(stored, root)}).",
            END,
        ]
    )


def lines(results: Results) -> list[list[str]]:
    """Return one line a cell: quality, text, speed and cost."""
    cells = gather(results)
    steps = _fewest_steps(cells)
    return [[c.label, *_likelihood(c), _overlap(c), _text(c), _speed(c, steps), *_cost(c)] for c in cells]


def legend(results: Results) -> str:
    """Say what the columns are."""
    cells = gather(results)
    floor = next((r.eval.unigram_nats_per_token for r in results.cells if r.eval), None)
    floor_text = f"; a unigram model has {floor:.2f}" if floor else ""
    boundless = [c.name for c in cells if c.latent]
    latent = f" {', '.join(boundless)}: latents, no bound." if boundless else ""
    count = len(set(results.seeds))
    seeds = f" Means over {count} seeds, sd: over seeds." if count > 1 else ""
    order = "" if results.ranked else f" {notes.seeds(results).capitalize()}: quality is not ranked."
    return (
        f"Held-out text, lower is better, ± one standard error{floor_text}. *bound*: upper bound under random-order "
        f"unmasking, *exact*: AR likelihood; the two are not to be compared.{latent} overlap: unigram F1 in % with "
        "the true continuation / with those of other prompts. ppl @ H: judge perplexity of generated text at its "
        f"unigram entropy in nats{_reference(results, cells)}. tok/s: batch 1, {_fewest_steps(cells) or '?'} steps "
        f"(AR rows: KV cache). TFLOP: training with teacher and extraction.{seeds}{order}"
    )


def provenance(results: Results) -> str:
    """Return command, commit, seeds, hardware and date."""
    hardware = f"{results.hardware.get('cpu', 'unknown CPU')}, {results.hardware.get('cores', '?')} cores"
    gpu = results.hardware.get("gpu")
    commit = f"{(results.git_commit or 'unknown')[:10]}{' + local changes' * bool(results.git_dirty)}"
    return (
        f"`{results.command}`, commit {commit}, "
        f"seeds {', '.join(map(str, results.seeds))}, {f'{gpu}, ' if gpu else ''}{hardware}, {results.created_at[:10]}"
    )


def _likelihood(cell: Cell) -> tuple[str, str]:
    found = cell.likelihood(cell.kind) if cell.kind else None
    if found is None:
        return tables.NOT_MEASURED, "" if cell.done else "failed"
    spread = "" if found.sd is None else f" (sd {found.sd:.2f})"
    error = "" if found.se is None else f" ± {found.se:.2f}"
    names = {"exact": "exact", "nelbo": "bound", "block_nelbo": "block bound"}
    return f"{found.mean:.2f}{error}{spread}", names[str(cell.kind)]


def _fewest_steps(cells: Sequence[Cell]) -> str | None:
    return min((s for c in cells for s in c.speeds if s != "ar"), key=int, default=None)


def _speed(cell: Cell, steps: str | None) -> str:
    speed = cell.speeds.get("ar") or cell.speeds.get(steps or "")
    return tables.NOT_MEASURED if speed is None else f"{speed.value:,.0f}"


def _lowest(cell: Cell) -> dict[str, Any]:
    """Return the frontier's point at the lowest temperature."""
    return cell.frontier[0] if cell.frontier else {}


def _overlap(cell: Cell) -> str:
    own, other = (_lowest(cell).get(f"overlap_1{kind}") for kind in ("", "_other"))
    return tables.NOT_MEASURED if own is None or other is None else f"{100 * own:.1f} / {100 * other:.1f}"


def _text(cell: Cell) -> str:
    return _perplexity(_lowest(cell)) or tables.NOT_MEASURED


def _perplexity(point: dict[str, Any]) -> str:
    ppl, entropy = point.get("judge_ppl"), point.get("unigram_entropy_nats")
    if ppl is None or entropy is None:
        return ""
    return f"{ppl:,.{0 if ppl >= 100 else 1}f} @ {entropy:.1f}"


def _reference(results: Results, cells: Sequence[Cell]) -> str:
    """Return how the text was written, and how held-out text itself fares."""
    told = _perplexity(results.data.get("reference_text") or {})
    points = [p for c in cells if (p := _lowest(c))]
    written = sorted({f"T={p['temperature']:g} in {p.get('steps', '?')} steps" for p in points})
    return (f", {', '.join(written)}" if written else "") + (f" (held-out text: {told})" if told else "")


def _cost(cell: Cell) -> tuple[str, str, str]:
    flops, seconds, new = (cell.cost(name) for name in ("flops", "train_s", "new_params"))
    none = tables.NOT_MEASURED
    if flops is None or seconds is None or new is None:
        return none, none, none
    return f"{flops.mean / 1e12:,.0f}", f"{seconds.mean:,.0f}", f"{new.mean:,.0f}"


def rewrite(readme: str, new_block: str) -> str:
    """Return the README with the block between the markers replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), flags=re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"README.md needs {START} ... {END} exactly once")
    return pattern.sub(lambda _: new_block, readme)


def default_name(results: Results) -> str:
    """Return what a grid is stored under: preset, number of seeds where there are several, date."""
    count = len(set(results.seeds))
    return f"grid-{results.preset}-{f'{count}seeds-' * (count > 1)}{results.created_at[:10]}"


def publish(source: Path, root: Path = ROOT, *, name: str | None = None, readme: bool = True) -> Path:
    """Store, draw and rewrite; return where the JSON is stored.

    Args:
        source: results.json of a finished grid, or one that was published before.
        root: of the repository.
        name: what to store it under; a file that was published before keeps its name.
        readme: show this grid in the README; False enters it into the leaderboard alone.

    Raises:
        ValueError: another run of the same preset and day is stored under that name; or nothing can be drawn.
    """
    results = concluded(Results.model_validate_json(source.read_text(encoding="utf-8")))
    directory = root / "benchmarks" / "results"
    if name is None and source.resolve().parent == directory.resolve():
        name = source.stem
    stored = directory / f"{name or default_name(results)}.json"
    if name is None and stored.is_file():
        there = Results.model_validate_json(stored.read_text(encoding="utf-8")).run_id
        if there != results.run_id:
            raise ValueError(f"{stored.name} holds run {there}, not {results.run_id}: give this one a --name")
    picture = root / "docs" / "figures" / f"{stored.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure = figures.quality_vs_speed(results)
    if figure is None:
        raise ValueError(f"{source} holds no row with both quality and speed")
    stored.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")
    figure.savefig(picture, dpi=130)
    if readme:
        page = root / "README.md"
        text = rewrite(page.read_text(encoding="utf-8"), block(results, stored, picture, root))
        page.write_text(text, encoding="utf-8")
    section = leaderboard.section(
        stored.stem,
        headline=summary.headline(results),
        table=tables.markdown_table(HEADER, lines(results)),
        legend=legend(results),
        provenance=provenance(results),
    )
    board = root / "docs" / "LEADERBOARD.md"
    board.write_text(leaderboard.enter(board.read_text(encoding="utf-8"), stored.stem, section), encoding="utf-8")
    return stored


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a finished grid")
    parser.add_argument("--name", help="store it under this name (default: grid-PRESET-DATE, with its number of seeds)")
    parser.add_argument("--only-leaderboard", action="store_true", help="leave the README as it is")
    arguments = parser.parse_args()
    print(publish(arguments.results, name=arguments.name, readme=not arguments.only_leaderboard))
