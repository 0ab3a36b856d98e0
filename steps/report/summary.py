"""What the numbers say, in sentences: the first thing a reader sees, and what must not be concluded."""

from __future__ import annotations

from steps.report.compare import MIN_SEEDS_TO_RANK, by_cell, headline_nats, ranking
from steps.report.schema import Results

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
    lines += _speed_lines(results)
    return lines


def _floor_lines(results: Results) -> list[str]:
    floor = results.data.get("unigram_nats_per_token")
    if floor is None:
        return []
    parts = []
    for row in results.cells:
        figure = headline_nats(row)
        if figure is not None and row.trained:
            parts.append(f"{row.row_id} {floor - figure[0]:+.2f}")
    if not parts:
        return []
    return [
        f"Nats per token below the unigram floor ({floor:.2f}): {', '.join(parts)}. Negative is worse than unigram."
    ]


def _quality_lines(results: Results) -> list[str]:
    """Say what can be ranked; with few seeds, only which rows differ on this one training run."""
    lines = []
    if results.ranked:
        for kind, name in KIND_NAMES.items():
            groups = ranking(by_cell(results), kind)
            if sum(map(len, groups)) > 1:
                lines.append(
                    f"Quality by {name}, best first ('=' not separated): {' > '.join(' = '.join(g) for g in groups)}."
                )
        return lines
    lines.append(
        f"Quality is not ranked: {len(set(results.seeds))} seed; a ranking takes {MIN_SEEDS_TO_RANK} (--seeds 0,1,2)."
    )
    inside = [c for c in results.comparisons if not c.resolved]
    outside = [c for c in results.comparisons if c.resolved]
    if outside:
        lines.append(
            "Beyond the evaluation error (2 se, same held-out text and masks; another training seed may differ): "
            + "; ".join(_difference(c.rows, c.difference, c.se, c.metric) for c in outside)
            + "."
        )
    if inside:
        lines.append(
            "Inside the evaluation error: "
            + "; ".join(_difference(c.rows, c.difference, c.se, c.metric) for c in inside)
            + "."
        )
    return lines


def _difference(rows: tuple[str, str], difference: float, se: float, metric: str) -> str:
    return f"{rows[0]} - {rows[1]} {difference:+.3f} ± {se:.3f} ({KIND_NAMES.get(metric, metric)})"


def _speed_lines(results: Results) -> list[str]:
    by_verdict: dict[str, list[str]] = {}
    for tie in results.ties:
        text = (
            f"{tie.rows[0]} / {tie.rows[1]} at {tie.steps} steps {tie.ratio:.3f} [{tie.ci95[0]:.3f}, {tie.ci95[1]:.3f}]"
        )
        by_verdict.setdefault(tie.verdict, []).append(text)
    lines = []
    if results.ties and set(by_verdict) == {"tie"}:
        lines.append("Decoding speed: rows that share one network tie at equal steps (paired ratios within ±3 %).")
    for verdict in ("faster", "slower", "not resolved"):
        if verdict in by_verdict:
            lines.append(f"Decoding speed, {verdict}: {'; '.join(by_verdict[verdict])}.")
    return lines
