"""What generated text is worth: checks that it has to pass before its speed counts, and whether it follows its prompt.

The checks screen, they do not rank: the judge is often the base model itself. A text that passes may still be poor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steps.report.cells import Cell, Spread, gather, merged
from steps.report.schema import Estimate, Results

ENTROPY_SHARE = 0.75
"""Part of the entropy of held-out text that text has to have, beyond the error of a few texts.

Lenient: lower perplexities bought with entropy (arXiv:2409.02908) are told there as a fault at smaller losses.
"""
MOST_REPEATED = 0.25
"""Part of 4-grams that may have occurred before in the same text."""
KNOWS_TEXT = 2.0
"""Times the judge's perplexity of held-out text that shuffling it has to give before the judge's word counts."""
HAS_ORDER = 0.1
"""Part of the judge's nats that shuffling costs held-out text, which shuffling has to cost text with an order."""


@dataclass(frozen=True)
class TextVerdict:
    """What the checks say of a cell's text.

    Attributes:
        cell: the cell.
        point: figures at the lowest temperature that passes, else at the lowest one; means over the seeds.
        fault: what is wrong with the text of that point; "" if nothing is, in every seed.
        judged: the judge tells text from shuffled tokens; else no text can be called good.
    """

    cell: Cell
    point: Mapping[str, Any]
    fault: str
    judged: bool

    @property
    def passes(self) -> bool:
        return self.judged and not self.fault


def verdicts(results: Results) -> dict[str, TextVerdict]:
    """Return cell name -> verdict, for the cells that wrote text."""
    reference = results.data.get("reference_text") or {}
    found = {}
    for cell in gather(results):
        judged = judge_tells(reference)
        tried = [TextVerdict(cell, p, seeds_fault(p["by_seed"], reference), judged) for p in cell.frontier]
        if tried:
            found[cell.name] = next((v for v in tried if not v.fault), tried[0])
    return found


def judge_tells(reference: Mapping[str, Any]) -> bool:
    """Return whether the judge tells held-out text from its own tokens shuffled; else its word counts for nothing."""
    ppl, shuffled = reference.get("judge_ppl"), reference.get("shuffled_judge_ppl")
    return bool(ppl and shuffled and shuffled > KNOWS_TEXT * ppl)


def fault(point: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Return what is wrong with the text of one temperature of one seed, "" if nothing is known to be."""
    entropy, usual = point.get("unigram_entropy_nats"), reference.get("unigram_entropy_nats")
    if (repeated := point.get("repetition_4") or 0.0) > MOST_REPEATED:
        return f"{100 * repeated:.0f} % repeated 4-grams"
    if entropy is not None and usual:
        margin = 2 * (point.get("unigram_entropy_se") or 0.0)
        if entropy < ENTROPY_SHARE * usual:
            return f"entropy {entropy:.1f}"
        if entropy - margin < ENTROPY_SHARE * usual:
            return f"entropy {entropy:.1f} ± {margin:.1f}, too near {ENTROPY_SHARE * usual:.1f}"
    ppl, shuffled = point.get("judge_ppl"), point.get("shuffled_judge_ppl")
    if ppl is None or not judge_tells(reference):
        return ""
    if ppl > reference["shuffled_judge_ppl"]:
        return f"judge ppl {ppl:,.0f}"
    whole = math.log(reference["shuffled_judge_ppl"] / reference["judge_ppl"])
    if shuffled and math.log(shuffled / ppl) < HAS_ORDER * whole:
        return f"judge ppl {ppl:,.0f}, {shuffled:,.0f} with its tokens shuffled"
    return ""


def seeds_fault(points: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> str:
    """Return what is wrong with the text of one temperature; "" only if nothing is in any seed."""
    faults = [f for p in points if (f := fault(p, reference))]
    if len(faults) == len(points) > 1:
        return fault(merged(points), reference) or faults[0]
    return f"{faults[0]} in {len(faults)} of {len(points)} seeds" if faults and len(points) > 1 else "".join(faults)


def overlap_gain(point: Mapping[str, Any], size: int = 1) -> Spread | None:
    """Return by how much continuations are nearer to the true ones than to those of other prompts, over the seeds."""
    key = f"overlap_{size}_gain"
    gains = [Estimate(**p[key]) for p in point["by_seed"] if p.get(key)]
    if not gains:
        return None
    ses = tuple(g.se for g in gains if g.se is not None)
    return Spread(tuple(g.value for g in gains), ses, independent_texts(point))


def independent_texts(point: Mapping[str, Any]) -> int | None:
    """Return how many independent units a point's standard errors rest on: documents where they are known, else texts.

    Several prompts may come from one document: degrees of freedom by prompts would make an interval too narrow.
    """
    counts = (point.get("num_documents"), point.get("num_samples"))
    return next((int(n) for n in counts if n), None)
