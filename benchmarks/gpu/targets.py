"""What the suite's numbers have to reach, and what became of each: met, missed, or not measured and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks import _report

MET, MISSED = "met", "missed"
HEADLINE_LDLM = "qwen3_6_35b_a3b, 64 tokens, batch 1, 10 steps"
HEADLINE_DECODE = "32+128 tokens, batch 1, 8 steps"
AR, BLOCK_CAUSAL = "autoregressive, 32+128 tokens, batch 1", "block_causal, 1024+512 tokens"
ERRORS, MFU, ALIGNED, LOSS_MEMORY = "errors", "random_mask, 2048 tokens", "repr_align_all, 2048 tokens", "loss memory"


@dataclass(frozen=True)
class Target:
    """A number that is to be reached.

    Attributes:
        row: of the part, by name.
        number: in the row's `headline`.
        text: for readers.
        bound: what it is compared with; None shows it without a verdict.
        at: the bound is the least or the most that will do.
        stretch: what would be better still; shown beside.
    """

    row: str
    number: str
    text: str
    bound: float | None
    at: Literal["least", "most"] = "least"
    stretch: float | None = None


TARGETS: dict[str, tuple[Target, ...]] = {
    "kernels": (
        Target(ERRORS, "worst_over_tolerance", "largest error of a kernel over its tolerance", 1.0, "most"),
        Target(ERRORS, "kernels", "kernels that ran through Triton and torch.compile", None),
    ),
    "ldlm": (
        Target(HEADLINE_LDLM, "tokens_per_s", "35B-A3B shape, 64 tokens, batch 1, 10 steps, tok/s", 20_000.0),
        Target(HEADLINE_LDLM, "share_of_roofline", "the same, share of the roofline", 1 / 3, stretch=0.5),
        Target(HEADLINE_LDLM, "fast_over_eager", "the same, fast over eager", 4.0),
        Target("qwen3_6_35b_a3b, 64 tokens, batch 1, 4 steps", "tokens_per_s", "the same in 4 steps, tok/s", 35_000.0),
        Target(
            "qwen3_6_35b_a3b, 64 tokens, batch 16, 10 steps",
            "tokens_per_s",
            "the same at batch 16, tok/s",
            60_000.0,
            stretch=100_000.0,
        ),
        Target(
            "qwen3_6_27b, 64 tokens, batch 1, 10 steps",
            "tokens_per_s",
            "27B shape, 64 tokens, batch 1, 10 steps, tok/s",
            4_000.0,
        ),
    ),
    "decode": (
        Target(HEADLINE_DECODE, "tokens_per_s", "1.7B shape, 32+128 tokens, 8 steps, tok/s", 8_000.0),
        Target(HEADLINE_DECODE, "share_of_roofline", "the same, share of the roofline", 0.4),
        Target(HEADLINE_DECODE, "over_plain", "the same over the plain loop", 5.0),
        Target(HEADLINE_DECODE, "over_masked_rows", "the same over a loop that reads masked rows only", None),
        Target(AR, "over_ar_best", "the same over the best AR loop (static cache, graphs)", None),
        Target(AR, "ar_best_tokens_per_s", "the best AR loop, tok/s", None),
        Target(BLOCK_CAUSAL, "over_uncached", "block_causal 1024+512, exact cache over none", 4.0),
    ),
    "train": (
        Target(MFU, "mfu", "1.7B shape, sequences of 2,048, share of the peak rate (MFU)", 0.4),
        Target(ALIGNED, "over_random_mask", "step of repr_align_all, cached anchors, over none", 1.1, "most"),
        Target(LOSS_MEMORY, "chunked_bytes_per_token", "chunked loss, bytes a further token takes", None),
        Target(LOSS_MEMORY, "full_over_chunked", "peak of full logits over chunks", None),
    ),
    "convert": (),
}
"""By part. `convert` judges its own figures: its record may hold `targets`, in the form that `judge` returns."""


def passed(target: Target, value: float) -> bool:
    """Return whether a number reaches its bound; the bound itself does."""
    assert target.bound is not None
    return value >= target.bound if target.at == "least" else value <= target.bound


def judge(target: Target, rows: Mapping[str, Mapping[str, Any]], *, smoke: bool = False) -> dict[str, Any]:
    """Return what became of a target.

    A row whose own check failed (`passed` is false: its tokens or values are not those of the reference) misses every
    target: speed with other results is worth nothing.

    Args:
        target: to judge.
        rows: of its part's record.
        smoke: nothing counts, whatever was measured.
    """
    told: dict[str, Any] = {"text": target.text, "row": target.row, "number": target.number, "wanted": wanted(target)}
    row = rows.get(target.row)
    if row is None or "found" not in row:
        why = _report.NOT_MEASURED if row is None else row["not_measured"]
        return {**told, "measured": None, "verdict": _report.NOT_MEASURED, "why": _reason(why)}
    found = row["found"]
    value = told["measured"] = found.get("headline", {}).get(target.number)
    if smoke:
        return {**told, "verdict": _report.NOT_MEASURED, "why": "smoke run: the number means nothing"}
    if not found.get("passed", True):
        return {**told, "verdict": MISSED, "why": "its results differ from the reference's"}
    if value is None:
        return {**told, "verdict": _report.NOT_MEASURED, "why": str(found.get("why", ""))}
    if target.bound is None:
        return {**told, "verdict": "shown", "why": ""}
    verdict = MET if passed(target, value) else MISSED
    return {**told, "verdict": verdict, "why": "" if verdict == MET else two_numbers_text(found)}


def _reason(text: str) -> str:
    return text.removeprefix(_report.NOT_MEASURED).lstrip(": ")


def wanted(target: Target) -> str:
    """Return a bound as text."""
    if target.bound is None:
        return ""
    sign = ">=" if target.at == "least" else "<="
    stretch = "" if target.stretch is None else f" (stretch {target.stretch:,.6g})"
    return f"{sign} {target.bound:,.6g}{stretch}" if target.bound >= 2 else f"{sign} {target.bound:.2f}{stretch}"


def misses(part: str, row: str, found: Mapping[str, Any]) -> bool:
    """Return whether a row that was just measured misses one of its part's targets."""
    rows = {row: {"found": found}}
    return any(judge(t, rows)["verdict"] == MISSED for t in TARGETS[part] if t.row == row)


def two_numbers(demand: Mapping[str, Any], ceilings: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds that a row's bytes and operations take at the ceilings: no version runs much faster."""
    return {
        "bytes_s": demand["bytes"] / (1e9 * ceilings["gb_per_s"]),
        "operations_s": demand["flops"] / (1e12 * ceilings["tflop_per_s"]),
    }


def two_numbers_text(found: Mapping[str, Any]) -> str:
    """Return the two numbers of a row beside the time it took, where it has them."""
    floor = found.get("two_numbers")
    if not floor:
        return ""
    took = f", measured {1e3 * found['seconds']:.3g} ms" if "seconds" in found else ""
    return f"bytes {1e3 * floor['bytes_s']:.3g} ms, operations {1e3 * floor['operations_s']:.3g} ms{took}"


def table(results: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Return judged targets as text.

    Args:
        results: (part, what `judge` returned).
    """
    lines = [f"{'part':<8} {'target':<60} {'wanted':>26} {'measured':>10}  verdict"]
    for part, told in results:
        measured = "-" if told["measured"] is None else f"{told['measured']:,.4g}"
        if told["measured"] is not None and told["measured"] >= 1000:
            measured = f"{told['measured']:,.0f}"
        why = f": {told['why']}" if told.get("why") else ""
        lines.append(
            f"{part:<8} {told['text']:<60} {told.get('wanted', ''):>26} {measured:>10}  {told['verdict']}{why}"
        )
    return "\n".join(lines)
