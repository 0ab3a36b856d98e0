"""What the numbers say, in sentences: the first thing a reader sees, and what must not be concluded."""

from __future__ import annotations

from typing import Any

from steps.report.compare import MIN_SEEDS_TO_RANK, by_cell, has_no_bound, headline_nats, ranking
from steps.report.curves import still_rising
from steps.report.schema import Results, Row

DEGENERATE = 0.5
"""Part of the entropy of held-out text below which, and part of repeated 4-grams above which, text says nothing."""
RISING = 0.005
KNOWS_TEXT = 2.0
"""Times the judge's perplexity of held-out text that shuffling it has to give before the judge's word counts."""
KIND_NAMES = {"nelbo": "NELBO", "block_nelbo": "block NELBO", "exact": "exact likelihood"}


def headline(results: Results) -> list[str]:
    """Return the report's opening lines."""
    done = [r for r in results.cells if r.status == "ok"]
    lines = [
        f"{len(done)} of {len(results.cells)} rows finished; preset {results.preset}, "
        f"seed{'s' if len(results.seeds) > 1 else ''} {', '.join(map(str, results.seeds))}."
    ]
    lines += [f"FAILED {r.row_id}: {r.error}" for r in results.cells if r.status == "failed"]
    lines += _document_lines(results)
    lines += _floor_lines(results)
    lines += _latent_lines(results)
    lines += _quality_lines(results)
    lines += _text_lines(results)
    lines += _speed_lines(results)
    return lines


def _document_lines(results: Results) -> list[str]:
    counts = {row.eval.num_documents for row in results.cells if row.eval}
    if counts != {1}:
        return []
    return ["All held-out sequences are of one document: no standard errors, no differences between rows."]


def _floor_lines(results: Results) -> list[str]:
    parts, floors = [], []
    for row in results.cells:
        figure = headline_nats(row)
        if figure is not None and row.trained and row.eval and row.eval.unigram_nats_per_token:
            floors.append(row.eval.unigram_nats_per_token)
            parts.append(f"{row.row_id} {floors[-1] - figure[0]:+.2f}")
    if not parts:
        return []
    floor = f"{floors[0]:.2f}" if len(set(floors)) == 1 else "of the same tokens"
    return [f"Nats per token below the unigram floor ({floor}): {', '.join(parts)}. Negative is worse than unigram."]


def _quality_lines(results: Results) -> list[str]:
    """Say what can be ranked; with few seeds, only which rows differ on this one training run."""
    lines = []
    if results.ranked:
        for kind, name in KIND_NAMES.items():
            groups = ranking(by_cell(results), kind)
            if sum(map(len, groups)) > 1:
                order = " > ".join(" = ".join(g) for g in groups)
                lines.append(f"Quality by {name}, best first ('=' not separated): {order}.")
        return lines
    seeds = len(set(results.seeds))
    lines.append(
        f"Quality is not ranked: {seeds} seed{'s' if seeds > 1 else ''}; a ranking takes {MIN_SEEDS_TO_RANK} "
        "(--seeds 0,1,2)."
    )
    if results.comparisons:
        outside = [c for c in results.comparisons if c.resolved]
        named = "; ".join(f"{c.rows[0]} - {c.rows[1]} {c.difference:+.3f} ± {c.se:.3f} {c.metric}" for c in outside[:4])
        more = f" and {len(outside) - 4} more" if len(outside) > 4 else ""
        inside, total = len(results.comparisons) - len(outside), len(results.comparisons)
        beyond = f"; beyond it: {named}{more}." if outside else "."
        lines.append(f"{inside} of {total} differences between rows are inside the evaluation error (2 se){beyond}")
    return lines


def _latent_lines(results: Results) -> list[str]:
    """Say what rows without a bound are compared by, and how well they reconstruct."""
    rows = [row for row in results.cells if has_no_bound(row)]
    if not rows:
        return []
    lines = [
        f"No likelihood bound exists for {', '.join(r.row_id for r in rows)}: compare generated text, overlap with the "
        "true continuation and reconstruction."
    ]
    health = [f"{row.row_id} {text}" for row in rows if (text := _reconstruction(row))]
    if health:
        lines.append(f"Held-out tokens reconstructed from latents: {'; '.join(health)}.")
    return lines


def _reconstruction(row: Row) -> str:
    figures = row.eval.diagnostics if row.eval else {}
    parts = []
    for key, name in (("reconstruction_accuracy", ""), ("reconstruction_accuracy_noisy", " from noised latents")):
        if isinstance(figures.get(key), int | float):
            parts.append(f"{100 * figures[key]:.1f} %{name}")
    for name, points in (row.train.health if row.train else {}).items():
        rise = still_rising(points) if "reconstruction" in name and name.endswith("_accuracy") else 0.0
        if rise >= RISING:
            parts.append(f"still rising when training ended (+{100 * rise:.1f} points over its last fifth)")
            break
    return ", ".join(parts)


def _text_lines(results: Results) -> list[str]:
    """Name rows whose generated text is degenerate at every temperature, and rows that ignore their prompts."""
    reference = results.data.get("reference_text") or {}
    poor = []
    for row in results.cells:
        found = [_degenerate(point, reference) for point in (row.eval.frontier if row.eval else [])]
        if found and all(found):
            poor.append(f"{row.row_id} {found[-1]}")
    lines = []
    if poor:
        lines.append(
            f"Generated text is degenerate at every temperature: {', '.join(poor)}{_usual(reference)}. Its judge "
            "perplexity means nothing."
        )
    return lines + _overlap_lines(results)


def _degenerate(point: dict[str, Any], reference: dict[str, Any]) -> str:
    """Return what is wrong with the text of one temperature, "" if nothing is known to be."""
    entropy, usual = point.get("unigram_entropy_nats"), reference.get("unigram_entropy_nats")
    if entropy is not None and usual and entropy < DEGENERATE * usual:
        return f"(entropy {entropy:.1f})"
    if (repeated := point.get("repetition_4") or 0.0) > DEGENERATE:
        return f"({100 * repeated:.0f} % repeated 4-grams)"
    ppl, shuffled = point.get("judge_ppl"), reference.get("shuffled_judge_ppl")
    # a judge to whom held-out text and its shuffled tokens are much the same cannot tell
    tells = shuffled and shuffled > KNOWS_TEXT * (reference.get("judge_ppl") or shuffled)
    return f"(judge ppl {ppl:,.0f})" if ppl is not None and tells and ppl > shuffled else ""


def _usual(reference: dict[str, Any]) -> str:
    """Return what held-out text has instead."""
    entropy, shuffled = reference.get("unigram_entropy_nats"), reference.get("shuffled_judge_ppl")
    told = [f"entropy {entropy:.1f} nats"] if entropy else []
    told += [f"judge ppl {shuffled:,.0f} with its tokens shuffled"] if shuffled else []
    return f" (held-out text: {', '.join(told)})" if told else ""


def _overlap_lines(results: Results) -> list[str]:
    """Say, at the lowest temperature, whose text is nearer to its own reference than to those of other prompts."""
    shown, hidden, temperatures = [], [], set()
    for row in results.cells:
        points = [p for p in (row.eval.frontier if row.eval else []) if p.get("overlap_1_gain")]
        if not points:
            continue
        point = min(points, key=lambda p: p["temperature"])
        temperatures.add(f"{point['temperature']:g}")
        gain, se = point["overlap_1_gain"]["value"], point["overlap_1_gain"]["se"]
        text = f"{row.row_id} {100 * gain:+.1f}" + ("" if se is None else f" ± {100 * se:.1f}")
        (shown if se is not None and gain > 2 * se else hidden).append(text)
    if not shown and not hidden:
        return []
    told = [f"beyond 2 se: {', '.join(shown)}"] if shown else []
    told += [f"not beyond 2 se: {', '.join(hidden)}"] if hidden else []
    return [
        "Overlap of continuations with the true one, less that with other prompts' "
        f"(points of unigram F1, T={', '.join(sorted(temperatures))}), {'; '.join(told)}."
    ]


def _speed_lines(results: Results) -> list[str]:
    lines = []
    for steps in dict.fromkeys(t.steps for t in results.ties):
        ties = [t for t in results.ties if t.steps == steps]
        counts = [
            f"{n} {v}" for v in ("tie", "faster", "slower", "not resolved") if (n := sum(t.verdict == v for t in ties))
        ]
        span = f"{min(t.ratio for t in ties):.3f} to {max(t.ratio for t in ties):.3f}"
        lines.append(
            f"Decoding speed at {steps} steps, {len(ties)} pairs of rows that share one network: {', '.join(counts)} "
            f"(ratios {span})."
        )
    return lines
