"""What the numbers say, in sentences: the first thing a reader sees, and what must not be concluded."""

from __future__ import annotations

from steps.report.compare import MIN_SEEDS_TO_RANK, by_cell, headline_nats, ranking
from steps.report.schema import Results

DEGENERATE = 0.5
KIND_NAMES = {"nelbo": "NELBO", "block_nelbo": "block NELBO", "exact": "exact likelihood"}


def headline(results: Results) -> list[str]:
    """Return the report's opening lines."""
    done = [r for r in results.cells if r.status == "ok"]
    lines = [
        f"{len(done)} of {len(results.cells)} rows finished; preset {results.preset}, "
        f"seed{'s' if len(results.seeds) > 1 else ''} {', '.join(map(str, results.seeds))}."
    ]
    lines += [f"FAILED {r.row_id}: {r.error}" for r in results.cells if r.status == "failed"]
    lines += _floor_lines(results)
    lines += _quality_lines(results)
    lines += _text_lines(results)
    lines += _speed_lines(results)
    return lines


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


def _text_lines(results: Results) -> list[str]:
    """Name rows whose generated text is degenerate: less than half the entropy of the held-out text."""
    reference = (results.data.get("reference_text") or {}).get("unigram_entropy_nats")
    if not reference:
        return []
    poor = []
    for row in results.cells:
        entropies = [p["unigram_entropy_nats"] for p in (row.eval.frontier if row.eval else [])]
        if entropies and max(entropies) < DEGENERATE * reference:
            poor.append(f"{row.row_id} {max(entropies):.1f}")
    if not poor:
        return []
    return [
        f"Generated text is degenerate (at every temperature less than half the {reference:.1f} nats of unigram "
        f"entropy of held-out text): {', '.join(poor)}. Their judge perplexities mean nothing."
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
