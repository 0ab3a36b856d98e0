"""Rows that read different states of different sequences share one store: each pays for, and gets, its own part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_core.backbone.backbone import Backbone
from dllm_core.data.anchors import AnchorStore, kept_rows, needed_rows
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.methods.cell import load_cell
from dllm_core.methods.protocol import Resources
from dllm_core.methods.requirements import AnchorNeed
from params.schema import GridSpec
from steps.budgets import teacher_flops, unit_flops
from steps.cache_anchors import AnchorArtifact, cache_anchors
from steps.train_cell import train_cell
from steps.training_plan import Surroundings, TrainJob, covering_anchors, plan_job
from tests.reader_room import install, reader_cell, with_cells
from tests.sequences import packed_sequences
from tests.unit.test_train_cell import BATCH, LENGTH, NUM, PROMPT, STEPS, World, _data, _model

HELD, FEW = 8, 6


@pytest.fixture
def world(tmp_path: Path, tiny_source_dir: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    install(tmp_path, monkeypatch)
    return World(tmp_path, _model(tmp_path, tiny_source_dir), _data(tmp_path))


def grid(world: World, *cells: str, **overrides: str) -> GridSpec:
    """Three steps of four sequences; repr_align_4 reads the last layer alone."""
    settings = {"budget__value": str(3 * BATCH * (LENGTH - PROMPT)), **overrides}
    if "repr_align_4" in cells:
        settings["cells__repr_align_4__options__layers"] = "[2]"
    return world.spec(*cells, **settings)


def need(positions: Any = "response", layer: str = "1", heldout: bool = True) -> AnchorNeed:
    return AnchorNeed(layers=(layer,), positions=positions, heldout=heldout)


ALIGN = need("response_predictors", "final", heldout=False)


@contextmanager
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count how often each chunk is written: every time its sequence went through the teacher."""
    counted: Counter[str] = Counter()
    write = AnchorStore.write

    def count(store: AnchorStore, key: str, *arguments: Any, **options: Any) -> None:
        counted[key] += 1
        write(store, key, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AnchorStore, "write", count)
        yield counted


def sets(world: World) -> tuple[SequenceSet, SequenceSet]:
    return SequenceSet.load(Path(world.data.train_dir)), SequenceSet.load(Path(world.data.heldout_dir))


def job_of(world: World, spec: GridSpec, cell: str, anchors: AnchorArtifact | None = None) -> TrainJob:
    around = Surroundings(spec=spec, model=world.model, data=world.data, anchors=anchors, ctx=world.context())
    return plan_job(spec.row_spec(cell, 0), around, lambda _: 1.0)


# -- rows -----------------------------------------------------------------------------------------------------------


def test_classes_of_rows() -> None:
    batch = packed_sequences(2, (5, 3), 2, 90).batch_of([0, 1])
    key = batch.sequence_keys[0]
    # responses are all but the first tokens of the documents, at 1..4 and 6..7
    assert needed_rows(batch, "response")[key] == ((1, 5), (6, 8))
    assert needed_rows(batch, "response_predictors")[key] == ((0, 4), (5, 7))
    assert needed_rows(batch, "all")[key] == ((0, 8),)
    assert needed_rows(batch, {"response", "response_predictors"})[key] == ((0, 8),)
    for one in ("response", "response_predictors", ("response", "response_predictors")):
        assert kept_rows(batch, one)[key] == ((0, 8),), "either is stored with the other"


# -- the store ------------------------------------------------------------------------------------------------------


def test_every_sequence_meets_the_teacher_once_for_all_who_read_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_cells(grid(world, "repr_align_4"), reader_cell(sequences=FEW))
    with written(monkeypatch) as counted:
        anchors = world.anchors(spec, world.context())
    assert anchors is not None
    train, heldout = sets(world)
    order = [SampleOrder(NUM, 0)[i][0] for i in range(3 * BATCH)]
    both, one = {train.keys[i] for i in order[:FEW]}, {train.keys[i] for i in order[FEW:]}
    assert counted == Counter([*both, *one, *heldout.keys])
    files = anchors.open().files
    layers = {key: set(files.header(key).layers) for key in counted}  # type: ignore[union-attr]
    assert all(layers[key] == {"1", "final"} for key in both)
    assert all(layers[key] == {"final"} for key in one)
    assert all(layers[key] == {"1"} for key in heldout.keys)

    reader, align = anchors.part(need()), anchors.part(ALIGN)
    assert reader.sample_ids == tuple(sorted(order[:FEW]))
    assert align.sample_ids == tuple(sorted(order))
    flops = teacher_flops(job_of(world, spec, "reader"))
    assert flops > 0
    assert reader.stand_alone_cost(FEW)[1] == pytest.approx(FEW * flops)
    assert align.stand_alone_cost(len(order))[1] == pytest.approx(len(order) * flops)

    with written(monkeypatch) as counted:
        again = world.anchors(spec, world.context(run_id="second"))
    assert again is not None
    assert [part.hit for part in again.parts] == [True, True]
    assert not counted


def test_without_the_cache_everything_is_computed_again_but_only_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_cells(grid(world, "repr_align_4"), reader_cell(sequences=FEW))
    world.anchors(spec, world.context())
    fresh = world.context(run_id="second")
    fresh.use_cache = False
    with written(monkeypatch) as counted:
        world.anchors(spec, fresh)
    assert len(counted) == 3 * BATCH + HELD
    assert set(counted.values()) == {1}


def test_held_out_states_are_those_of_the_model(world: World) -> None:
    anchors = world.anchors(with_cells(grid(world, "random_mask"), reader_cell(sequences=FEW)), world.context())
    assert anchors is not None
    batch = sets(world)[1].batch_of(range(HELD))
    rows = [row_L.nonzero().flatten() for row_L in batch.response_BL]
    stored = anchors.open().gather(batch.sequence_keys, ["1"], rows)["1"].float()
    backbone = Backbone.from_pretrained(world.model.path)
    with torch.no_grad(), backbone.capture(["1"]) as states:
        backbone.hidden(batch.input_ids_BL, causal=True)
    torch.testing.assert_close(stored, states["1"][batch.response_BL], atol=0.0, rtol=2.0**-8)


def test_a_new_cell_computes_only_its_own_part(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, ctx = grid(world, "repr_align_4"), world.context()
    first = world.train(before, "repr_align_4", ctx)
    old = world.anchors(before, ctx)
    spec = with_cells(before, reader_cell(sequences=FEW))
    with written(monkeypatch) as counted:
        anchors = world.anchors(spec, ctx)
    assert old is not None
    assert anchors is not None
    train, heldout = sets(world)
    order = [SampleOrder(NUM, 0)[i][0] for i in range(FEW)]
    assert counted == Counter([*(train.keys[i] for i in order), *heldout.keys])
    assert [part.hit for part in anchors.parts] == [True, False]
    assert anchors.part(ALIGN).key == old.part(ALIGN).key
    # what was trained before is found again, under the same key
    again = train_cell(spec, spec.row_spec("repr_align_4", 0), world.model, world.data, anchors, None, ctx)
    assert (again.hit, again.key) == (True, first.key)


def test_the_key_of_a_row_does_not_depend_on_its_neighbours(world: World) -> None:
    alone = with_cells(grid(world, "random_mask"), reader_cell(sequences=FEW))
    many = with_cells(grid(world, "random_mask", "repr_align_4"), reader_cell(sequences=FEW), reader_cell("other"))
    keys = set()
    for runs, spec in (("alone", alone), ("many", many)):
        anchors = cache_anchors(spec, world.model, world.data, world.context(runs))
        keys.add(job_of(world, spec, "reader", anchors).cell_request().key())
    assert len(keys) == 1


def test_rows_of_one_need_share_a_part_that_covers_all_of_them(world: World) -> None:
    spec = with_cells(grid(world, "random_mask"), reader_cell(sequences=FEW), reader_cell("more", sequences=FEW + 2))
    anchors = world.anchors(spec, world.context())
    assert anchors is not None
    (part,) = anchors.parts
    order = [SampleOrder(NUM, 0)[i][0] for i in range(FEW + 2)]
    assert part.sample_ids == tuple(sorted(order))


def test_a_row_that_reads_more_than_was_estimated_gets_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = with_cells(grid(world, "repr_align_4"), reader_cell())
    anchors = world.anchors(spec, world.context())
    longer = with_cells(grid(world, "repr_align_4", budget__value=str(5 * BATCH * (LENGTH - PROMPT))), reader_cell())
    with written(monkeypatch) as counted:
        more = covering_anchors(job_of(world, longer, "reader", anchors))
    assert more is not None
    train, _ = sets(world)
    order = SampleOrder(NUM, 0)
    assert counted == Counter(train.keys[order[i][0]] for i in range(3 * BATCH, 5 * BATCH))
    assert more.find(ALIGN) is None
    assert len(more.part(need()).sample_ids) == 5 * BATCH


# -- training -------------------------------------------------------------------------------------------------------


def test_a_room_without_a_backbone_trains_from_states_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = with_cells(grid(world, "repr_align_4", budget__value="640"), reader_cell(sequences=FEW))
    ctx = world.context()
    anchors = world.anchors(spec, ctx)
    assert anchors is not None

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the language model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "from_pretrained", refuse)
        trained = train_cell(spec, spec.row_spec("reader", 0), world.model, world.data, anchors, None, ctx)
    summary = trained.summary
    assert (summary["steps"], summary["distinct_samples"]) == (STEPS, FEW)
    per_sequence = teacher_flops(job_of(world, spec, "reader"))
    assert summary["teacher_flops"] == pytest.approx(FEW * per_sequence)
    own = 6.0 * 32 * 128 * STEPS * BATCH * (LENGTH - PROMPT)
    assert summary["flops"] == pytest.approx(own + FEW * per_sequence)
    assert summary["extraction_s"] > 0

    method = load_cell(trained.cell_dir)
    assert method.backbone is None
    train, heldout = sets(world)
    order = [SampleOrder(NUM, 0)[i][0] for i in range(FEW)]
    rows = [torch.arange(PROMPT, LENGTH)] * FEW
    states_MD = anchors.open().gather([train.keys[i] for i in order], ["1"], rows)["1"].float()
    torch.testing.assert_close(method.mean_D, states_MD.mean(0))
    found = method.diagnose(heldout.batch_of(range(HELD)), Resources(anchors=anchors.open()), None)  # type: ignore[arg-type]
    assert 0 <= found["accuracy"] <= 1
    # another process starts from the same weights: the result is that of the row's seed
    other = train_cell(
        spec, spec.row_spec("reader", 0), world.model, world.data, anchors, None, world.context("elsewhere")
    )
    weights = load_cell(other.cell_dir).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in method.state_dict().items())


# -- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [None, FEW])
def test_a_flop_budget_buys_training_and_the_teacher_once_a_sequence(world: World, sequences: int | None) -> None:
    value = 4e9
    spec = with_cells(
        grid(world, "random_mask", "repr_align_4", budget__kind="flops", budget__value=str(value)),
        reader_cell(sequences=sequences),
    )
    masked, align, reader = (job_of(world, spec, cell) for cell in ("random_mask", "repr_align_4", "reader"))
    teacher = teacher_flops(align)
    assert teacher_flops(masked) == 0
    assert masked.settings.steps == round(value / unit_flops(masked))
    # all 24 sequences are seen, then steps cost their training alone
    assert align.settings.steps == round((value - NUM * teacher) / unit_flops(align))
    per_step = 6.0 * 32 * 128 * BATCH * (LENGTH - PROMPT)
    distinct = NUM if sequences is None else sequences
    assert reader.settings.steps == round((value - distinct * teacher) / per_step)
    assert reader.settings.steps > 5 * masked.settings.steps, "a cheap network sees more tokens"
    assert len(reader.samples()) == distinct == reader.num_distinct(reader.settings.steps)


def test_a_budget_too_small_for_the_training_set_stops_in_its_first_round(world: World) -> None:
    probe = job_of(world, with_cells(grid(world, "random_mask"), reader_cell()), "reader")
    per_step = 6.0 * 32 * 128 * BATCH * (LENGTH - PROMPT) + BATCH * teacher_flops(probe)
    spec = with_cells(
        grid(world, "random_mask", budget__kind="flops", budget__value=str(3.2 * per_step)), reader_cell()
    )
    job = job_of(world, spec, "reader")
    assert job.settings.steps == 3
    assert job.num_distinct(3) == 3 * BATCH
