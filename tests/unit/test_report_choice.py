"""The report's first ten lines: which conversion to choose, and never a winner that the data do not support."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from steps.report.compare import concluded
from steps.report.markdown import render_markdown
from steps.report.notes import quality
from steps.report.schema import Results
from steps.report.summary import headline
from steps.report.texts import overlap_gain
from tests.report_rows import JUDGED, Made, made_up

SEEDS = (0, 1, 2)
AR = {"ar": Made(3.0, "exact", speed=30.0, trained=False), "ar_tuned": Made(2.8, "exact", speed=30.0)}
JITTER = ((0.0, 0.01, -0.01), (0.01, -0.01, 0.0), (-0.01, 0.0, 0.01))
RESOLVED = {
    "random_mask": Made(5.1, offsets=JITTER[0]),
    "repr_align_all": Made(5.4, offsets=JITTER[1], teacher=0.3),
    "repr_align_4": Made(5.6, offsets=JITTER[2], teacher=0.2),
}
TIED = {name: replace(cell, nats=5.3) for name, cell in RESOLVED.items()}
LATENT = {
    "ldlm": Made(None, speed=1700.0, text="bag", new_params=24_000_000, teacher=0.3),
    "vfm": Made(None, speed=800.0, new_params=9_000_000, teacher=0.2),
    "cola": Made(None, speed=400.0, new_params=18_000_000, first_token=0.125, teacher=0.3),
}


def line(results: Results, start: str) -> str:
    (found,) = [text for text in headline(results) if text.startswith(start)]
    return found


def test_one_seed_names_no_winner_by_likelihood() -> None:
    results = made_up(AR | RESOLVED)
    answer, likelihood = line(results, "Answer"), line(results, "Likelihood")
    assert "By likelihood none is ranked yet (1 seed of 3)." in answer
    assert "leads" not in answer
    assert "Not ranked: 1 seed. On this training run 3 of 3 differences are beyond evaluation error." in likelihood
    assert "ahead" not in likelihood
    assert "quality (1 seed; a ranking takes 3: --seeds 0,1,2)" in line(results, "Not ranked")


def test_rows_of_an_unranked_grid_stand_in_table_order() -> None:
    swapped = dict(reversed(RESOLVED.items()))
    told = line(made_up(AR | swapped), "Likelihood")
    assert told.index("repr_align_4 5") < told.index("repr_align_all 5") < told.index("random_mask 5")


def test_three_seeds_that_agree_name_the_winner_with_its_margin() -> None:
    results = made_up(AR | RESOLVED, SEEDS)
    assert "By likelihood random_mask leads the 3 rows with a NELBO." in line(results, "Answer")
    told = line(results, "Likelihood")
    margin = re.search(r"ahead of every other \(of repr_align_all by 0\.300 \[(\d\.\d+), (\d\.\d+)\]\)", told)
    assert margin is not None
    assert 0 < float(margin[1]) < 0.3 < float(margin[2])
    assert "not ranked" not in told.lower()


def test_three_seeds_that_tie_name_all_that_may_be_best() -> None:
    results = made_up(AR | TIED | {"late": Made(6.0, offsets=JITTER[0])}, SEEDS)
    assert "By likelihood " in line(results, "Answer")
    told = re.search(r"By likelihood (.*), which cannot be told apart", line(results, "Answer"))
    assert told is not None
    assert set(re.split(", | or ", told[1])) == set(TIED)
    assert "behind them: late" in line(results, "Likelihood")


def test_seeds_that_disagree_beat_a_clear_evaluation() -> None:
    """Paired on the text every seed's difference is clear, but the seeds contradict each other."""
    noisy = {"a": Made(5.0, offsets=(0.3, -0.3, 0.2)), "b": Made(5.1, offsets=(-0.3, 0.3, -0.2))}
    results = made_up(AR | noisy, SEEDS)
    assert all(c.resolved for c in results.comparisons if c.metric == "nelbo"), "each taken by itself"
    assert "By likelihood a or b, which cannot be told apart." in line(results, "Answer")


def test_a_winner_beats_every_other_row_itself() -> None:
    """That each of the others is beaten by one of them is not enough."""
    results = made_up(AR | RESOLVED, SEEDS)
    for contrast in results.contrasts:
        if set(contrast.cells) == {"random_mask", "repr_align_4"}:
            contrast.resolved = False
    assert "random_mask or repr_align_4, which cannot be told apart" in line(results, "Answer")
    assert "behind them: repr_align_all" in line(results, "Likelihood")


def test_a_failed_seed_keeps_its_cell_out_of_the_ranking_and_is_told() -> None:
    cells = AR | RESOLVED | {"random_mask": replace(RESOLVED["random_mask"], failed=(1,))}
    results = made_up(cells, SEEDS)
    assert "leads" not in line(results, "Answer")
    told = line(results, "Not ranked")
    assert "random_mask-seed1 failed (RuntimeError: boom)" in told
    assert "quality of random_mask (2 of 3 seeds)" in told
    assert "Not ranked" in line(results, "Likelihood")


def test_a_failed_cell_is_no_choice() -> None:
    results = made_up(AR | RESOLVED | {"random_mask": replace(RESOLVED["random_mask"], failed=SEEDS)}, SEEDS)
    assert "random_mask" not in line(results, "Answer")
    assert "By likelihood repr_align_all leads the 2 rows with a NELBO." in line(results, "Answer")
    assert "random_mask-seed0 failed" in line(results, "Not ranked")
    nothing = made_up({name: replace(cell, failed=(0,)) for name, cell in RESOLVED.items()})
    assert headline(nothing)[0] == "Answer: none. No converted row finished."
    assert len(headline(nothing)) == 3, "what is given up is unknown, and what failed"


def test_latent_rows_are_never_ranked_by_likelihood_nor_bounds_set_against_exact_values() -> None:
    results = made_up(AR | RESOLVED | LATENT, SEEDS)
    likelihood = line(results, "Likelihood")
    assert not any(name in likelihood for name in (*LATENT, "ar_tuned"))
    told = line(results, "Without a bound: ldlm, vfm, cola; against the other rows by text only")
    assert "vfm +10.0 ± " in told
    assert "follows its prompt, 60 at 3.8" in told
    assert "the rows with one: overlap +10.0, 60 at 3.8" in told
    unranked = line(results, "Not ranked")
    assert "likelihood across rows with and without a bound" in unranked
    assert "bounds against exact likelihoods" in unranked


def test_prompts_of_one_document_are_no_independent_evidence_that_text_follows_them() -> None:
    """8 prompts of 2 documents leave one degree of freedom: t = 12.7 for one interval, 38.2 for three."""
    results = made_up(AR | RESOLVED | LATENT)
    points = [p for row in results.cells if row.eval for p in row.eval.frontier]
    assert overlap_gain({**points[0], "by_seed": points[:1]}).half_width() == pytest.approx(0.01 * 2.3646, rel=1e-4)
    for point in points:
        point["num_documents"] = 2
    found = overlap_gain({**points[0], "by_seed": points[:1]})
    assert found.clusters == 2
    assert found.half_width() == pytest.approx(0.01 * 12.706, rel=1e-4)
    assert "not shown to follow its prompt" in line(results, "Without a bound")


def test_kinds_of_bounds_are_ranked_apart() -> None:
    blocks = {"block_causal": Made(4.9, "block_nelbo", offsets=JITTER[0])}
    results = made_up(AR | RESOLVED | blocks, SEEDS)
    assert "By likelihood random_mask leads the 3 rows with a NELBO." in line(results, "Answer")
    assert "block_causal" not in line(results, "Likelihood").split("By block NELBO")[0]
    assert "NELBO against block NELBO" in line(results, "Not ranked")
    assert "block_causal: seen in blocks of its own" in quality(results), "its masked accuracy is of another task"
    assert "blocks of its own" not in quality(made_up(AR | RESOLVED, SEEDS))


def test_latent_rows_alone() -> None:
    results = made_up(AR | LATENT, SEEDS)
    assert line(results, "Likelihood") == "Likelihood: no converted row has a likelihood bound."
    assert "likelihood" not in line(results, "Answer")
    assert "for speed with text that passes the checks, vfm (800 tok/s [" in line(results, "Answer")


@pytest.mark.parametrize("text", ["repeats", "dull", "bag"])
def test_speed_of_worthless_text_recommends_nothing(text: str) -> None:
    cells = {name: replace(cell, text=text) for name, cell in (RESOLVED | LATENT).items()}
    results = made_up(AR | cells, SEEDS)
    answer = line(results, "Answer")
    assert "no converted row writes text that passes the checks" in answer
    assert "; ar and ar_tuned do." in answer
    assert "for speed" not in answer
    told = line(results, "Text")
    assert "worth nothing yet at any temperature tried: random_mask (" in told
    assert all(name in told for name in cells)


def test_text_has_to_pass_in_every_seed() -> None:
    results = made_up(AR | {"vfm": LATENT["vfm"]}, SEEDS)
    assert "for speed" in line(results, "Answer")
    last = results.cells[-1].eval
    assert last is not None
    last.frontier[0]["repetition_4"] = 0.9
    assert "for speed" not in line(results, "Answer")
    assert "vfm (90 % repeated 4-grams in 1 of 3 seeds)" in line(results, "Text")


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"unigram_entropy_nats": 3.4, "unigram_entropy_se": 0.1}, ""),
        ({"unigram_entropy_nats": 3.1, "unigram_entropy_se": 0.1}, "vfm (entropy 3.1 ± 0.2, too near 3.0)"),
        ({"unigram_entropy_nats": 3.1}, ""),
        ({"unigram_entropy_nats": 2.9, "unigram_entropy_se": 0.0}, "vfm (entropy 2.9)"),
        ({"repetition_4": 0.3}, "vfm (30 % repeated 4-grams)"),
    ],
)
def test_text_passes_only_beyond_the_error_of_its_entropy(figures: dict[str, float], told: str) -> None:
    results = made_up(AR | {"vfm": LATENT["vfm"]})
    last = results.cells[-1].eval
    assert last is not None
    last.frontier[0] |= figures
    assert ("for speed" in line(results, "Answer")) == (not told)
    assert told in line(results, "Text")


def test_the_fastest_is_named_only_beyond_its_interval() -> None:
    apart = made_up(AR | {"a": Made(None, speed=100.0), "b": Made(None, speed=150.0)})
    assert "the one seed there is, b (150 tok/s" in line(apart, "Answer")
    assert "in 8 steps, 5.0 times ar)" in line(apart, "Answer")
    close = made_up(AR | {"a": Made(None, speed=100.0), "b": Made(None, speed=101.0)})
    assert "b or a (which cannot be told apart in speed)" in line(close, "Answer")
    slow = made_up(AR | {"a": Made(None, speed=30.0)})
    assert "not shown to be faster than ar" in line(slow, "Answer")


def test_a_judge_that_cannot_tell_is_not_believed_and_that_is_said() -> None:
    """As in `smoke`, whose base model has seen a hundred steps."""
    blind = JUDGED | {"shuffled_judge_ppl": 25.0}
    results = made_up(AR | {"ldlm": replace(LATENT["ldlm"], text="bag")}, reference_text=blind)
    assert "cannot be judged, the judge hardly tells held-out text from shuffled tokens: ldlm" in line(results, "Text")
    assert "text cannot be judged here" in line(results, "Answer")
    assert "text: not judged" in line(results, "Given up")
    sighted = made_up(AR | {"ldlm": replace(LATENT["ldlm"], text="bag")})
    assert "judge ppl 1,100, 1,200 with its tokens shuffled" in line(sighted, "Text")


def test_a_winner_among_rows_worse_than_unigram_is_no_choice() -> None:
    worse = {name: replace(cell, nats=cell.nats + 2) for name, cell in RESOLVED.items() if cell.nats}
    results = made_up(AR | worse, SEEDS)
    assert "By likelihood none is better than a unigram model." in line(results, "Answer")
    assert "not better than that: random_mask, repr_align_all, repr_align_4" in line(results, "Likelihood")


def test_one_document_ranks_nothing_however_many_seeds() -> None:
    results = made_up(AR | RESOLVED, SEEDS)
    results.comparisons.clear()
    for row in results.cells:
        if row.eval:
            row.eval.num_documents = 1
    lone = concluded(results)
    assert "By likelihood none is ranked yet." in line(lone, "Answer")
    assert "No differences between rows could be measured" in line(lone, "Likelihood")
    assert "all held-out sequences are of one document" in line(lone, "Not ranked")


def test_an_untrained_row_is_no_choice() -> None:
    results = made_up(AR | RESOLVED | {"ldlm": Made(None, speed=None, trained=False)}, SEEDS)
    assert "ldlm was not trained" in line(results, "Not ranked")
    assert not any("ldlm" in text for text in headline(results) if not text.startswith("Not ranked"))


def test_costs_name_the_least_the_most_and_who_left_the_budget() -> None:
    results = made_up(AR | RESOLVED | LATENT, SEEDS)
    told = line(results, "Cost")
    assert "new parameters none (random_mask, repr_align_all, repr_align_4), 9.0 M (vfm), 18.0 M (cola)" in told
    assert "teacher none (random_mask), 20 % of FLOPs (repr_align_4, vfm), 30 % of FLOPs" in told
    assert "budget of each 1 TFLOP" in told
    assert "The cheapest recipe is random_mask: no new parameters, no teacher." in line(results, "Answer")
    for row in results.cells:
        if row.name == "repr_align_4" and row.cost:
            row.cost.flops = 1.8e12
    assert "beyond the budget of 1 TFLOP: repr_align_4 1.8 TFLOP" in line(results, "Cost")


def test_what_conversion_gives_up_is_told() -> None:
    told = line(made_up(AR | RESOLVED, SEEDS), "Given up")
    assert "ar 30 tok/s [" in told
    assert "3.00 ± 0.33 nats per token, text passes the checks; ar_tuned 30 tok/s" in told
    assert line(made_up(RESOLVED), "Given up") == "Given up: unknown, no autoregressive row finished."


@pytest.mark.parametrize("seeds", [(0,), SEEDS])
@pytest.mark.parametrize("cells", [AR | RESOLVED | LATENT, LATENT, AR, RESOLVED, AR | TIED | LATENT])
def test_the_first_ten_lines_of_the_report_are_the_answer(cells: dict[str, Any], seeds: tuple[int, ...]) -> None:
    results = made_up(cells, seeds)
    lines = headline(results)
    text = render_markdown(results, lines, [])
    first = text.splitlines()[:10]
    assert len(lines) <= 8
    assert first[0].startswith("# Which conversion for 1 TFLOP a row?")
    assert [f"- {line}" for line in lines] == first[2 : 2 + len(lines)]
    assert max(map(len, lines)) < 700
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text)


def test_lines_name_cells_and_not_every_seed() -> None:
    text = render_markdown(results := made_up(AR | RESOLVED | LATENT, SEEDS), headline(results), [])
    assert "-seed" not in text
    for title in ("Quality on held-out text", "Generated text", "Speed", "Cost"):
        table = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert sum(row.startswith("| random_mask ") for row in table.splitlines()) == 1, title
