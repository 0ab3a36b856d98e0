"""A plan as text, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from dllm_core.backbone.contract import Contract
from params.schema import GridSpec
from steps.estimates import MemoryEstimate
from steps.plan import Plan
from steps.plan_rows import PlannedRow
from steps.progress import duration
from steps.row_costs import base_shape, own_network
from steps.shared_costs import AnchorCost

_ALIGNMENT = {
    "shifted": "the hidden state at i-1 predicts token i, as in the autoregressive model",
    "same_position": "the hidden state at i predicts token i",
}


class _Dumper(yaml.SafeDumper):
    """YAML with short lists on one line and floats that stay floats."""


def _sequence(dumper: yaml.SafeDumper, values: Any) -> yaml.Node:
    plain = all(not isinstance(v, dict | list) for v in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(tuple, _sequence)


def render(plan: Plan) -> str:
    """Return settings, contracts, rows, shared work and estimates, ending in a newline."""
    spec = plan.spec
    parts = [
        f"Plan of preset '{spec.preset}': {spec.description}",
        _section("Settings (as a preset file: saved, it gives this grid again)", settings_yaml(plan)),
        _section("Contracts (written into every checkpoint, checked at load)", _contracts(plan)),
        _section("Rows", _rows(plan)),
        *([_section("Networks of their own", networks)] if (networks := _networks(plan)) else []),
        _section("Prepared once for all rows", _shared(plan)),
        _section(f"Estimates for {plan.machine.name}", _estimates(plan)),
    ]
    if plan.warning:
        parts.append(_section("Here the run may stop", plan.warning))
    if plan.obstacles:
        lines = [f"{o.problem}\n  {o.remedy}" for o in plan.obstacles]
        parts.append(_section("Here the run would stop", "\n".join(lines)))
    return "\n\n".join(parts) + "\n"


def settings_yaml(plan: Plan) -> str:
    """Return the resolved settings in the form of a preset file, all defaults and room options written out."""
    tree = plan.spec.model_dump(mode="json", exclude={"preset", "cells", "donors"})
    cells: dict[str, Any] = {}
    for row in plan.rows:
        cell = plan.spec.cell(row.cell)
        cells[row.cell] = {"options": row.options.model_dump(mode="json")}
        if cell.train:
            cells[row.cell]["train"] = cell.train
    ordered: dict[str, Any] = {}
    for key, value in tree.items():
        ordered[key] = value
        if key == "seeds":
            ordered["cells"] = cells
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True).rstrip()


def _section(title: str, body: str) -> str:
    return title + "\n" + "\n".join(f"  {line}" if line else "" for line in body.splitlines())


def _contracts(plan: Plan) -> str:
    alignment = plan.spec.model.alignment
    vocab = plan.model.shape.vocab
    defaults = Contract(alignment=alignment, mask_token_id=vocab, num_tokens=vocab)
    table = [
        ("alignment", f"{alignment}: {_ALIGNMENT[alignment]}"),
        ("mask token", "a new row after the tokenizer's last id (mean of the embeddings + 2 % noise); logit -inf"),
        ("vocabulary", f"{vocab:,} rows, padded to a multiple of 64; padding rows have logit -inf"),
        ("weighting", f"{defaults.weighting}: mean cross-entropy over the masked tokens of a sequence"),
        ("normaliser", f"{defaults.normaliser}: then the mean over the sequences of the global batch"),
        ("block size", "none: whole responses are denoised; block-trained rows state theirs in their options"),
        ("prompts", f"{_prompt(plan.spec)}never corrupted, never scored; first tokens of documents neither"),
    ]
    return _table(table)


def _prompt(spec: GridSpec) -> str:
    return f"{spec.data.prompt_tokens} tokens, " if spec.data.layout == "windows" else ""


def _rows(plan: Plan) -> str:
    header = ("row", "method", "trained", "steps", "train", "evaluate", "benchmark", "needs")
    table = [header]
    for row in plan.rows:
        cost = plan.cost.rows[row.row_id]
        table.append(
            (
                row.row_id,
                row.method,
                _trained(plan, row),
                f"{cost.steps:,}" if cost.steps else "-",
                duration(cost.train_s) if cost.steps else "-",
                duration(cost.evaluate_s),
                duration(cost.benchmark_s),
                "; ".join(_needs(row)) or "-",
            )
        )
    return _table(table)


def _trained(plan: Plan, row: PlannedRow) -> str:
    """Return how many parameters a row trains."""
    shape = plan.model.shape
    network = own_network(plan.spec, row, shape)
    if not row.trains:
        return "-"
    if network is not None:
        return f"{network.num_trainable:,}"
    less = " less the frozen" if row.train.freeze else ""
    return f"{base_shape(plan.spec, shape).parameters:,}{less}"


def _networks(plan: Plan) -> str:
    """Return a table of parameters per module for rooms with networks of their own; seeds have the same."""
    table = [("cell", "module", "parameters", "")]
    done = set()
    for row in plan.rows:
        network = own_network(plan.spec, row, plan.model.shape)
        if network is None or row.cell in done:
            continue
        done.add(row.cell)
        memory = plan.cost.memories[row.row_id]
        table += [(row.cell, module, f"{count:,}", "") for module, count in network.trainable.items()]
        held = f"{_bytes(memory.weights)} with gradients and Adam ({memory.per_parameter} bytes each)"
        table.append((row.cell, "all trained", f"{network.num_trainable:,}", held))
        table.append((row.cell, "frozen", f"{network.frozen:,}", "kept in memory, included"))
        if network.snapshot:
            table.append((row.cell, "snapshot", f"{network.snapshot:,}", "a copy kept while training, included"))
        flops = f"{network.flops_per_response_token:.2e} FLOPs of training a response token"
        table.append((row.cell, "work", "", flops))
    return _table(table) if done else ""


def _needs(row: PlannedRow) -> list[str]:
    needs, words = row.requirements, []
    if needs.anchors:
        count = len(needs.anchors.layers)
        whose = f" of {needs.anchors.cell} once trained" if needs.anchors.cell else ""
        words.append(f"anchors of {count} layer{'s' if count > 1 else ''}{whose}")
    if needs.prefix:
        words.append(f"first {needs.prefix.share:.0%} of {needs.prefix.cell}")
    if needs.trajectories:
        words.append(f"{needs.trajectories.mode} commit orders of {needs.trajectories.responses} responses")
    return words


def _layers(layers: tuple[str, ...]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {', '.join(layers)}" if len(layers) <= 8 else f"{len(layers)} layers ({layers[0]} to {layers[-1]})"


def _shared(plan: Plan) -> str:
    table = [("work", "time", "what")]
    details = {
        "prepare model": f"{plan.model.source}: {plan.model.found}",
        "prepare data": f"{plan.data.source}: {_data(plan)}",
    }
    of_base = [a for a in plan.cost.anchors if a.need.cell is None]
    of_cells = [a for a in plan.cost.anchors if a.need.cell is not None]
    if plan.cost.anchors:
        of_disk = f"{plan.spec.anchors.dtype}, {_bytes(plan.cost.disk['anchors'])} in all"
        if of_base:
            details["cache anchors"] = f"teacher states, {of_disk}"
        if plan.shared.built_upon:
            details["train cells to build on"] = ", ".join(row.cell for row in plan.shared.built_upon)
        if of_cells:
            details["cache trained states"] = f"states of cells, once they are trained, {plan.spec.anchors.dtype}"
    if plan.shared.prefixes:
        details["train shared prefixes"] = ", ".join(
            dict.fromkeys(f"first {p.share:.0%} of {p.cell}" for _, p in plan.shared.prefixes)
        )
    if plan.shared.trajectories:
        details["extract trajectories"] = ", ".join(
            dict.fromkeys(
                f"{t.mode}, {t.responses} responses, {t.commit_steps or plan.spec.data.response_tokens} forwards each"
                for _, t in plan.shared.trajectories
            )
        )
    for name, what in details.items():
        seconds = plan.cost.shared_s.get(name)
        table.append((name, duration(seconds) if seconds is not None else "(in its row)", what))
        read = {"cache anchors": of_base, "cache trained states": of_cells}.get(name, [])
        table += [("", "", _anchors(anchor)) for anchor in read]
    return _table(table)


_POSITIONS = {
    "all": "every position",
    "response": "rows of response tokens",
    "response_predictors": "rows that predict response tokens",
}


def _anchors(cost: AnchorCost) -> str:
    """Return one distinct need of teacher states in words."""
    heldout = f" and {cost.heldout:,} held-out" if cost.heldout else ""
    whose = f"{cost.need.cell}, " if cost.need.cell else ""
    what = f"{whose}{_layers(cost.need.layers)}, {_POSITIONS[cost.need.positions]}"
    count = f"{cost.sequences:,}{heldout} sequences, {_bytes(cost.num_bytes)} alone"
    return f"- {', '.join(cost.rows)}: {what}, {count}"


def _data(plan: Plan) -> str:
    facts = plan.data
    more = "" if facts.complete else "more than "
    found = f"{more}{facts.documents:,} documents, " if facts.documents else ""
    size = f"{_bytes(facts.num_bytes)}, " if facts.num_bytes else ""
    count = plan.cost.train_sequences
    return f"{found}{size}about {count:,} training sequences" if count else f"{found}{size}number of sequences unknown"


def _estimates(plan: Plan) -> str:
    cost, shape = plan.cost, plan.model.shape
    memory = cost.memory
    size = memory.smallest_gpu_gb()
    disk = ", ".join(f"{name} {_bytes(n)}" for name, n in cost.disk.items() if n)
    table = [
        ("parameters", f"{shape.parameters:,} ({shape.family}, {shape.layers} layers, hidden {shape.hidden})"),
        (
            "memory",
            f"{_bytes(memory.total)} at the peak of training {cost.memory_row}: weights, master weights, gradients and "
            f"Adam {_bytes(memory.weights)} ({memory.per_parameter} bytes a parameter),",
        ),
        ("", f"activations {_bytes(memory.activations)}, logits and process {_bytes(memory.rest)}{_sampling(memory)}"),
        *_copies(plan),
        ("smallest GPU", f"{size} GB" if size else "larger than any single one"),
        ("disk", f"{_bytes(cost.total_disk)}: {disk}"),
        ("time", f"{duration(cost.total_s)}, one row after another (from a table of rates, not measured)"),
    ]
    return _table(table)


def _sampling(memory: MemoryEstimate) -> str:
    """Return what texts written during training add."""
    return f", matrices laid out for its samples {_bytes(memory.copies)}" if memory.copies else ""


def _copies(plan: Plan) -> list[tuple[str, str]]:
    """Return the line on weights that rows keep twice while they are timed."""
    copies = plan.cost.copies
    if not copies:
        return []
    each = f"{_bytes(max(copies.values()))} for {'each of ' if len(copies) > 1 else ''}{_count(len(copies), 'row')}"
    return [("", f"decoding on a CPU keeps the model's matrices a second time: {each} in the benchmark")]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
