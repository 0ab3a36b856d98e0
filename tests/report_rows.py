"""Rows as the flow hands them to the report, made up."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from steps.context import Context
from steps.report import RowResult, build
from steps.report.build import assemble
from steps.report.schema import Results

REFERENCE = {"judge_ppl": 16.0, "unigram_entropy_nats": 5.8}


def evaluation(nats: float, *, kind: str = "nelbo", shift: float = 0.0) -> dict[str, Any]:
    rng = random.Random(0)
    values = [nats * 10 + rng.gauss(0, 3) for _ in range(16)]
    return {
        f"{kind}_nats_per_token": {"value": nats, "se": 0.02},
        "bits_per_byte": 1.5,
        "unigram_nats_per_token": 6.8,
        "masked_accuracy": {"0.15": {"value": 0.4, "se": 0.01}},
        "masked_nll": {"0.15": {"value": 3.0, "se": 0.1}, "0.5": {"value": 4.0, "se": 0.1}},
        "frontier": [
            {
                "temperature": 0.7,
                "judge_ppl": 30.0,
                "judge": "base (self-judged)",
                "unigram_entropy_nats": 5.0,
                "steps": 8,
            },
            {
                "temperature": 1.0,
                "judge_ppl": 60.0,
                "judge": "base (self-judged)",
                "unigram_entropy_nats": 5.5,
                "steps": 8,
            },
        ],
        "samples": [{"prompt": "My fellow", "continuation": " citizens", "temperature": 0.7, "steps": 8}],
        "history": {"tokens": [" a", " b", "\n"], "commit_step": [1, 2, 2]},
        "prediction_strip": {"tokens": ["x", "y"], "state": ["given", "wrong"], "mask_ratio": 0.5},
        "per_sequence": {kind: {"nats": [v + shift for v in values], "tokens": [10] * 16}},
        "reference_text": REFERENCE,
    }


def training_summary() -> dict[str, Any]:
    return {
        "steps": 10,
        "final_loss": 5.0,
        "tokens_per_s": 200.0,
        "response_tokens": 5120,
        "positions": 6400,
        "flops": 1e12,
        "teacher_flops": 1e11,
        "extraction_s": 3.0,
        "wall_s": 20.0,
        "peak_memory_gb": 2.0,
        "trainable_params": 1000,
        "new_params": 64,
    }


def write_report(tmp_path: Path, extra: Sequence[RowResult] = ()) -> Any:
    """Write a report of three finished rows and a failed one, then `extra`; return its artifact."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "train/loss": 9.0 - 0.1 * i, "train/ce_nats": 8.0 - 0.1 * i} for i in range(10)]
    metrics.write_text("\n".join(json.dumps(line) for line in lines))

    def row(name: str, method: str, nats: float, **more: Any) -> RowResult:
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "cell.json").write_text("{}")
        return RowResult(
            row_id=name,
            name=name,
            method=method,
            seed=0,
            status="ok",
            trained=True,
            metrics_path=str(metrics),
            cell_dir=str(tmp_path / "cache" / name),
            train=training_summary(),
            evaluation=evaluation(nats, **more),
        )

    rows = [
        row("random_mask", "random_mask", 5.5),
        row("repr_align_all", "repr_align", 5.45, shift=-0.5),
        row("ar_tuned", "ar", 2.7, kind="exact"),
        RowResult("repr_align_4", "repr_align_4", "repr_align", 0, "failed", False, error="RuntimeError: boom"),
        *extra,
    ]
    speeds = {"8": {"tokens_per_s": {"median": 100.0, "ci95": [99.0, 101.0]}, "first_token_s": 0.2}}
    bench = {
        "rows": {
            "random_mask": {"steps": speeds},
            "repr_align_all": {"steps": speeds},
            "ar_tuned": {"steps": {"ar": speeds["8"]}},
            **{row.row_id: {"steps": speeds} for row in extra},
        },
        "ties": [
            {
                "rows": ["random_mask", "repr_align_all"],
                "steps": "8",
                "ratio": 1.0,
                "ci95": [0.99, 1.01],
                "verdict": "tie",
            }
        ],
    }
    spec = SimpleNamespace(
        preset="test",
        seeds=(0,),
        budget=SimpleNamespace(model_dump=lambda: {"kind": "tokens", "value": 5120}),
        train=SimpleNamespace(steps=None),
    )
    ctx = Context("run1", tmp_path / "runs")
    return build(
        spec,
        rows,
        bench,
        ctx,
        model={"source": "x"},
        data={"source": "y", "unigram_nats_per_token": 6.8},
        command="run",
        hardware={"device": "cpu", "cpu": "test"},
    )


@dataclass(frozen=True)
class Made:
    """A cell of a made-up grid.

    Attributes:
        nats: likelihood by seed offset; None: a latent cell.
        kind: of the likelihood.
        offsets: added to `nats`, one a seed.
        text: `good`, `repeats`, `dull`, `bag` (no better than its tokens shuffled), or None: no text.
        speed: tokens per second in 8 steps (16 take twice as long); None: not timed.
        first_token: part of a decode's time after which the first token is there.
        new_params: parameters that it adds.
        teacher: teacher's part of the FLOPs.
        failed: seeds that failed.
        trained: False: weights as they came.
    """

    nats: float | None
    kind: str = "nelbo"
    offsets: tuple[float, ...] = (0.0, 0.0, 0.0)
    text: str | None = "good"
    speed: float | None = 100.0
    first_token: float = 1.0
    new_params: int = 0
    teacher: float = 0.0
    failed: tuple[int, ...] = ()
    trained: bool = True


JUDGED = {"judge_ppl": 20.0, "shuffled_judge_ppl": 1400.0, "unigram_entropy_nats": 4.0, "repetition_4": 0.01}
TEXTS = {
    "good": {"judge_ppl": 60.0, "shuffled_judge_ppl": 1500.0, "unigram_entropy_nats": 3.8, "repetition_4": 0.05},
    "repeats": {"judge_ppl": 4.0, "shuffled_judge_ppl": 8.0, "unigram_entropy_nats": 3.0, "repetition_4": 0.8},
    "dull": {"judge_ppl": 4.0, "shuffled_judge_ppl": 8.0, "unigram_entropy_nats": 1.0, "repetition_4": 0.2},
    "bag": {"judge_ppl": 1100.0, "shuffled_judge_ppl": 1200.0, "unigram_entropy_nats": 3.9, "repetition_4": 0.0},
}
DOCUMENTS, TOKENS, ROUNDS = 12, 100, 16


def made_up(cells: dict[str, Made], seeds: Sequence[int] = (0,), **data: Any) -> Results:
    """Return the results of a made-up grid, assembled as the flow would."""
    rows = [
        _made_row(name, cell, seed, index, name if len(seeds) == 1 else f"{name}-seed{seed}")
        for name, cell in cells.items()
        for index, seed in enumerate(seeds)
    ]
    timed = {}
    for row in rows:
        if row.status == "ok" and cells[row.name].speed and row.name not in {r.name for r in rows if r.row_id in timed}:
            timed[row.row_id] = {"steps": _timings(cells[row.name]), "peak_memory_gb": 0.3}
    shared = [r.row_id for r in rows if r.row_id in timed and cells[r.name].kind == "nelbo" and cells[r.name].nats]
    ties = [
        {"rows": [a, b], "steps": "8", "ratio": 1.0, "ci95": [0.99, 1.01], "verdict": "tie"}
        for a, b in combinations(shared, 2)
    ]
    spec = SimpleNamespace(
        preset="made",
        seeds=tuple(seeds),
        budget=SimpleNamespace(model_dump=lambda: {"kind": "flops", "value": 1e12}),
        train=SimpleNamespace(steps=None),
    )
    told = {"source": "y", "reference_text": JUDGED, **data}
    found = assemble(
        spec, rows, {"rows": timed, "ties": ties}, run_id="run1", model={"source": "x"}, data=told, command="run"
    )
    return found.model_copy(update={"hardware": {"cpu": "test", "cores": 2}, "git_commit": "a" * 40})


def _made_row(name: str, cell: Made, seed: int, index: int, row_id: str) -> RowResult:
    method = "ar" if cell.kind == "exact" else name
    if seed in cell.failed:
        return RowResult(row_id, name, method, seed, "failed", cell.trained, error="RuntimeError: boom")
    summary = training_summary() | {"new_params": cell.new_params, "teacher_flops": cell.teacher * 1e12}
    return RowResult(
        row_id, name, method, seed, "ok", cell.trained, train=summary, evaluation=_made_evaluation(name, cell, index)
    )


def _made_evaluation(name: str, cell: Made, index: int) -> dict[str, Any]:
    found: dict[str, Any] = {"unigram_nats_per_token": 6.8, "num_documents": DOCUMENTS, "num_sequences": DOCUMENTS}
    if cell.nats is not None:
        common, own = random.Random(0), random.Random(f"{name} {index}")
        value = cell.nats + cell.offsets[index]
        hard, noise = [[r.gauss(0, sd) for _ in range(DOCUMENTS)] for r, sd in ((common, 0.5), (own, 0.02))]
        centred = [h + n - (sum(hard) + sum(noise)) / DOCUMENTS for h, n in zip(hard, noise, strict=True)]
        found[f"{cell.kind}_nats_per_token"] = {"value": value, "se": 0.15}
        nats = [TOKENS * (value + c) for c in centred]
        found["per_sequence"] = {
            cell.kind: {"nats": nats, "tokens": [TOKENS] * DOCUMENTS, "groups": list(range(DOCUMENTS))}
        }
    if cell.text is not None:
        gain = {"overlap_1": 0.3, "overlap_1_other": 0.2, "overlap_1_gain": {"value": 0.1, "se": 0.01}}
        more = {"temperature": 0.7, "judge": "base (self-judged)", "steps": 8, "num_samples": 8, **gain}
        found["frontier"] = [TEXTS[cell.text] | more]
    return found


def _timings(cell: Made) -> dict[str, Any]:
    assert cell.speed is not None
    groups = {"ar": cell.speed} if cell.kind == "exact" else {"8": cell.speed, "16": cell.speed / 2}
    return {group: timing(speed, group, cell.first_token) for group, speed in groups.items()}


def timing(speed: float, group: str, first_token: float = 1.0) -> dict[str, Any]:
    """Return the benchmark's figures of 128 tokens at this speed, with a little noise common to all rows."""
    generator = random.Random(7)
    noise = [generator.uniform(0.98, 1.02) for _ in range(ROUNDS)]
    rounds = [speed * n / median(noise) for n in noise]
    forwards = 128 if group == "ar" else int(group)
    return {
        "tokens_per_s": {"median": median(rounds), "ci95": [min(rounds), max(rounds)]},
        "first_token_s": first_token * 128 / speed,
        "num_forwards": forwards,
        "tokens_per_forward": 128 / forwards,
        "rounds": rounds,
    }
