"""What must be known to read each table of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steps.report.cells import BLOCK_NELBO, Cell, gather
from steps.report.curves import still_rising
from steps.report.schema import Results
from steps.report.texts import ENTROPY_SHARE, HAS_ORDER, MOST_REPEATED

AT_ONCE = 0.9
"""Part of a decode's time at whose end the first token is there, above which all tokens are written at the end."""
RISING = 0.005

OVERLAP = (
    "F1 of shared token n-grams, in %: with the text that really followed the prompt (own), and with what followed "
    "prompts of other documents (other; of the same one where it is alone). Text that does not depend on its prompt "
    "has the same overlap with both. Difference: paired, ± one standard error clustered by document (sd: over seeds)."
)
COST = (
    "Means over the seeds (sd). tokens: response tokens presented. TFLOP: all of it, teacher and extraction included. "
    "positions: token positions forwarded, further views included. Extraction: anchors and trajectories a row reads, "
    "at their stand-alone cost, charged to every row that reads them. mem: peak while training. new params: parameters "
    "that the base model does not have."
)


def seeds(results: Results) -> str:
    """Return `one seed` or `3 seeds`."""
    count = len(set(results.seeds))
    return "one seed" if count == 1 else f"{count} seeds"


def quality(results: Results) -> str:
    """Say what the likelihood columns are, and who has none."""
    documents = max((r.eval.num_documents or 0 for r in results.cells if r.eval), default=0)
    clusters = (
        f"clustered by document ({documents} held-out document{'s' * (documents != 1)})"
        if documents
        else "over held-out sequences"
    )
    note = (
        f"Nats per response token, ± one standard error, {clusters}; sd: over seeds. exact: the AR likelihood; NELBO: "
        "an upper bound under random-order unmasking; block NELBO: an upper bound under left-to-right blocks. A "
        "bound is not an exact value: the columns are not to be mixed. acc r=.5: share of tokens that are right when "
        "half are masked."
    )
    by_block = [c.name for c in gather(results) if c.kind == BLOCK_NELBO]
    if by_block:
        note += (
            f" {', '.join(by_block)}: seen in blocks of its own, behind clean earlier ones and with nothing of later "
            "ones in view; its masked tokens are another task, and accuracies are not to be compared with other rows'."
        )
    boundless = [c.name for c in gather(results) if c.latent]
    if boundless:
        note += (
            f" {', '.join(boundless)}: generated through continuous latents, which have neither a bound nor a masked "
            "prediction; compared below by generated text, overlap with the true continuation and reconstruction."
        )
    return note


def differences(results: Results) -> str:
    """Say how sure the intervals are, and of what."""
    counts = {c.metric: c.pairs for c in results.contrasts}
    told = ", ".join(f"{n} of {metric.replace('_', ' ')}" for metric, n in counts.items())
    note = (
        "First minus second, nats per token, mean over seeds, on the same held-out sequences and masks; only rows of "
        f"one seed are paired. All intervals of a metric ({told}) hold together with 95 % confidence: Student's t, "
        "Bonferroni over its pairs, clustered by document. Told apart: the interval excludes 0."
    )
    if max((c.seeds for c in results.contrasts), default=1) > 1:
        return (
            note + " They cover other held-out documents and other training seeds; the seeds' part is pooled over the "
            "pairs of a metric, since a few seeds say little of each alone."
        )
    return note + " With one seed they cover other held-out documents only: another training seed may turn them round."


def text(results: Results) -> str:
    """Say what the text figures mean, and what the checks are."""
    prompts = {p["num_samples"] for c in gather(results) for p in c.frontier if p.get("num_samples")}
    steps = sorted({p["steps"] for c in gather(results) if not c.causal for p in c.frontier if p.get("steps")})
    told = f" {max(prompts)} continuations a seed and temperature." if prompts else ""
    told += f" Written in {', '.join(map(str, steps))} denoising steps; token by token by AR rows." if steps else ""
    return (
        f"Means over the seeds (sd).{told} Judge perplexity alone can be gamed by dull or repetitive text: read it "
        "with entropy and repetition. A judge that is the base model is labelled self-judged and ranks nothing. The "
        f"check is a screen, not a rank; it wants, in every seed: under {100 * MOST_REPEATED:.0f} % repeated 4-grams; "
        f"unigram entropy, less two standard errors, at least {100 * ENTROPY_SHARE:.0f} % of held-out text's; a judge "
        "perplexity below that of held-out text with its tokens shuffled; and that shuffling its own tokens costs the "
        "judge at least "
        f"{100 * HAS_ORDER:.0f} % of the nats that it costs for held-out text. Where the judge hardly tells held-out "
        "text from shuffled tokens, no text can pass."
    )


def health(results: Results) -> str:
    """Say where the figures come from, what is reconstructed, and what was still rising."""
    note = (
        "Measured on held-out sequences by the rows themselves, means over the seeds. Accuracies are fractions of "
        "response tokens; figures by time t go from clean (0) to noise (1)."
    )
    told = [f"{c.name} {found}" for c in gather(results) if c.latent and (found := _reconstruction(c))]
    return note + (f" Held-out tokens reconstructed from latents: {'; '.join(told)}." if told else "")


def _reconstruction(cell: Cell) -> str:
    figures = cell.diagnostics
    parts = []
    for key, name in (("reconstruction_accuracy", ""), ("reconstruction_accuracy_noisy", " from noised latents")):
        if isinstance(figures.get(key), int | float):
            parts.append(f"{100 * figures[key]:.1f} %{name}")
    curves = [(n, points) for r in cell.done if r.train for n, points in r.train.health.items()]
    rises = [still_rising(points) for n, points in curves if "reconstruction" in n and n.endswith("_accuracy")]
    if max(rises, default=0.0) >= RISING:
        parts.append(f"still rising when training ended (+{100 * max(rises):.1f} points over its last fifth)")
    return ", ".join(parts)


def speed(results: Results) -> str:
    """Say how speed was measured, and when rows without masks write their tokens."""
    note = (
        "Batch 1, fixed length, EOS ignored, all rows interleaved in one process; median [95 % interval]. One seed of "
        "a cell is timed: seeds differ in values, not in work. "
        "Few steps are fast and may write worse text: the note under Generated text says how many were taken there."
    )
    when = {c.name: _first_token(c.bench.steps) for c in gather(results) if c.latent and c.bench}
    late = [n for n, share in when.items() if share is not None and share >= AT_ONCE]
    early = [f"{n} after {100 * s:.0f} % of the time" for n, s in when.items() if s is not None and s < AT_ONCE]
    if when:
        note += " Steps of a latent row are denoising steps of its latents."
    if late:
        note += f" {', '.join(late)}: all tokens are decoded at the end."
    if early:
        note += f" First tokens before the end: {', '.join(early)}."
    return note


def _first_token(steps: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the part of a decode's time that had passed when its first token was final."""
    for figures in steps.values():
        seconds = _seconds(figures)
        if seconds and figures.get("first_token_s") is not None:
            return min(1.0, figures["first_token_s"] / seconds)
    return None


def _seconds(figures: Mapping[str, Any]) -> float | None:
    """Return what a decode took: its tokens over tokens per second."""
    tokens = (figures.get("tokens_per_forward") or 0) * (figures.get("num_forwards") or 0)
    return tokens / figures["tokens_per_s"]["median"] if tokens else None


def ratios(results: Results) -> str:
    """Say how sure the ratios are."""
    pairs = len(results.speed_contrasts)
    few = sorted({c.rounds for c in results.speed_contrasts if c.rounds and c.verdict == "not resolved"})
    note = (
        f"Paired by round. The {pairs} intervals hold together with 95 % confidence (each at "
        f"{100 * (1 - 0.05 / pairs):.3g} %, "
        'signed rank, Bonferroni): taken at 95 % each, a false "faster" among so many would be likely. A tie is an '
        "interval within ±3 %; overlap alone proves nothing."
        if pairs > 1
        else "Paired by round, 95 % interval. A tie is an interval within ±3 %; overlap alone proves nothing."
    )
    return note + _too_few(pairs, few)


def _too_few(pairs: int, rounds: Sequence[int]) -> str:
    """Say which numbers of rounds can resolve nothing: even if one row won them all, that is too likely by chance."""
    least = next(n for n in range(1, 64) if 2 / 2**n <= 0.05 / max(1, pairs))
    below = [n for n in rounds if n < least]
    return f" Under {least} rounds nothing can be resolved (here {', '.join(map(str, below))})." if below else ""
