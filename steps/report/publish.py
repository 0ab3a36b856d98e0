"""Put a finished grid into the README: `python -m steps.report.publish runs/reports/latest/results.json`.

Copies results.json to benchmarks/results/, draws the picture from it, and rewrites the block between the two `results`
markers of the README, so that no number in it is typed by hand.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from steps.report import figures, tables
from steps.report.compare import headline_nats
from steps.report.schema import Results, Row

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- results -->", "<!-- /results -->"


def block(results: Results, stored: Path, picture: Path, root: Path = ROOT) -> str:
    """Return the README's results block."""
    header = ["row", "nats per token", "", "tok/s, 8 steps", "tok/s, 32 steps", "train s", "extraction s"]
    body = [[r.row_id, *_likelihood(r), _speed(r, "8"), _speed(r, "32"), *_cost(r)] for r in results.cells]
    floor = next(r.eval.unigram_nats_per_token for r in results.cells if r.eval and r.eval.unigram_nats_per_token)
    hardware = f"{results.hardware.get('cpu', 'unknown CPU')}, {results.hardware.get('cores', '?')} cores"
    return "\n".join(
        [
            START,
            f"![Quality and speed of every row]({os.path.relpath(picture, root)})",
            "",
            tables.markdown_table(header, body),
            "",
            f"Held-out text, lower is better; a unigram model has {floor:.2f}. *bound*: upper bound under random-order "
            "unmasking, *exact*: AR likelihood; the two are not to be compared. AR rows: tok/s with KV cache in the "
            f"8-step column's place. {'' if results.ranked else 'One seed: quality is not ranked. '}"
            f"`{results.command}`, commit {(results.git_commit or 'unknown')[:10]}, seeds {results.seeds}, {hardware}, "
            f"{results.created_at[:10]}; [all numbers]({os.path.relpath(stored, root)}).",
            END,
        ]
    )


def _likelihood(row: Row) -> tuple[str, str]:
    if row.eval is None:
        return tables.NOT_MEASURED, row.status
    if row.eval.nelbo_nats_per_token is not None:
        estimate, kind = row.eval.nelbo_nats_per_token, "bound"
    elif row.eval.exact_nats_per_token is not None:
        estimate, kind = row.eval.exact_nats_per_token, "exact"
    else:
        found = headline_nats(row)
        return (tables.NOT_MEASURED, "") if found is None else (f"{found[0]:.2f}", found[1])
    return f"{estimate.value:.2f} ± {estimate.se or 0:.2f}", kind


def _speed(row: Row, steps: str) -> str:
    measured = (row.bench.steps if row.bench else {}).get(steps)
    if measured is None and steps == "8" and row.bench:
        measured = row.bench.steps.get("ar")
    return tables.NOT_MEASURED if measured is None else f"{measured['tokens_per_s']['median']:.0f}"


def _cost(row: Row) -> tuple[str, str]:
    if row.cost is None:
        return tables.NOT_MEASURED, tables.NOT_MEASURED
    return f"{row.cost.train_s:.0f}", f"{row.cost.extraction_s:.0f}"


def rewrite(readme: str, new_block: str) -> str:
    """Return the README with the block between the markers replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), flags=re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"README.md needs {START} ... {END} exactly once")
    return pattern.sub(lambda _: new_block, readme)


def publish(source: Path, root: Path = ROOT) -> Path:
    """Store, draw and rewrite; return where the JSON is stored."""
    results = Results.model_validate_json(source.read_text())
    name = f"grid-{results.preset}-{results.created_at[:10]}"
    stored, picture = root / "benchmarks" / "results" / f"{name}.json", root / "docs" / "figures" / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(results.model_dump_json(indent=1) + "\n")
    figure = figures.quality_vs_speed(results)
    if figure is None:
        raise ValueError(f"{source} holds no row with both quality and speed")
    figure.savefig(picture, dpi=130)
    readme = root / "README.md"
    readme.write_text(rewrite(readme.read_text(), block(results, stored, picture, root)))
    return stored


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a finished grid")
    print(publish(parser.parse_args().results))
