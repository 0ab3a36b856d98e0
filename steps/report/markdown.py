"""report.md: the opening lines, the tables with what must be known to read them, figures, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steps.report import tables
from steps.report.compare import has_no_bound
from steps.report.schema import Results


def render_markdown(results: Results, lines: Sequence[str], figure_names: Sequence[str]) -> str:
    """Return report.md."""
    machine = results.hardware
    hardware = ", ".join(str(v) for v in (machine.get("gpu"), machine.get("cpu"), _cores(machine)) if v)
    head = [
        f"# Grid {results.run_id}",
        "",
        f"`{results.command}`" if results.command else "",
        f"commit {(results.git_commit or 'unknown')[:12]}{' + local changes' if results.git_dirty else ''}, "
        f"{results.created_at}, {hardware or 'hardware not recorded'}, seeds {results.seeds}, "
        f"budget {_amount(results.budget['value'])} {results.budget['kind']} a row.",
        "",
        *[f"- {line}" for line in lines],
    ]
    sections = [
        ("Quality on held-out text", tables.quality_table(results), _quality_note(results)),
        ("Differences between rows", tables.comparison_table(results), _COMPARISON_NOTE),
        ("Generated text", tables.frontier_table(results), _FRONTIER_NOTE),
        ("Overlap with the true continuation", tables.overlap_table(results), _OVERLAP_NOTE),
        ("Health of latent rows", tables.health_table(results), _HEALTH_NOTE),
        ("Speed", tables.speed_table(results), _speed_note(results)),
        ("Speed ratios of rows that share one network", tables.tie_table(results), _TIE_NOTE),
        ("Cost", tables.cost_table(results), _COST_NOTE),
    ]
    body = [f"\n## {title}\n\n{table}\n\n{note}" for title, table, note in sections if table.count("\n") > 1]
    pictures = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figure_names]
    return "\n".join([*head, *body, "\n## Figures\n", *pictures, "\n## Samples\n", _samples(results)]) + "\n"


def _cores(machine: dict[str, Any]) -> str | None:
    count = machine.get("threads")
    return None if count is None else f"{count} thread{'' if count == 1 else 's'}"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,}"  # 4,000,000 tokens, 1.5 epochs


def _quality_note(results: Results) -> str:
    documents = max((r.eval.num_documents or 0 for r in results.cells if r.eval), default=0)
    clusters = (
        f"clustered by document ({documents} held-out document{'s' * (documents != 1)})"
        if documents
        else "over held-out sequences"
    )
    note = (
        f"Nats per response token, ± one standard error, {clusters}. exact: the AR likelihood; NELBO: an upper "
        "bound under random-order unmasking; block NELBO: an upper bound under left-to-right blocks. A bound is not an "
        "exact value: the columns are not to be mixed."
    )
    boundless = [r.row_id for r in results.cells if has_no_bound(r)]
    if boundless:
        note += (
            f" {', '.join(boundless)}: generated through continuous latents, which have neither a bound nor a masked "
            "prediction; compared below by generated text, overlap with the true continuation and reconstruction."
        )
    return note


def _speed_note(results: Results) -> str:
    note = "Batch 1, fixed length, EOS ignored, all rows interleaved in one process; median [95 % interval]."
    if any(has_no_bound(r) for r in results.cells):
        note += " Steps of a latent row are denoising steps of its latents; the tokens are decoded once, at the end."
    return note


_COMPARISON_NOTE = (
    "First minus second, nats per token, ± one standard error, on the same held-out sequences and masks, clustered by "
    "document. Beyond 2 standard errors a difference is more than evaluation noise; whether another training seed "
    "would give it again is not known."
)
_TIE_NOTE = (
    "Paired by round. A tie is an interval within ±3 %; overlap alone proves nothing, and under 6 rounds nothing is "
    "resolved."
)
_COST_NOTE = (
    "tokens: response tokens presented. TFLOP: all of it, teacher and extraction included. positions: token positions "
    "forwarded, further views included. Extraction: anchors and trajectories a row reads, at their stand-alone cost, "
    "charged to every row that reads them."
)
_FRONTIER_NOTE = (
    "Judge perplexity alone can be gamed by dull or repetitive text: read it with entropy and repetition. A judge "
    "that is the base model is labelled self-judged and ranks nothing."
)
_OVERLAP_NOTE = (
    "F1 of shared token n-grams, in %: with the text that really followed the prompt (own), and with what followed "
    "prompts of other documents (other; of the same one where it is alone). Text that does not depend on its prompt "
    "has the same overlap with both. Difference: paired, ± one standard error clustered by document."
)
_HEALTH_NOTE = (
    "Measured on held-out sequences by the rows themselves. Accuracies are fractions of response tokens; figures by "
    "time t go from clean (0) to noise (1)."
)


def _samples(results: Results) -> str:
    parts = []
    for row in results.cells:
        for sample in (row.eval.samples if row.eval else [])[:1]:
            text = sample["continuation"].strip().replace("\n", " ")
            parts.append(
                f"**{row.row_id}** (T={sample.get('temperature')}): {sample['prompt'].strip()[-160:]} ⟶ {text}"
            )
    return "\n\n".join(parts)
