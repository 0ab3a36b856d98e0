"""Quality beside speed, as tables: every cell at several numbers of steps, and its accuracy under parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steps.report.cells import Cell, Spread, gather, merged, spread
from steps.report.schema import Estimate, ParallelismCurve, Results, Row
from steps.report.tables import NOT_MEASURED, estimate, figure, markdown_table, number, percent
from steps.report.texts import judge_tells, seeds_fault

RULES = {
    "fixed": "fixed number a pass (confidence)",
    "threshold": "threshold",
    "factor": "factor",
    "blocks": "entropy threshold",
}
TASKS = {"masked": "masked tokens", "infill": "stretch in the middle"}
CurveKey = tuple[str, str, int | None, float | None]
"""Rule, task, block size, progress at which the next block joins."""


def steps_of(cell: Cell) -> list[str]:
    """Return the numbers of steps a cell was measured at, fewest first; `ar` for one that writes token by token."""
    found = {s for r in cell.measured if r.eval and r.eval.step_sweep for s in r.eval.step_sweep.frontier}
    return sorted(found, key=lambda s: int(s) if s.isdigit() else 0)


def text_points(cell: Cell, steps: str) -> list[dict[str, Any]]:
    """Return a cell's generated text in so many steps, one entry a temperature: means over the seeds, and `by_seed`."""
    sweeps = [r.eval.step_sweep for r in cell.measured if r.eval and r.eval.step_sweep]
    points = [p for sweep in sweeps for p in sweep.frontier.get(steps, [])]
    found = []
    for temperature in sorted({p["temperature"] for p in points}):
        same = [p for p in points if p["temperature"] == temperature]
        found.append({**merged(same), "by_seed": same})
    return found


def infill_accuracy(cell: Cell, steps: str, figure_name: str = "accuracy") -> Spread | None:
    """Return the accuracy of filled gaps (or its `accuracy_gain` over the control), over the seeds."""
    sweeps = [r.eval.step_sweep for r in cell.measured if r.eval and r.eval.step_sweep]
    told = [sweep.infill[steps].get(figure_name) for sweep in sweeps if steps in sweep.infill]
    return spread([Estimate(**t) for t in told if t], cell.clusters)


def curves_of(cell: Cell) -> dict[CurveKey, list[ParallelismCurve]]:
    """Return a cell's curves, one a seed."""
    found: dict[CurveKey, list[ParallelismCurve]] = {}
    for row in cell.measured:
        for curve in row.eval.parallelism.curves if row.eval and row.eval.parallelism else []:
            key = (curve.rule, curve.task, curve.block_size, curve.block_add_threshold)
            found.setdefault(key, []).append(curve)
    return found


def rule_name(key: CurveKey) -> str:
    """Return a curve's rule in words."""
    rule, _, block_size, joins = key
    if block_size is None:
        return RULES[rule]
    how = "one after another" if joins == 1 else f"the next from {100 * (joins or 0):.0f} % on"
    return f"{RULES[rule]}, blocks of {block_size}, {how}"


# -- steps ------------------------------------------------------------------------------------------------------------


def steps_table(results: Results) -> str:
    """Return a line a cell, number of steps and temperature: text and filled gaps beside tokens per second."""
    header = ["row", "steps", "T", "tok/forward", "tok/s", "judge ppl", "entropy", "check", "overlap gain"]
    header += ["infill acc", "less control", "infill tok/forward"]
    reference = results.data.get("reference_text") or {}
    clean = "passes" if judge_tells(reference) else "cannot be judged"
    body = []
    for cell in gather(results):
        for steps in steps_of(cell):
            gap = merged(
                [r.eval.step_sweep.infill.get(steps, {}) for r in cell.measured if r.eval and r.eval.step_sweep]
            )
            for point in text_points(cell, steps):
                body.append(
                    [
                        cell.label,
                        steps,
                        f"{point['temperature']:g}",
                        number(point.get("tokens_per_forward"), ".2f"),
                        speed_at(cell, steps, point),
                        number(point.get("judge_ppl"), ",.1f"),
                        number(point.get("unigram_entropy_nats"), ".2f"),
                        seeds_fault(point["by_seed"], reference) or clean,
                        _overlap_gain(point),
                        estimate(infill_accuracy(cell, steps), percent=True),
                        estimate(infill_accuracy(cell, steps, "accuracy_gain"), percent=True, sign="+"),
                        number(gap.get("tokens_per_forward"), ".2f"),
                    ]
                )
    return markdown_table(header, body)


def speed_at(cell: Cell, steps: str, point: Mapping[str, Any]) -> str:
    """Return the benchmark's tokens per second at these steps, else those of the evaluation, in brackets."""
    timed = cell.speeds.get(steps)
    if timed is not None:
        return f"{timed.value:,.1f}"
    told = point.get("eval_tokens_per_s")
    return NOT_MEASURED if told is None else f"({told:,.1f})"


def _overlap_gain(point: Mapping[str, Any]) -> str:
    gains = [Estimate(**p["overlap_1_gain"]) for p in point["by_seed"] if p.get("overlap_1_gain")]
    return estimate(spread(gains), percent=True, sign="+")


def steps_note(results: Results) -> str:
    """Say what is measured, and of which rows it is not."""
    sweeps = [r.eval.step_sweep for r in results.cells if r.eval and r.eval.step_sweep]
    batch = sweeps[0].batch_size if sweeps else 0
    note = (
        "steps: denoising steps of a whole response. tok/s: the benchmark's, batch 1, where it ran at these steps; in "
        f"brackets that of this evaluation, in batches of at most {batch}, without rounds or warm-up: no benchmark. "
        "check as under Generated text. overlap gain: unigram F1 with the true continuation less that with others', "
        "points. "
        "infill acc: share of tokens right, in %, when a stretch is taken out of the middle of held-out text and "
        "filled in greedily, at the tokens per forward that so many steps of a whole response have (a block-causal row "
        "takes at least a pass for every block); ± one standard error clustered by document. less control: minus the "
        "share that is right against other documents' text at the same place, points."
    )
    return " ".join([note, *_contexts(results), *absences(results, "infill")])


# -- parallelism ------------------------------------------------------------------------------------------------------


def parallelism_table(results: Results) -> str:
    """Return a line a cell, rule and task: the area under the curve, and accuracy at the ends of it."""
    header = ["row", "task", "rule", "settings", "tok/forward", "accuracy %", "AUP", "y_max %"]
    body = []
    for cell in gather(results):
        for key, curves in curves_of(cell).items():
            points = curve_points(curves)
            if not points:
                continue
            body.append(
                [
                    cell.label,
                    TASKS[key[1]],
                    rule_name(key),
                    ", ".join(f"{setting:g}" for setting, *_ in points),
                    ", ".join(figure(rho, ".2f") for _, rho, _ in points),
                    ", ".join(percent(accuracy.mean) for *_, accuracy in points),
                    area(spread(curve.aup for curve in curves)),
                    number(curves[0].best_accuracy, ".1f"),
                ]
            )
    return markdown_table(header, body)


def curve_points(curves: Sequence[ParallelismCurve]) -> list[tuple[float, Spread, Spread]]:
    """Return (setting, tokens per forward, accuracy) over the seeds, the least parallel setting first."""
    found = []
    for setting in dict.fromkeys(p.setting for curve in curves for p in curve.points):
        same = [p for curve in curves for p in curve.points if p.setting == setting]
        rho, accuracy = spread(p.tokens_per_forward for p in same), spread(p.accuracy for p in same)
        assert rho is not None
        assert accuracy is not None
        found.append((setting, rho, accuracy))
    return sorted(found, key=lambda point: point[1].mean)


def area(found: Spread | None) -> str:
    """Return an AUP with its error."""
    if found is None:
        return NOT_MEASURED
    text = f"{found.mean:.1f}" + ("" if found.se is None else f" ± {found.se:.1f}")
    return text if found.sd is None else f"{text} (sd {found.sd:.1f})"


def parallelism_note(results: Results) -> str:
    """Say how the curves were made, what AUP is, and which rows have none."""
    measured = [r.eval.parallelism for r in results.cells if r.eval and r.eval.parallelism]
    first = measured[0] if measured else None
    how = f"{first.num_sequences} held-out sequences, {100 * first.mask_ratio:.0f} % of a response" if first else ""
    note = (
        f"Held-out text with tokens taken out ({how} masked at random, or a stretch in the middle) is decoded "
        "greedily; accuracy: share of tokens equal to those taken out, by setting of the rule; tok/forward: tokens "
        "filled in over passes, each text as if decoded by itself. AUP as defined by d3LLM (arXiv:2601.07568): area "
        "under accuracy in % against tokens per forward, points more than 5 below the least parallel one left out, "
        "weight exp(-3 (1 - y / y_max)), y_max the best accuracy among all rows with the same view of the text; ± "
        "jackknife standard error over documents. These two tasks stand in for benchmark tasks: AUPs are not to be "
        "compared with published ones, and among rows only on the same task, rule and settings, since every curve "
        "begins and ends where its settings lead."
    )
    return " ".join([note, *_contexts(results), *absences(results, "curves")])


def _contexts(results: Results) -> Iterator[str]:
    """Yield a sentence on rows that see less than the text on both sides of a gap."""
    for cell in gather(results):
        for row in cell.measured[:1]:
            seen = _context(row)
            if seen not in (None, "both sides"):
                yield f"{cell.name} sees of the text around a gap: {seen}; its accuracy is another task."


def _context(row: Row) -> str | None:
    assert row.eval is not None
    if row.eval.step_sweep and row.eval.step_sweep.infill_context:
        return row.eval.step_sweep.infill_context
    return row.eval.parallelism.context if row.eval.parallelism else None


def absences(results: Results, what: str) -> Iterator[str]:
    """Yield a sentence on every cell for which something is not measured, with the reason."""
    for cell in gather(results):
        for row in cell.measured[:1]:
            assert row.eval is not None
            sweep, parallel = row.eval.step_sweep, row.eval.parallelism
            reason = (sweep and sweep.infill_absent) if what == "infill" else (parallel and parallel.absent)
            if reason:
                yield f"No {what} of {cell.name}: it {reason}."


# -- tidy -------------------------------------------------------------------------------------------------------------


def tidy_metrics(row: Row) -> Iterator[tuple[str, float, float | None]]:
    """Yield (metric, value, standard error) of a row's sweeps."""
    assert row.eval is not None
    sweep, parallel = row.eval.step_sweep, row.eval.parallelism
    for steps, points in (sweep.frontier if sweep else {}).items():
        for point in points:
            yield from _numbers(point, f"eval/step_sweep/{steps}/T={point['temperature']:g}", skip=("temperature",))
    for steps, gap in (sweep.infill if sweep else {}).items():
        yield from _numbers(gap, f"eval/infill/{steps}")
    for curve in parallel.curves if parallel else []:
        blocks = "" if curve.block_size is None else f"-{curve.block_size}-{curve.block_add_threshold:g}"
        prefix = f"eval/parallelism/{curve.task}/{curve.rule}{blocks}"
        for p in curve.points:
            yield f"{prefix}/accuracy@{p.setting:g}", p.accuracy.value, p.accuracy.se
            yield f"{prefix}/tokens_per_forward@{p.setting:g}", p.tokens_per_forward.value, p.tokens_per_forward.se
        if curve.aup is not None:
            yield f"{prefix}/aup", curve.aup.value, curve.aup.se


def _numbers(
    found: Mapping[str, Any], prefix: str, skip: Sequence[str] = ()
) -> Iterator[tuple[str, float, float | None]]:
    for name, value in found.items():
        if isinstance(value, Mapping) and "value" in value:
            yield f"{prefix}/{name}", value["value"], value.get("se")
        elif name not in skip and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value, None
