"""The speeds that decoding has to reach, beside those that were measured; and the quality that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decode_parts import AR_STEPS
from benchmarks.decode_record import (
    Likelihood,
    Measurement,
    Quality,
    QualityRow,
    Ratio,
    TargetPlace,
    TargetResult,
    TargetVerdict,
    Text,
)
from dllm_core.errors import DllmError

STATED_FOR = "two CPU cores, bf16, SmolLM2-135M, 128 new tokens (block_causal: 256 behind 256)"


@dataclass(frozen=True)
class Target:
    """A ratio that is to be reached.

    Attributes:
        name: in the record.
        text: for readers.
        least: the ratio.
        part: where it is measured.
        rows: whose ratio.
        steps: the number of denoising steps that it is stated for; None is any.
    """

    name: str
    text: str
    least: float
    part: str
    rows: tuple[str, str]
    steps: int | None = None


TARGETS = (
    Target("ours_over_plain", "ours over the plain loop, same rule and steps", 1.6, "sweep", ("ours", "plain")),
    Target(
        "ours_over_masked_rows",
        "ours over an eager loop that reads masked rows only",
        1.3,
        "sweep",
        ("ours", "masked_rows"),
    ),
    Target(
        "exact_over_uncached",
        "block_causal, exact cache over no cache, equal steps per block",
        4.0,
        "block_causal",
        ("exact", "uncached"),
    ),
    Target(
        "ours_over_ar_best",
        f"ours at {AR_STEPS} steps over the best AR loop with a cache",
        3.0,
        "ar",
        ("ours", "ar_best"),
        AR_STEPS,
    ),
    Target(
        "block_causal_over_ar_best",
        f"block_causal, exact cache, at {AR_STEPS} steps over the best AR loop with a cache",
        3.0,
        "ar",
        ("block_causal", "ar_best"),
        AR_STEPS,
    ),
)


def judge(found: Sequence[Measurement], *, on_gpu: bool, targets: Sequence[Target] = TARGETS) -> list[TargetResult]:
    """Return what became of every target.

    The sweep's targets are judged at its batch size and canvas (those of its first measurement), at every number of
    steps. A ratio counts as it was measured; its interval stands beside it.

    Args:
        found: of one device.
        on_gpu: it is a GPU, which the targets are not stated for.
        targets: what is to be reached.
    """
    results = []
    for target in targets:
        places = [] if on_gpu else list(_places(target, found))
        why = ""
        if on_gpu:
            why = f"stated for {STATED_FOR}"
        elif not places:
            why = next((m.not_measured for m in found if m.part == target.part and m.not_measured), "")
        if any(m.check and not m.check.passed for m in found if m.part == target.part):
            places = [place.model_copy(update={"verdict": "missed"}) for place in places]
            why = "the two rows do not give the same tokens in fp32"
        told = {place.verdict for place in places}
        verdict: TargetVerdict = "missed" if "missed" in told else "met" if told else "not measured"
        results.append(
            TargetResult(name=target.name, text=target.text, least=target.least, verdict=verdict, why=why, at=places)
        )
    return results


def _places(target: Target, found: Sequence[Measurement]) -> Iterator[TargetPlace]:
    of_part = [m for m in found if m.part == target.part]
    for m in of_part:
        first = of_part[0]
        same_canvas = (m.prompt_tokens, m.new_tokens) == (first.prompt_tokens, first.new_tokens)
        if m.batch_size != first.batch_size or not same_canvas or target.steps not in (None, m.steps):
            continue
        ratio = ratio_of(m, target.rows)
        if ratio is not None:
            met: TargetVerdict = "met" if ratio.ratio >= target.least else "missed"
            yield TargetPlace(where=f"{m.steps} steps", ratio=ratio.ratio, ci95=ratio.ci95, verdict=met)


def ratio_of(measurement: Measurement, rows: tuple[str, str]) -> Ratio | None:
    """Return a ratio of a part, None where it was not measured."""
    return next((r for r in measurement.ratios if r.rows == rows), None)


# -- quality ----------------------------------------------------------------------------------------------------------


def quality_of(path: Path) -> Quality:
    """Return likelihood and text checks of the rows of a grid's results.json.

    Raises:
        DllmError: no such file, or not a grid's; or the report's own requirements are missing.
    """
    try:
        from steps.report.cells import gather
        from steps.report.schema import Results
        from steps.report.texts import verdicts
    except ImportError as error:
        raise DllmError(
            f"The report's checks cannot be loaded: {error}.", "Leave --quality out, or install the extra 'grid'."
        ) from error
    try:
        results = Results.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DllmError(
            f"'{path.name}' is no grid's results: {str(error).splitlines()[0]}",
            "Give a file that steps.report.publish stored, such as benchmarks/results/grid-laptop-*.json.",
        ) from error
    texts = verdicts(results)
    rows = []
    for cell in gather(results):
        nats = cell.likelihood(cell.kind) if cell.kind else None
        told = texts.get(cell.name)
        likelihood = Likelihood(kind=str(cell.kind), nats_per_token=nats.mean, se=nats.se) if nats else None
        text = None
        if told is not None:
            text = Text(
                temperature=told.point["temperature"],
                steps=None if cell.causal else told.point.get("steps"),
                judge_ppl=told.point.get("judge_ppl"),
                passes=told.passes,
                fault=told.fault or ("" if told.judged else "not judged"),
            )
        if likelihood or text:
            rows.append(QualityRow(name=cell.name, method=cell.rows[0].method, likelihood=likelihood, text=text))
    return Quality(file=path.name, git_commit=results.git_commit, rows=rows)


# -- text -------------------------------------------------------------------------------------------------------------


def interval(ci95: tuple[float | None, float | None]) -> str:
    """Return an interval as text, nothing where there is none."""
    low, high = ci95
    return "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"


def table(results: Sequence[TargetResult]) -> str:
    """Return the targets as text."""
    lines = [f"Targets, stated for {STATED_FOR}:"]
    for result in results:
        lines.append(
            f"  {result.verdict:<12} {result.text}: >= {result.least:g}x{f' ({result.why})' if result.why else ''}"
        )
        lines += [
            f"    {place.verdict:<10} {place.where}: {place.ratio:.2f}x{interval(place.ci95)}" for place in result.at
        ]
    return "\n".join(lines)


def quality_table(quality: Quality | str) -> str:
    """Return the quality as text, to stand beside the ratio to the autoregressive row."""
    if isinstance(quality, str):
        return f"Quality of both: {quality} (--quality RESULTS.json of a grid shows its rows')."
    lines = [f"Quality of both kinds of rows, in {quality.file}: of those cells, not of the weights timed here."]
    for row in quality.rows:
        nats = "no likelihood"
        if row.likelihood:
            error = "" if row.likelihood.se is None else f" +- {row.likelihood.se:.2f}"
            nats = f"{row.likelihood.nats_per_token:.2f}{error} nats per token ({row.likelihood.kind})"
        text = "no text"
        if row.text:
            steps = f" in {row.text.steps} steps" if row.text.steps else ""
            verdict = "passes the checks" if row.text.passes else f"fails the checks: {row.text.fault}"
            text = f"text at T={row.text.temperature:g}{steps} {verdict}"
        lines.append(f"  {row.name:<24} {nats}; {text}")
    return "\n".join(lines)
