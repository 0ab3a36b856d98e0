"""Put a finished grid into the README: `python -m steps.report.publish runs/reports/latest/results.json`.

Copies results.json to benchmarks/results/, draws the picture from it, and rewrites the block between the two `results`
markers of the README, so that no number in it is typed by hand.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from steps.report import figures, tables
from steps.report.compare import has_no_bound, headline_nats
from steps.report.schema import Results, Row

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- results -->", "<!-- /results -->"


def block(results: Results, stored: Path, picture: Path, root: Path = ROOT) -> str:
    """Return the README's results block."""
    floor = next((r.eval.unigram_nats_per_token for r in results.cells if r.eval), None)
    floor_text = f"; a unigram model has {floor:.2f}" if floor else ""
    boundless = [r.row_id for r in results.cells if has_no_bound(r)]
    latent = f" {', '.join(boundless)}: latents, no bound." if boundless else ""
    steps = _fewest_steps(results)
    header = ["row", "nats/token", "", "overlap", "ppl @ H", "tok/s", "TFLOP", "train s", "new params"]
    body = [[r.row_id, *_likelihood(r), _overlap(r), _text(r), _speed(r, steps), *_cost(r)] for r in results.cells]
    hardware = f"{results.hardware.get('cpu', 'unknown CPU')}, {results.hardware.get('cores', '?')} cores"
    return "\n".join(
        [
            START,
            f"![Quality and speed of every row]({os.path.relpath(picture, root)})",
            "",
            tables.markdown_table(header, body),
            "",
            f"Held-out text, lower is better{floor_text}. *bound*: upper bound under random-order unmasking, *exact*: "
            f"AR likelihood; the two are not to be compared.{latent} overlap: unigram F1 in % with the true "
            "continuation / with those of other prompts. ppl @ H: judge perplexity of generated text at its unigram "
            f"entropy in nats{_reference(results)}. tok/s: batch 1, {steps or '?'} steps (AR rows: KV cache). TFLOP: "
            f"training with teacher and extraction. {_ranked(results)}"
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


def _fewest_steps(results: Results) -> str | None:
    found = {s for r in results.cells if r.bench for s in r.bench.steps if s != "ar"}
    return min(found, key=int, default=None)


def _speed(row: Row, steps: str | None) -> str:
    by_steps = row.bench.steps if row.bench else {}
    measured = by_steps.get("ar") or by_steps.get(steps or "")
    return tables.NOT_MEASURED if measured is None else f"{measured['tokens_per_s']['median']:.0f}"


def _lowest(row: Row) -> dict[str, Any]:
    """Return the frontier's point at the lowest temperature."""
    return min(row.eval.frontier if row.eval else [], key=lambda p: p["temperature"], default={})


def _overlap(row: Row) -> str:
    own, other = (_lowest(row).get(f"overlap_1{kind}") for kind in ("", "_other"))
    return tables.NOT_MEASURED if own is None or other is None else f"{100 * own:.1f} / {100 * other:.1f}"


def _text(row: Row) -> str:
    return _perplexity(_lowest(row)) or tables.NOT_MEASURED


def _perplexity(figures: dict[str, Any]) -> str:
    ppl, entropy = figures.get("judge_ppl"), figures.get("unigram_entropy_nats")
    if ppl is None or entropy is None:
        return ""
    return f"{ppl:,.{0 if ppl >= 100 else 1}f} @ {entropy:.1f}"


def _reference(results: Results) -> str:
    """Return how the text was written, and how held-out text itself fares."""
    told = _perplexity(results.data.get("reference_text") or {})
    points = [p for r in results.cells if (p := _lowest(r))]
    written = sorted({f"T={p['temperature']:g} in {p.get('steps', '?')} steps" for p in points})
    return (f", {', '.join(written)}" if written else "") + (f" (held-out text: {told})" if told else "")


def _ranked(results: Results) -> str:
    return "" if results.ranked else "One seed: quality is not ranked. "


def _cost(row: Row) -> tuple[str, str, str]:
    cost, none = row.cost, tables.NOT_MEASURED
    if cost is None:
        return none, none, none
    return f"{cost.flops / 1e12:,.0f}", f"{cost.train_s:,.0f}", f"{cost.new_params:,}"


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
    figure = figures.quality_vs_speed(results) or figures.text_quality_vs_speed(results)
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
