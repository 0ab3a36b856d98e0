"""Training speed: the plain transformers loop with and without a live teacher, and ours, taking turns in one process.

    python benchmarks/train.py                                   # embedded SmolLM2, 8 x 64 tokens, bf16
    python benchmarks/train.py --batch-size 4 --length 160 --rounds 24
    python benchmarks/train.py --freeze                          # also what the freezing rules save

Every round times one optimiser step of each row on the same batch and masks; rows are compared by paired ratios.
Tokens are positions forwarded. Our two rows share one network and one optimiser, and so do the plain ones.
Needs torch, transformers, safetensors, pydantic and this library (and gguf for the embedded model).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report
from benchmarks.plain_training import PlainLoop
from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.masks import uniform_masks
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.anchor_extraction import extract
from dllm_core.data.anchors import AnchorStore
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DllmError
from dllm_core.evals import throughput
from dllm_core.methods.protocol import GenerationOutput, Method, Resources
from dllm_core.methods.registry import room_method, room_options
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings

Step = Callable[[int], GenerationOutput]
PAIRS = (
    ("ours_repr_align_all", "plain"),
    ("ours_repr_align_all", "plain_live_teacher"),
    ("ours_repr_align_all_with_extraction", "plain"),
    ("ours_repr_align_all_with_extraction", "plain_live_teacher"),
    ("ours_random_mask", "plain"),
    ("plain_live_teacher", "plain"),
)
FREEZE: dict[str, tuple[str, ...]] = {"embeddings": ("embeddings",), "mlp": ("mlp",), "both": ("embeddings", "mlp")}
ALIGNED = {"layers": "all", "weight": 10.0}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="converted or plain model")
    parser.add_argument("--workdir", type=Path, default=_report.ROOT / "runs" / "benchmarks", help="for conversions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of our rows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, help="sequences of a forward; default: the whole batch")
    parser.add_argument("--sequences", type=int, help="distinct ones; default: a batch of new ones every round")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1, help="tokens of a sequence that are never masked")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--freeze", action="store_true", help="also time training with frozen parts")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train-<device>.json")
    return parser.parse_args(argv)


class Bench:
    """What all rows share: checkpoint, sequences, masks.

    Args:
        args: of the command line.
        directory: a converted checkpoint.
        scratch: directory for anchors.
    """

    def __init__(self, args: argparse.Namespace, directory: Path, scratch: Path) -> None:
        self.args, self.directory, self.scratch = args, directory, scratch
        self.noise = NoiseSource(args.seed)
        self.data = self._sequences(self.num_tokens())
        self.order = SampleOrder(len(self.data), args.seed)
        self.tokens = args.batch_size * args.length
        self.metrics: dict[str, list[dict[str, Any]]] = {}

    def num_tokens(self) -> int:
        """Return the model's real tokens."""
        return self.backbone().contract.num_tokens

    def backbone(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Backbone:
        """Return the model, loaded anew."""
        return Backbone.from_pretrained(self.directory, dtype=dtype, device=device)

    def _sequences(self, vocab: int) -> SequenceSet:
        """Return random real tokens: speed does not depend on them."""
        args = self.args
        num = args.sequences or args.batch_size * (args.rounds + args.warmup)
        generator = torch.Generator().manual_seed(args.seed)
        ids_NL = torch.randint(vocab, (num, args.length), generator=generator, dtype=torch.int32)
        position_NL = torch.arange(args.length, dtype=torch.int32).repeat(num, 1)
        return SequenceSet(
            input_ids_NL=ids_NL,
            response_NL=position_NL >= args.prompt_tokens,
            document_NL=torch.zeros_like(ids_NL),
            position_NL=position_NL,
            num_bytes_N=torch.full((num,), 4 * (args.length - args.prompt_tokens)),
            num_tokens=vocab,
        )

    def done(self) -> GenerationOutput:
        """Return what the timer counts: the positions of a step."""
        return GenerationOutput([], [self.tokens], 1, 0.0)

    def extract(self, layers: Sequence[str]) -> tuple[AnchorStore, float]:
        """Fill an anchor store; return it and the median seconds a sequence costs."""
        dtype = torch.bfloat16 if self.args.dtype == "bf16" else torch.float32
        backbone = self.backbone(dtype, self.args.device)
        store = AnchorStore(self.scratch / "anchors", "benchmark", "bf16")
        size, seconds = max(1, 2048 // self.args.length), []
        for start in range(0, len(self.data), size):
            batch = self.data.batch_of(range(start, min(start + size, len(self.data))))
            started = time.perf_counter()
            extract(backbone, [batch], store, layers, positions="response_predictors")
            seconds.append((time.perf_counter() - started) / len(batch))
        return store, sorted(seconds)[len(seconds) // 2]

    def trainer(self, method: Method, anchors: AnchorStore | None, freeze: tuple[str, ...] = ()) -> Trainer:
        """Return our trainer for a method."""
        args = self.args
        settings = TrainSettings(
            steps=10_000, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size, dtype=args.dtype,
            freeze=freeze, seed=args.seed, checkpoint_every_s=None, weight_decay=0.01,
        )  # fmt: skip
        trainer = Trainer(
            method,
            self.data,
            self.order,
            settings,
            Resources(anchors=anchors),
            self.noise,
            self.scratch,
            peak_flops=1.0,
        )
        trainer.begin()
        method.train()
        return trainer

    def method(self, room: str, backbone: Backbone | None = None, **options: Any) -> Method:
        """Return a room's method on the checkpoint, or on a backbone that is there."""
        backbone = backbone or self.backbone(device=self.args.device)
        return room_method(room)(backbone, room_options(room)(**options))

    def ours(self, trainer: Trainer, name: str, method: Method) -> Step:
        """Return steps of a method under a trainer, whose metrics are kept under a name."""

        def step(index: int) -> GenerationOutput:
            trainer.method = method
            self.metrics.setdefault(name, []).append(trainer.step(index + self.args.warmup))
            return self.done()

        return step

    def our_rows(self) -> tuple[dict[str, Step], float]:
        """Return training without and with alignment, and the seconds that a sequence's anchors cost."""
        aligned = self.method("repr_align", **ALIGNED)
        need = aligned.options.requirements(aligned.backbone.num_layers).anchors
        assert need is not None
        store, seconds = self.extract(need.layers)
        trainer = self.trainer(aligned, store)
        methods = {
            "ours_random_mask": self.method("random_mask", aligned.backbone).train(),
            "ours_repr_align_all": aligned,
        }
        return {name: self.ours(trainer, name, method) for name, method in methods.items()}, seconds

    def comparison(self) -> tuple[dict[str, Step], float]:
        """Return the rows of the main comparison and the seconds that a sequence's anchors cost."""
        args = self.args
        ours, seconds = self.our_rows()
        plain = PlainLoop(self.directory, args.device)

        def theirs(live_teacher: bool) -> Step:
            def step(index: int) -> GenerationOutput:
                first = (index + args.warmup) * args.batch_size
                batch = self.data.batch([self.order[i] for i in range(first, first + args.batch_size)])
                plain.step(batch.input_ids_BL, uniform_masks(batch, self.noise), live_teacher=live_teacher)
                return self.done()

            return step

        return {"plain": theirs(False), "plain_live_teacher": theirs(True), **ours}, seconds

    def frozen(self, rule: str) -> dict[str, Step]:
        """Return training of everything and training under one freezing rule."""

        def row(freeze: tuple[str, ...]) -> Step:
            trainer = self.trainer(self.method("random_mask"), None, freeze)

            def step(index: int) -> GenerationOutput:
                trainer.step(index + self.args.warmup)
                return self.done()

            return step

        return {"all": row(()), f"frozen_{rule}": row(FREEZE[rule])}


def run(bench: Bench, rows: dict[str, Step], label: str) -> dict[str, list[throughput.Timing]]:
    """Time rows in turns."""
    return throughput.interleave(
        {label: rows},
        rounds={label: bench.args.rounds},
        warmup_rounds=bench.args.warmup,
        on_round=lambda done, total: print(f"  {label}: round {done} of {total}", file=sys.stderr, flush=True),
    )[label]


def speeds(timings: dict[str, list[throughput.Timing]]) -> dict[str, Any]:
    """Return tokens/s and every round behind it."""
    summaries = {name: throughput.summary(values) for name, values in timings.items()}
    return {name: {"tokens_per_s": s["tokens_per_s"], "step_s": s["sequence_s"]} for name, s in summaries.items()}


def measure(bench: Bench) -> dict[str, Any]:
    """Run the main comparison, then the freezing rules."""
    rows, per_sequence = bench.comparison()
    timings = run(bench, rows, "main")
    extra = per_sequence * bench.args.batch_size
    timings["ours_repr_align_all_with_extraction"] = [
        throughput.Timing(t.seconds + extra, t.tokens, 1, 0.0, 1) for t in timings["ours_repr_align_all"]
    ]
    found: dict[str, Any] = {
        "rows": speeds(timings),
        "ratios": throughput.compare(timings, PAIRS),
        "extraction_s_per_sequence": per_sequence,
        "extraction_charged": "every sequence extracted for this row and presented once",
        "freezing": [],
    }
    rows.clear()
    gc.collect()
    for rule in FREEZE if bench.args.freeze else ():
        pair = run(bench, bench.frozen(rule), f"freeze {rule}")
        ratios = throughput.compare(pair, [(f"frozen_{rule}", "all")])
        found["freezing"].append({"rule": rule, "rows": speeds(pair), "ratios": ratios})
        gc.collect()
    return found


def table(found: dict[str, Any]) -> str:
    """Return the results as text."""
    lines = [f"{'row':<38} {'tok/s':>8}"]
    lines += [f"{name:<38} {row['tokens_per_s']['median']:>8.1f}" for name, row in found["rows"].items()]
    for ratio in [*found["ratios"], *(r for f in found["freezing"] for r in f["ratios"])]:
        low, high = ratio["ci95"]
        interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
        lines.append(f"{ratio['rows'][0]} / {ratio['rows'][1]}: {ratio['ratio']:.2f}{interval}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    from benchmarks.decode import converted

    try:
        directory, _ = converted(args.model, args.workdir, args.seed)
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(Bench(args, directory, Path(scratch)))
    except DllmError as error:
        print(error, file=sys.stderr)
        return 2
    settings = {k: v for k, v in vars(args).items() if k not in ("workdir", "out", "model")}
    settings["model"] = args.model if not Path(args.model).is_dir() else Path(args.model).name
    record = _report.header("train", args.seed, settings)
    record["cpu" if args.device == "cpu" else "gpu"] = found
    record.setdefault("cpu", _report.NOT_MEASURED)
    record.setdefault("gpu", _report.NOT_MEASURED)
    print(table(found))
    print(json.dumps({"written": str(_report.write(record, args.out))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
