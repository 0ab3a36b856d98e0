"""Rows that are built on another cell before anything is computed: shown, estimated, ordered, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import params
from params.schema import CellSpec
from steps.grid import RowOutcome, collect, failed_rows
from steps.grid import run as grid_run
from steps.plan import render, validate
from steps.tracking import TrackingRef
from tests.plan_tools import TWO_CORES, plan, refused
from tests.reader_room import install, reader_cell, with_cells

DONOR = "repr_align_all"
ON_DONOR = f"cells.cola.options.backbone={DONOR},cells.cola.options.shape=smoke"


def test_the_dry_run_shows_what_a_row_is_built_on() -> None:
    made = plan(cells=f"cola,{DONOR}", overrides=ON_DONOR)
    lines = [" ".join(line.split()) for line in render(made).splitlines()]
    assert any(
        line.startswith("cola cola ") and line.endswith(f"anchors of 1 layer of {DONOR} once trained") for line in lines
    )
    (base, cell) = sorted(made.cost.anchors, key=lambda a: a.need.cell or "")
    assert (base.rows, cell.rows) == ((DONOR,), ("cola",))
    hidden, length, held = made.model.shape.hidden, made.spec.data.length, made.spec.data.heldout_sequences
    assert cell.num_bytes == (40 + held) * length * hidden * 2
    assert made.cost.disk["anchors"] == base.num_bytes + cell.num_bytes, "two models, two stores"
    assert f"- cola: {DONOR}, layer embed, every position, 40 and {held} held-out sequences, " in " ".join(lines)
    assert made.cost.shared_s["cache trained states"] > 0
    assert made.shared.built_upon == ()
    assert made.cost.rows["cola"].teacher_flops == 40 * made.model.shape.teacher_flops(length)


def test_a_cell_that_is_no_row_is_planned_as_shared_work() -> None:
    made = plan("laptop", seeds="0,1", cells="cola", overrides="cells.cola.options.backbone=repr_align_trajectory")
    assert [row.cell for row in made.shared.built_upon] == ["repr_align_trajectory"]
    assert set(made.cost.rows) == {"cola-seed0", "cola-seed1"}
    alone = plan("laptop", seeds="0,1", cells="repr_align_trajectory")
    assert made.cost.shared_s["train cells to build on"] == sum(r.train_s for r in alone.cost.rows.values())
    assert made.cost.shared_s["train shared prefixes"] == alone.cost.shared_s["train shared prefixes"] / 2
    assert made.cost.memory_row.startswith("repr_align_trajectory")
    (base, cell) = sorted(made.cost.anchors, key=lambda a: a.need.cell or "")
    assert base.rows == ("repr_align_trajectory-seed0",)
    each = made.cost.rows["cola-seed0"].distinct
    assert (cell.sequences, cell.heldout) == (2 * each, 2 * made.spec.data.heldout_sequences), "a store for every seed"
    assert "train cells to build on" in render(made)


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("repr_align", "is built on 'repr_align', which is no cell of this grid nor of params/cells.", f"'{DONOR}'"),
        ("nobody", "is built on 'nobody', which is no cell of this grid nor of params/cells.", f"Known: {DONOR}."),
        ("ldlm", "is built on 'ldlm', which trains networks of its own and holds no language model.", "e.g."),
        ("cola", "is built on itself.", f"Known: {DONOR}."),
    ],
)
def test_what_a_row_cannot_be_built_on(name: str, problem: str, remedy: str) -> None:
    lines = refused(lambda: plan(cells=f"{DONOR},cola", overrides=f"cells.cola.options.backbone={name}"))
    assert lines[0] == f"cells.cola {problem}"
    assert remedy in lines[1]


def test_rows_that_are_only_measured_or_go_round_in_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    base = params.load("test", cells=["ar", "random_mask"])

    def check(*cells: CellSpec) -> list[str]:
        return refused(lambda: validate(with_cells(base, *cells), machine=TWO_CORES))

    assert check(reader_cell(cell="ar"))[0] == (
        "cells.reader is built on 'ar', which is only measured: it trains no language model."
    )
    circle = [reader_cell("one", cell="two"), reader_cell("two", cell="three"), reader_cell("three", cell="two")]
    assert check(*circle)[0] == ("cells.three is built on cells that are built on each other: three on two on three.")


def test_rows_are_trained_after_what_they_are_built_on_and_reported_in_table_order() -> None:
    options = {"cells.cola.options.backbone": DONOR, "cells.cola.options.shape": "smoke"}
    spec = params.load("test", cells=["cola", "ar", DONOR], seeds="0,1", overrides=options)
    run = grid_run.GridRun("1", spec.model_dump_json(), True, "", "", TrackingRef(""))
    order = run.training_order(2)
    assert order == [f"{DONOR}-seed0", "cola-seed0", f"{DONOR}-seed1", "cola-seed1", "ar-seed0", "ar-seed1"]
    failed = {0, 1, 4}
    found = {i: None if i in failed else RowOutcome(row_id) for i, row_id in enumerate(order)}
    outcomes = collect(run, order, found)
    assert [o.row_id for o in outcomes] == run.row_ids() != order
    assert {o.row_id for o in outcomes if not o.ok} == {order[i] for i in failed}
    assert failed_rows(order, outcomes) == [f"{DONOR}-seed0", "cola-seed0", "ar-seed0"]
    on_base = params.load("test", cells=["cola", "ar", DONOR], overrides={"cells.cola.options.shape": "smoke"})
    run = grid_run.GridRun("1", on_base.model_dump_json(), True, "", "", TrackingRef(""))
    assert run.training_order(2) == run.row_ids()
