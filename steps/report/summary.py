"""What the numbers say, in sentences: which conversion to choose, and what must not be concluded.

At most eight lines, so that with the title they are the first ten of report.md. Each says only what the data support: a
winner needs enough seeds and an interval that excludes every other cell, bounds stand against bounds only, and cells
without a bound are compared by their text.
"""

from __future__ import annotations

from collections.abc import Sequence

from steps.report.cells import BLOCK_NELBO, EXACT, KIND_NAMES, MIN_SEEDS_TO_RANK, NELBO, Cell, Speed, Spread, gather
from steps.report.compare import Standing, is_ranked, standing
from steps.report.costs import cost_line, plain_recipes
from steps.report.schema import Results
from steps.report.texts import TextVerdict, overlap_gain, verdicts

TEXT_FIGURES = ("judge_ppl", "unigram_entropy_nats")


def headline(results: Results) -> list[str]:
    """Return the report's opening lines. `results` carries its conclusions (`compare.concluded`)."""
    cells = gather(results)
    chosen = [c for c in cells if c.converted]
    texts = verdicts(results)
    lines = [
        _answer(results, chosen, texts),
        _likelihood_line(results, chosen),
        _text_line(results, chosen, texts),
        _latent_line(chosen, texts),
        _speed_line(results, chosen),
        cost_line(results, chosen),
        _reference_line(results, [c for c in cells if c.causal and c.done], texts),
        _open_line(results, cells, chosen),
    ]
    return [line for line in lines if line]


def _answer(results: Results, chosen: Sequence[Cell], texts: dict[str, TextVerdict]) -> str:
    """Say what to choose, as far as the numbers carry it."""
    if not chosen:
        return "Answer: none. No converted row finished."
    told = [_text_answer(results, chosen, texts), _likelihood_answer(results, chosen)]
    plain = plain_recipes(chosen)
    if plain:
        told.append(f"The cheapest recipe is {_either(plain)}: no new parameters, no teacher.")
    return " ".join(["Answer:", *filter(None, told)])


def _text_answer(results: Results, chosen: Sequence[Cell], texts: dict[str, TextVerdict]) -> str:
    good = [texts[c.name] for c in chosen if c.name in texts and texts[c.name].passes]
    fast, speeds = fastest(good)
    if not texts:
        return "no text was generated, and speed alone recommends nothing."
    if not any(v.judged for v in texts.values()):
        return "text cannot be judged here, and speed alone recommends nothing."
    if not good:
        kept = [c.name for c in gather(results) if c.causal and c.name in texts and texts[c.name].passes]
        stay = f"; {' and '.join(kept)} {'does' if len(kept) == 1 else 'do'}" if kept else ""
        return f"no converted row writes text that passes the checks at this budget{stay}."
    if not fast:
        return f"text passes the checks in {_listed([v.cell.name for v in good])}, whose speed was not measured."
    at, steps = speeds[fast[0].name], texts[fast[0].name].point["steps"]
    why = f"{_rate(at)} in {steps} steps, {_over_reference(results, at)}"
    why = why if len(fast) == 1 else "which cannot be told apart in speed"
    once = ", in the one seed there is" if len(set(results.seeds)) == 1 else ""
    return f"for speed with text that passes the checks{once}, {_either([c.name for c in fast])} ({why})."


def _likelihood_answer(results: Results, chosen: Sequence[Cell]) -> str:
    found = standing(results, chosen, NELBO) or standing(results, chosen, BLOCK_NELBO)
    if not found:
        return ""
    if all(_above_floor(c, found.kind) for c in found.leaders):
        return "By likelihood none is better than a unigram model."
    if found.winner:
        return f"By likelihood {found.winner.name} leads the {len(found.order)} rows with a {KIND_NAMES[found.kind]}."
    if found.ranked and len(found.order) > 1:
        return f"By likelihood {_either([c.name for c in found.leaders])}, which cannot be told apart."
    return f"By likelihood none is ranked yet{_few_seeds(results)}."


def _likelihood_line(results: Results, chosen: Sequence[Cell]) -> str:
    """Order the cells with a bound as far as they can be told apart; with few seeds, as far as this run tells."""
    found = [s for kind in (NELBO, BLOCK_NELBO) if (s := standing(results, chosen, kind))]
    if not found:
        return "Likelihood: no converted row has a likelihood bound." if chosen else ""
    first = found[0]
    name, count = KIND_NAMES[first.kind], len(set(results.seeds))
    shown = first.order if first.ranked else [c for c in chosen if c in first.order]
    values = _listed([f"{c.name} {_value(c.likelihood(first.kind))}" for c in shown])
    line = f"Likelihood ({name}, nats per token, lower is better, ± 95 %): {values}; {_below_floor(first)}. "
    if len(first.order) < 2:
        return line + "Nothing to rank it against."
    if first.winner:
        line += f"{first.winner.name} is ahead of every other ({_margins(results, first)})."
    elif first.ranked:
        beaten = _listed([c.name for c in first.behind])
        behind = f"; behind them: {beaten}" if first.behind else ""
        line += f"{_listed([c.name for c in first.leaders])} cannot be told apart{behind}."
    else:
        why = _seeds(count) if not is_ranked(results.seeds) else "too few finished seeds, or no differences measured"
        line += f"Not ranked: {why}. {_this_run(results, first)}"
    for other in found[1:]:
        if other.ranked and {c.name for c in other.leaders} != {c.name for c in first.leaders}:
            line += f" By {KIND_NAMES[other.kind]}: {_either([c.name for c in other.leaders])}."
    return line


def _this_run(results: Results, found: Standing) -> str:
    """Say what differs beyond evaluation error, which is not a ranking."""
    names = {c.name for c in found.order}
    pairs = [c for c in results.contrasts if c.metric == found.kind and set(c.cells) <= names]
    if not pairs:
        return "No differences between rows could be measured."
    outside = sum(c.resolved for c in pairs)
    runs = "this training run" if len(set(results.seeds)) == 1 else "these runs"
    verb = "is" if outside == 1 else "are"
    return f"On {runs} {outside} of {_count(len(pairs), 'difference')} {verb} beyond evaluation error."


def _margins(results: Results, found: Standing) -> str:
    """Return by how much the winner leads the next cell, with its interval."""
    second = found.order[1].name
    for c in results.contrasts:
        if c.metric == found.kind and set(c.cells) == {found.order[0].name, second}:
            low, high = sorted((abs(c.low), abs(c.high)))
            return f"of {second} by {abs(c.difference):.3f} [{low:.3f}, {high:.3f}]"
    return ""


def _below_floor(found: Standing) -> str:
    floors = [r.eval.unigram_nats_per_token for c in found.order for r in c.measured if r.eval]
    floor = next((f for f in floors if f), None)
    if floor is None:
        return "unigram floor not measured"
    above = [c.name for c in found.order if _above_floor(c, found.kind)]
    side = f"not better than that: {_listed(above)}" if above else "all below it"
    return f"unigram floor {floor:.2f}, {side}"


def _few_seeds(results: Results) -> str:
    return "" if is_ranked(results.seeds) else f" ({_seeds(len(set(results.seeds)))} of {MIN_SEEDS_TO_RANK})"


def _above_floor(cell: Cell, kind: str) -> bool:
    """Return whether a unigram model is as good; False where that was not measured."""
    floor = next((f for r in cell.measured if r.eval and (f := r.eval.unigram_nats_per_token)), None)
    value = cell.likelihood(kind)
    return floor is not None and value is not None and value.mean >= floor


def _text_line(results: Results, chosen: Sequence[Cell], texts: dict[str, TextVerdict]) -> str:
    """Say whose text passes the checks and whose is worth nothing at this budget."""
    found = [texts[c.name] for c in chosen if c.name in texts]
    if not found:
        return "Text: none was generated." if chosen else ""
    good = [f"{v.cell.name} (T={v.point['temperature']:g})" for v in found if v.passes]
    poor = [f"{v.cell.name} ({v.fault})" for v in found if v.fault]
    unsure = [v.cell.name for v in found if not v.passes and not v.fault]
    reference = results.data.get("reference_text") or {}
    parts = [f"passes the checks: {_listed(good)}"] if good else []
    if poor:
        parts.append(f"worth nothing yet at any temperature tried: {_listed(poor)}{_usual(reference)}")
    if unsure:
        parts.append(f"cannot be judged, the judge hardly tells held-out text from shuffled tokens: {_listed(unsure)}")
    return f"Text (checked for repetition, entropy and order): {'; '.join(parts)}."


def _usual(reference: dict[str, float]) -> str:
    """Return what held-out text has instead."""
    entropy, shuffled = reference.get("unigram_entropy_nats"), reference.get("shuffled_judge_ppl")
    told = [f"entropy {entropy:.1f} nats"] if entropy else []
    told += [f"judge ppl {shuffled:,.0f} with its tokens shuffled"] if shuffled else []
    return f" (held-out text: {', '.join(told)})" if told else ""


def _latent_line(chosen: Sequence[Cell], texts: dict[str, TextVerdict]) -> str:
    """Compare cells without a bound with the others by what both have: their text."""
    latent = [c for c in chosen if c.latent]
    if not latent:
        return ""
    line = f"Without a bound: {_listed([c.name for c in latent])}; against the other rows by text only"
    told = [_text_figures(texts[c.name], len(texts)) for c in latent if c.name in texts]
    others = [texts[c.name] for c in chosen if not c.latent and c.name in texts]
    if not told:
        return line + ", of which there is none."
    if others:
        gains = [100 * g.mean for v in others if (g := overlap_gain(v.point))]
        figures = [[p for v in others if (p := v.point.get(k)) is not None] for k in TEXT_FIGURES]
        parts = [f"overlap {_range(gains, '+.1f')}"] if gains else []
        parts += [f"{_range(figures[0], ',.0f')} at {_range(figures[1], '.1f')}"] if all(figures) else []
        told.append(f"the rows with one: {', '.join(parts)}" if parts else "")
    unit = "overlap with the true continuation less the control, points of unigram F1, ± 95 % together"
    return f"{line} ({unit}; judge ppl at entropy): {'; '.join(filter(None, told))}."


def _text_figures(verdict: TextVerdict, comparisons: int) -> str:
    point, gain = verdict.point, overlap_gain(verdict.point)
    parts = []
    if gain:
        half = gain.half_width(comparisons)
        shown = "" if half is None else f" ± {100 * half:.1f}"
        sure = "follows its prompt" if half is not None and gain.mean > half else "not shown to follow its prompt"
        parts.append(f"{100 * gain.mean:+.1f}{shown}, {sure}")
    ppl, entropy = (point.get(k) for k in TEXT_FIGURES)
    if ppl is not None and entropy is not None:
        parts.append(f"{ppl:,.0f} at {entropy:.1f}")
    return f"{verdict.cell.name} {', '.join(parts)}"


def fastest(found: Sequence[TextVerdict]) -> tuple[list[Cell], dict[str, Speed]]:
    """Return the cells that may be the fastest at writing such text, and all speeds.

    Each at the steps that its text was written with. A cell is out when its interval ends below another's beginning.
    """
    speeds = {v.cell.name: s for v in found if (s := v.cell.speed_at(v.point.get("steps")))}
    cells = {v.cell.name: v.cell for v in found}
    order = sorted(speeds, key=lambda n: -speeds[n].value)

    def slower(name: str, other: str) -> bool:
        high, low = speeds[name].high, speeds[other].low
        return high is not None and low is not None and high < low

    return [cells[n] for n in order if not any(slower(n, other) for other in order)], speeds


def _speed_line(results: Results, chosen: Sequence[Cell]) -> str:
    steps = min((int(s) for c in chosen for s in c.speeds if s.isdigit()), default=None)
    if steps is None:
        return "Speed: not measured." if chosen else ""
    found = sorted((c for c in chosen if str(steps) in c.speeds), key=lambda c: -c.speeds[str(steps)].value)
    told = _listed([f"{c.name} {_rate(c.speeds[str(steps)], unit='')}" for c in found])
    line = f"Speed in {steps} steps, good text or not (tok/s, batch 1 [95 %]): {told}."
    if results.speed_contrasts:
        names = ("tie", "faster", "slower", "not resolved")
        counts = [f"{n} {v}" for v in names if (n := sum(c.verdict == v for c in results.speed_contrasts))]
        pairs = _count(len(results.speed_contrasts), "pair")
        line += f" {pairs} of rows that share a network, at all steps: {', '.join(counts)}."
    return line


def _reference_line(results: Results, references: Sequence[Cell], texts: dict[str, TextVerdict]) -> str:
    """Say what conversion gives up: the autoregressive rows."""
    if not references:
        return "Given up: unknown, no autoregressive row finished."
    told = []
    for cell in references:
        parts = [_rate(cell.speeds["ar"])] if "ar" in cell.speeds else []
        exact = cell.likelihood(EXACT)
        parts += [f"{_value(exact)} nats per token"] if exact else []
        if verdict := texts.get(cell.name):
            parts.append("text passes the checks" if verdict.passes else f"text: {verdict.fault or 'not judged'}")
        told.append(f"{cell.name} {', '.join(parts)}")
    return (
        f"Given up (token by token with a KV cache, likelihood exact, not to be set against bounds): {'; '.join(told)}."
    )


def _open_line(results: Results, cells: Sequence[Cell], chosen: Sequence[Cell]) -> str:
    """Say what could not be ranked, and what is missing."""
    told = [f"{r.row_id} failed ({r.error})" for r in results.cells if r.status == "failed"]
    told += [f"{c.name} was not trained" for c in cells if c.done and not c.trained and not c.causal]
    count = len(set(results.seeds))
    if not is_ranked(results.seeds):
        told.append(f"quality ({_seeds(count)}; a ranking takes {MIN_SEEDS_TO_RANK}: --seeds 0,1,2)")
    told += [f"quality of {c.label}" for c in chosen if is_ranked(results.seeds) and len(c.done) < MIN_SEEDS_TO_RANK]
    if any(c.latent for c in chosen) and any(c.kind for c in chosen):
        told.append("likelihood across rows with and without a bound")
    if len({c.kind for c in chosen} - {None}) > 1:
        told.append("NELBO against block NELBO")
    if any(c.kind for c in chosen) and any(c.causal for c in cells):
        told.append("bounds against exact likelihoods")
    judges = {p.get("judge") for c in cells for p in c.frontier}
    if any("self-judged" in str(j) for j in judges):
        told.append("text by judge perplexity (the judge is the base model)")
    if {c.clusters for c in cells if c.measured} == {1}:
        told.append("anything on other text: all held-out sequences are of one document, so nothing has an error")
    return f"Not ranked: {'; '.join(told)}." if told else ""


def _over_reference(results: Results, speed: Speed) -> str:
    """Return how many times the speed of the fastest autoregressive row that is, if it is known to be faster."""
    references = {c.name: c.speeds["ar"] for c in gather(results) if "ar" in c.speeds}
    if not references:
        return "with no autoregressive row to hold it against"
    name, other = max(references.items(), key=lambda item: item[1].value)
    if speed.low is None or other.high is None or speed.low <= other.high:
        return f"not shown to be faster than {name}"
    return f"{speed.value / other.value:.1f} times {name}"


def _rate(speed: Speed, unit: str = " tok/s") -> str:
    ends = "" if speed.low is None or speed.high is None else f" [{speed.low:,.0f}, {speed.high:,.0f}]"
    return f"{'' if speed.measured else 'about '}{speed.value:,.0f}{unit}{ends}"


def _value(found: Spread | None) -> str:
    if found is None:
        return "-"
    half = found.half_width()
    return f"{found.mean:.2f}" + ("" if half is None else f" ± {half:.2f}")


def _range(values: Sequence[float], spec: str) -> str:
    low, high = format(min(values), spec), format(max(values), spec)
    return low if low == high else f"{low} to {high}"


def _seeds(count: int) -> str:
    return _count(count, "seed")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
