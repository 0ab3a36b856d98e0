"""Rows as the flow hands them to the report, made up."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from steps.report import RowResult, build

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
    ctx = SimpleNamespace(run_id="run1", runs_dir=tmp_path / "runs")
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
