"""What is kept of each finished row, in one small file, and the results.json that is made of it.

A row's weights are too large to come back from a borrowed machine; what the report needs of it is not. The file is
written anew after every row, so that a call that is cut off has lost one row at most, and a machine that starts from
nothing takes over what stands in it.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from params import GridSpec, RowSpec
    from steps.report.build import RowResult
    from steps.report.schema import Results

VERSION = 1
UNFINISHED = "not finished in the time that was given"
ROOTS = ("steps.train_cell", "steps.evaluate_cell", "steps.sweep_cell")
LIBRARIES = ("torch", "transformers", "safetensors")


def row_key(spec: GridSpec, row: RowSpec) -> str:
    """Return a hash of all that a row's numbers depend on: settings, source, versions of the libraries."""
    from dllm_core.methods.registry import room_options
    from steps.cache.key import key_of, material

    whole = spec.model_dump(mode="json", include={"model", "data", "budget", "anchors", "eval", "runtime"})
    options = room_options(row.cell.method).model_validate(row.cell.options).model_dump()
    named = [cell for cell in (*spec.cells, *spec.donors) if cell.name in options.values()]  # it starts from those
    fields = {**whole, "row": row.model_dump(mode="json", exclude={"row_id"}), "from": [c.model_dump() for c in named]}
    roots = [*ROOTS, f"dllm_core.methods.{row.cell.method}"]
    return key_of(material("convert", fields, {}, roots, LIBRARIES))


@dataclass
class KeptRows:
    """Finished rows on disk.

    Args:
        path: of the file.
        bench_key: what the speeds depend on beside the rows.
        about: what all rows share and the report names: model, data, hardware, versions, commit.
        rows: row id -> its key, that of its training in the step cache, what the report is told, its metrics.jsonl.
        bench: speed of the rows, as `steps.grid.benchmark` returns it; None before it was measured.
    """

    path: Path
    bench_key: str
    about: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    bench: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: Path, keys: Mapping[str, str], bench_key: str) -> KeptRows:
        """Read the file, leaving out rows that other settings or other code made.

        Rows go by their keys: in a grid of more seeds they have other names.

        Args:
            path: of the file; empty where there is none.
            keys: row id -> `row_key` of the rows that count.
            bench_key: hash of the settings of the benchmark.
        """
        kept = cls(path, bench_key)
        if not path.is_file():
            return kept
        told = json.loads(gzip.decompress(path.read_bytes()))
        if told.get("version") != VERSION:
            return kept
        names = {key: row_id for row_id, key in keys.items()}
        rows = {
            name: {**row, "result": {**row["result"], "row_id": name}}
            for row in told["rows"].values()
            if (name := names.get(row["key"])) is not None
        }
        same = set(rows) == set(told["rows"]) == set(keys) and told["bench_key"] == bench_key
        return replace(kept, about=told["about"], rows=rows, bench=told["bench"] if same else None)

    def put(self, key: str, training: str, result: RowResult) -> None:
        """Keep a finished row.

        Args:
            key: its `row_key`.
            training: key of its training in the step cache; "" for a row that does not train.
            result: what the report is told of it.
        """
        metrics = Path(result.metrics_path).read_text(encoding="utf-8") if result.metrics_path else ""
        told = asdict(replace(result, cell_dir=None, metrics_path=None))
        self.rows[result.row_id] = {"key": key, "training": training, "result": told, "metrics": metrics}
        self.write()

    def write(self) -> None:
        """Write the file, so that a reader sees the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = {name: getattr(self, name) for name in ("bench_key", "about", "rows", "bench")}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(gzip.compress(json.dumps({"version": VERSION, **told}).encode(), mtime=0))
        temporary.replace(self.path)

    def result(self, row_id: str) -> dict[str, Any]:
        """Return what the report is told of a kept row, as a dict."""
        told: dict[str, Any] = self.rows[row_id]["result"]
        return told

    def results(self, spec: GridSpec, run_id: str, command: str) -> Results:
        """Return the rows as the report's data; a row that is not there counts as failed, with the reason.

        Args:
            spec: the grid's settings.
            run_id: of the run.
            command: what was typed.
        """
        from steps.report.build import assemble

        with tempfile.TemporaryDirectory() as scratch:
            rows = [self._row(row, Path(scratch)) for row in spec.rows()]
            found = assemble(
                spec,
                rows,
                self.bench,
                run_id=run_id,
                model=self.about["model"],
                data=self.about["data"],
                command=command,
            )
        told = {name: self.about[name] for name in ("hardware", "versions")}
        if self.about.get("commit"):
            told |= {"git_commit": self.about["commit"], "git_dirty": self.about["dirty"]}
        return found.model_copy(update={**told, "ranked": found.ranked and all(r.status == "ok" for r in rows)})

    def _row(self, row: RowSpec, scratch: Path) -> RowResult:
        from steps.report.build import RowResult

        kept = self.rows.get(row.row_id)
        if kept is None:
            return RowResult(
                row.row_id, row.cell.name, row.cell.method, row.seed, "failed", trains(row), error=UNFINISHED
            )
        metrics = None
        if kept["metrics"]:
            metrics = scratch / f"{row.row_id}.jsonl"
            metrics.write_text(kept["metrics"], encoding="utf-8")
        return RowResult(**{**kept["result"], "metrics_path": str(metrics) if metrics else None})


def trains(row: RowSpec) -> bool:
    """Return whether a row trains at all."""
    from dllm_core.methods.registry import room_options

    return room_options(row.cell.method).model_validate(row.cell.options).capabilities().trains


def numbers(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's main numbers: what the suite's record and the short table show.

    Args:
        told: a `RowResult` as a dict.
    """
    evaluation, train = told["evaluation"] or {}, told["train"] or {}
    found: dict[str, Any] = {}
    for kind in ("exact", "nelbo", "block_nelbo"):
        measured = evaluation.get(f"{kind}_nats_per_token")
        if measured:
            found |= {"likelihood": kind, "nats_per_token": measured["value"], "se": measured["se"]}
            break
    frontier = evaluation.get("frontier") or []
    if frontier:
        names = ("temperature", "judge_ppl", "unigram_entropy_nats", "repetition_4")
        found |= {f"text_{name}": frontier[0][name] for name in names if frontier[0].get(name) is not None}
    if told["trained"]:
        found |= {"train_tokens_per_s": train["tokens_per_s"], "train_s": train["wall_s"]}
        found |= {"pflop": train["flops"] / 1e15, "peak_memory_gb": train["peak_memory_gb"]}
    return {name: value for name, value in found.items() if value is not None}


def outcome_table(results: Results) -> str:
    """Return one line a cell: likelihood and what it is, distance to `ar_tuned`, text, speed, cost."""
    from steps.report.cells import gather
    from steps.report.publish import HEADER, lines
    from steps.report.tables import markdown_table

    cells = gather(results)
    tuned = next((_nats(c) for c in cells if c.name == "ar_tuned"), None)
    header = [*HEADER[:2], "- ar_tuned", *HEADER[2:]]
    body = []
    for cell, line in zip(cells, lines(results), strict=True):
        own = _nats(cell)
        far = "-" if own is None or tuned is None else f"{own - tuned:+.2f}"
        body.append([*line[:2], far, *line[2:]])
    return markdown_table(header, body)


def _nats(cell: Any) -> float | None:
    found = cell.likelihood(cell.kind) if cell.kind else None
    return None if found is None else float(found.mean)


def samples(results: Results) -> Sequence[str]:
    """Return one piece of text of every cell, on a line of its own."""
    from steps.report.cells import gather

    found = []
    for cell in gather(results):
        written = [s for row in cell.measured if row.eval for s in row.eval.samples]
        for sample in written[:1]:
            prompt, text = (" ".join(sample[part].split()) for part in ("prompt", "continuation"))
            found.append(f"{cell.name} (T={sample.get('temperature')}): {prompt[-80:]} ⟶ {text[:240]}")
    return found
