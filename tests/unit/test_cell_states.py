"""A row built on a trained cell: it is fed with that cell's states, pays for them, and reads prompts alike later."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_core import DiffusionGenerationConfig
from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data import anchor_files
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DllmError, ResourceError, StoreError
from dllm_core.methods.cell import load_cell
from dllm_core.methods.protocol import Resources
from dllm_core.training.metrics_log import MetricsLog
from params.schema import GridSpec
from steps.budgets import step_flops, teacher_flops
from steps.cache_anchors import AnchorArtifact
from steps.context import Context
from steps.evaluate_cell import evaluate_cell
from steps.train_cell import TrainedCell, finished, train_cell
from steps.training_plan import Surroundings, TrainJob, plan_job
from tests.unit.test_anchor_needs import written
from tests.unit.test_train_cell import LENGTH, NUM, PROMPT, STEPS, World, _data, _model

DONOR, LAYER = "repr_align_all", "1"


@pytest.fixture
def world(tmp_path: Path, tiny_source_dir: Path) -> World:
    return World(tmp_path, _model(tmp_path, tiny_source_dir), _data(tmp_path))


def grid(world: World, *cells: str, backbone: str = DONOR, **overrides: str) -> GridSpec:
    """A cola cell on the states after the first block of another cell, kept as they are."""
    options = {"backbone": backbone, "shape": "smoke", "layer": "-2", "start_sequences": "8"}
    settings = {f"cells__cola__options__{name}": value for name, value in options.items()}
    return world.spec(*(cells or (DONOR, "cola")), **{**settings, "anchors__dtype": "fp32", **overrides})


def train(world: World, spec: GridSpec, cell: str, ctx: Context, seed: int = 0) -> TrainedCell:
    anchors = world.anchors(spec, ctx)
    return train_cell(spec, spec.row_spec(cell, seed), world.model, world.data, anchors, None, ctx)


def job_of(world: World, spec: GridSpec, ctx: Context, cell: str = "cola", seed: int = 0) -> TrainJob:
    around = Surroundings(spec=spec, model=world.model, data=world.data, anchors=world.anchors(spec, ctx), ctx=ctx)
    return plan_job(spec.row_spec(cell, seed), around, lambda _: 1.0)


def sets(world: World) -> tuple[SequenceSet, SequenceSet]:
    return SequenceSet.load(Path(world.data.train_dir)), SequenceSet.load(Path(world.data.heldout_dir))


def built(ctx: Context, kind: str) -> list[str]:
    """Return the labels of the entries of a kind."""
    found = [json.loads(p.read_text())["label"] for p in (ctx.runs_dir / "cache" / kind).glob("*/manifest.json")]
    return sorted(found)


def stored(states: AnchorArtifact, keys: list[str], rows: torch.Tensor) -> torch.Tensor:
    return states.open().gather(keys, [LAYER], [rows] * len(keys))[LAYER].view(len(keys), len(rows), -1)


def states_of(model: Backbone, ids_BL: torch.Tensor, *, causal: bool) -> torch.Tensor:
    with torch.no_grad(), model.capture([LAYER]) as found:
        model.hidden(ids_BL, causal=causal)
    return found[LAYER]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_source_dir: Path) -> tuple[World, TrainedCell]:
    """A finished cola cell on a finished repr_align_all, shared by tests that only look."""
    root = tmp_path_factory.mktemp("built")
    world = World(root, _model(root, tiny_source_dir), _data(root))
    return world, train(world, grid(world), "cola", world.context())


# -- what is read ---------------------------------------------------------------------------------------------------


def test_the_states_are_those_of_the_trained_cell_read_causally(made: tuple[World, TrainedCell]) -> None:
    world, trained = made
    assert trained.states is not None
    donor = Backbone.from_pretrained(finished(job_of(world, grid(world), world.context(), DONOR)).path / "cell")
    train_set, heldout = sets(world)
    order = SampleOrder(NUM, 0)
    rows = torch.arange(LENGTH)
    for data, ids in ((train_set, [order[0][0], order[5][0]]), (heldout, [0, 7])):
        batch = data.batch_of(ids)
        found_BLD = stored(trained.states, list(batch.sequence_keys), rows)
        causal_BLD, both_BLD = (states_of(donor, batch.input_ids_BL, causal=c) for c in (True, False))
        torch.testing.assert_close(found_BLD, causal_BLD, atol=1e-5, rtol=1e-5)
        assert (found_BLD - both_BLD)[:, :-1].abs().max() > 0.05, "the attention that the cell was trained with differs"
        base_BLD = states_of(Backbone.from_pretrained(world.model.path), batch.input_ids_BL, causal=True)
        assert (found_BLD - base_BLD).abs().max() > 0.05, "training moved the states"


def test_prompts_are_read_in_generating_as_in_training_whatever_follows_them(made: tuple[World, TrainedCell]) -> None:
    """The states of a prompt alone, in a ragged batch, are the cached ones of the same tokens before a response."""
    world, trained = made
    method, (_, heldout) = load_cell(trained.cell_dir), sets(world)
    batch = heldout.batch_of([1, 4])
    lengths = [PROMPT, PROMPT - 3]
    ids_BP = batch.input_ids_BL[:, :PROMPT].clone()
    ids_BP[1, lengths[1] :] = 0
    real_BP = torch.arange(PROMPT) < torch.tensor(lengths)[:, None]
    found_BPD = method.language_model_states(ids_BP, real_BP)  # type: ignore[operator]
    assert trained.states is not None
    cached_BPD = stored(trained.states, list(batch.sequence_keys), torch.arange(PROMPT))
    cached_BPD = method.standardise(cached_BPD)  # type: ignore[operator]
    torch.testing.assert_close(found_BPD[real_BP], cached_BPD[real_BP], atol=2e-4, rtol=1e-4)


def test_the_cell_keeps_the_model_that_it_was_built_on(made: tuple[World, TrainedCell]) -> None:
    world, trained = made
    donor = finished(job_of(world, grid(world), world.context(), DONOR)).path / "cell" / "model.safetensors"
    kept = Path(trained.cell_dir) / "prompt_backbone" / "model.safetensors"
    assert os.path.samefile(donor, kept), "linked, not copied"
    weights = load_file(donor)
    rows_VD = weights["model.embed_tokens.weight"]
    method = load_cell(trained.cell_dir)
    head_VD = method.head_VD.detach()
    torch.testing.assert_close(head_VD, torch.nn.functional.normalize(rows_VD[: len(head_VD)], dim=1))
    base = load_file(Path(world.model.path) / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(base, rows_VD), "the embeddings were trained, so the test can tell them apart"
    held = sets(world)[1].batch_of(range(8))
    resources = Resources(anchors=trained.states.open())  # type: ignore[union-attr]
    assert 0 <= method.diagnose(held, resources, NoiseSource(0))["reconstruction_accuracy"] <= 1
    prompts = [held.input_ids_BL[i, :PROMPT] for i in (0, 1)]
    config = DiffusionGenerationConfig(max_new_tokens=5, max_denoising_steps=2, stop_at_eos=False)
    assert method.generate(prompts, config).new_tokens == [5, 5]  # type: ignore[operator]


# -- what is trained, charged and found again -----------------------------------------------------------------------


def test_it_is_charged_the_extraction_and_on_top_what_it_is_built_on(made: tuple[World, TrainedCell]) -> None:
    world, trained = made
    ctx = world.context()
    job = job_of(world, grid(world), ctx)
    donor = finished(job_of(world, grid(world), ctx, DONOR)).result
    summary = trained.summary
    assert (summary["steps"], summary["distinct_samples"]) == (STEPS, NUM)
    teacher = NUM * teacher_flops(job)
    assert summary["teacher_flops"] == pytest.approx(teacher)
    assert summary["extraction_flops"] == donor["flops"] > 0
    assert summary["extraction_s"] > donor["wall_s"] + donor["extraction_s"] > 0
    alone = train(world, grid(world, backbone="ar"), "cola", ctx).summary
    assert alone["extraction_flops"] == 0
    assert summary["flops"] - donor["flops"] == pytest.approx(alone["flops"])


def test_a_flop_budget_pays_for_training_and_extraction_not_for_the_other_cell(world: World) -> None:
    value = 4e9
    spec = grid(world, budget__kind="flops", budget__value=str(value))
    job = job_of(world, spec, world.context())
    assert job.settings.steps == round((value - NUM * teacher_flops(job)) / step_flops(job))
    on_base = job_of(world, grid(world, backbone="ar", budget__kind="flops", budget__value=str(value)), world.context())
    assert on_base.settings.steps == job.settings.steps
    assert job.source is not None
    assert job.source.settings.steps != job.settings.steps


def test_a_second_run_finds_everything_and_tells_nobody_about_the_other_cell(world: World) -> None:
    ctx = world.context()
    told: list[str] = []
    ctx.listeners.append(lambda row, _: told.append(row))
    first = train(world, grid(world), "cola", ctx)
    assert set(told) == {"cola"}, "records of the other cell would be taken for those of this row"
    assert built(ctx, "train_cell") == ["cola", DONOR]
    donor = train(world, grid(world), DONOR, world.context(run_id="second"))
    assert (donor.hit, donor.origin) == (True, "first")
    again = train(world, grid(world), "cola", world.context(run_id="second"))
    assert (again.hit, again.key, again.summary) == (True, first.key, first.summary)
    assert again.states is not None
    assert again.states.hit


def test_the_order_of_training_does_not_matter(world: World) -> None:
    ahead, after = world.context("ahead"), world.context("after")
    one = train(world, grid(world), "cola", ahead)
    train(world, grid(world), DONOR, after)
    two = train(world, grid(world), "cola", after)
    assert one.key == two.key
    left, right = (load_file(Path(t.cell_dir) / "cola.safetensors") for t in (one, two))
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_the_other_cell_need_not_be_a_row(world: World) -> None:
    ctx, both = world.context(), world.context("both")
    trained = train(world, grid(world, "cola"), "cola", ctx)
    assert built(ctx, "train_cell") == ["cola", DONOR]
    assert trained.key == train(world, grid(world), "cola", both).key


def test_every_seed_is_built_on_its_own(world: World) -> None:
    spec = grid(world, seeds="[0,1]")
    stores = set()
    for seed in (0, 1):
        ctx = world.context()
        job = job_of(world, spec, ctx, seed=seed)
        assert job.source is not None
        assert (job.source.seed, job.source.row_id) == (seed, f"{DONOR}-seed{seed}")
        stores.add(train(world, spec, "cola", ctx, seed).states.store_dir)  # type: ignore[union-attr]
    base = world.anchors(spec, world.context())
    assert base is not None
    assert len(stores | {base.store_dir}) == 3


def test_a_key_follows_the_training_that_it_is_built_on_and_rows_on_the_base_model_keep_theirs(world: World) -> None:
    ctx = world.context()
    keys = {
        name: job_of(world, grid(world, **changes), ctx).cell_request().key()
        for name, changes in (
            ("on repr_align_all", {}),
            ("with another rate", {f"cells__{DONOR}__train__lr": "0.01"}),
            ("on the base model", {"backbone": "ar"}),
        )
    }
    assert len(set(keys.values())) == 3
    request = job_of(world, grid(world, backbone="ar"), ctx).cell_request()
    base = world.anchors(grid(world, backbone="ar"), ctx)
    assert base is not None
    assert request.inputs == {
        "model": world.model.identity,
        "data": world.data.train_fingerprint,
        "teacher": f"{base.teacher}/{base.dtype}",
    }


def test_looking_a_finished_row_up_does_not_need_the_cell_it_is_built_on(world: World) -> None:
    ctx = world.context()
    train(world, grid(world), "cola", ctx)
    (entry,) = [p.parent for p in (ctx.runs_dir / "cache" / "train_cell").glob("*/manifest.json") if _label(p) == DONOR]
    shutil.rmtree(entry)
    assert train(world, grid(world), "cola", world.context(run_id="second")).hit
    assert built(ctx, "train_cell") == ["cola"]


def _label(manifest: Path) -> str:
    return str(json.loads(manifest.read_text())["label"])


# -- the store ------------------------------------------------------------------------------------------------------


def test_what_is_in_the_store_is_not_computed_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(sequences: int) -> GridSpec:  # the other cell stays as it is
        return grid(world, cells__cola__options__anchor_sequences=str(sequences))

    ctx = world.context()
    train_set, heldout = sets(world)
    order = [SampleOrder(NUM, 0)[i][0] for i in range(10)]
    with written(monkeypatch) as counted:
        first = train(world, of(6), "cola", ctx)
    assert first.states is not None
    mine = {key for key in counted if first.states.open().files.header(key) is not None}
    assert mine == {train_set.keys[i] for i in order[:6]} | set(heldout.keys)
    with written(monkeypatch) as counted:
        more = train(world, of(10), "cola", ctx)
    assert set(counted) == {train_set.keys[i] for i in order[6:]}
    assert more.states is not None
    assert more.states.store_dir == first.states.store_dir

    lost = more.states.open().files.path(train_set.keys[order[0]])
    whole = lost.read_bytes()
    lost.unlink()
    again = train(world, of(10), "cola", world.context(run_id="second"))
    assert again.hit
    assert lost.read_bytes()[-64:] == whole[-64:]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = world.context()
    train(world, grid(world), DONOR, ctx)
    before = set((ctx.runs_dir / "cache" / "anchors-store").iterdir())
    monkeypatch.setattr(anchor_files, "free_bytes", lambda _: 10)
    job = job_of(world, grid(world), ctx)
    with pytest.raises(ResourceError, match="has 10 B free"):
        finished(job)
    assert set((ctx.runs_dir / "cache" / "anchors-store").iterdir()) == before


def test_an_8_bit_store_is_refused(world: World) -> None:
    ctx = world.context()
    with pytest.raises(StoreError, match="direction only"):
        train(world, grid(world, anchors__dtype="int8"), "cola", ctx)


def test_states_of_other_weights_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is named by the cell's key: were its weights others all the same, the comparison would tell."""
    ctx = world.context()
    first = train(world, grid(world), "cola", ctx)
    assert first.states is not None
    store, key = first.states.open(), sets(world)[0].keys[SampleOrder(NUM, 0)[0][0]]
    for other in sets(world)[0].keys:
        if other != key and store.files.header(other) is not None:
            rows = torch.randn(LENGTH, 32)
            store.write(other, {LAYER: rows})
    store.files.path(key).unlink()
    with pytest.raises(StoreError, match="standard deviations off"):
        train(world, grid(world), "cola", world.context(run_id="second"))


# -- failing and going on -------------------------------------------------------------------------------------------


def test_a_failure_of_the_other_cell_is_told_and_mended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLM_FAIL_CELL", DONOR)
    ctx = world.context()
    with pytest.raises(DllmError) as caught:
        train(world, grid(world), "cola", ctx)
    assert caught.value.problem.startswith(f"'cola' is built on '{DONOR}', whose training failed: made to fail at step")
    assert caught.value.remedy == f"Mend '{DONOR}' first, then resume; or build 'cola' on another cell."
    monkeypatch.delenv("DLLM_FAIL_CELL")
    assert train(world, grid(world), "cola", world.context(run_id="second")).summary["steps"] == STEPS


def test_a_broken_row_goes_on_where_it_was_and_ends_at_the_same_bits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = grid(world, train__checkpoint_every_s="0.000001")
    monkeypatch.setenv("DLLM_FAIL_CELL", "cola")
    with pytest.raises(RuntimeError, match="made to fail"):
        train(world, spec, "cola", world.context())
    monkeypatch.delenv("DLLM_FAIL_CELL")
    ctx = world.context(run_id="second")
    seen: list[int] = []
    ctx.listeners.append(lambda _, record: seen.append(record["step"]))
    with written(monkeypatch) as counted:
        resumed = train(world, spec, "cola", ctx)
    assert seen == list(range(STEPS // 2, STEPS + 1))
    assert not counted, "the states were there"
    whole = train(world, grid(world), "cola", world.context("whole"))
    left, right = (load_file(Path(t.cell_dir) / "cola.safetensors") for t in (resumed, whole))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert [r["step"] for r in MetricsLog(Path(resumed.metrics_path)).rows()] == list(range(1, STEPS + 1))


def test_a_budget_in_seconds_measures_a_step_on_the_trained_cell(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = grid(world, budget__kind="seconds", budget__value="5")
    import steps.train_run as run

    measured = run.seconds_per_step
    timed: list[str] = []

    def measure(job: TrainJob, *arguments: Any) -> float:
        timed.append(job.cell)
        assert measured(job, *arguments) > 0
        return 0.5

    monkeypatch.setattr(run, "seconds_per_step", measure)
    assert train(world, spec, "cola", world.context()).summary["steps"] == STEPS
    assert timed == [DONOR, "cola"]


# -- measuring ------------------------------------------------------------------------------------------------------


def test_health_is_measured_on_the_states_of_the_trained_cell(
    made: tuple[World, TrainedCell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's states, which the grid has too, are of no use here."""
    import steps.evaluate_cell as step

    world, trained = made
    given: list[Resources | None] = []
    monkeypatch.setattr(step, "_measure", lambda *a: given.append(a[5]) or {})
    monkeypatch.setattr(step, "reference_text", lambda *a: {})
    spec = grid(world)
    ctx = world.context()
    row, base = spec.row_spec("cola", 0), world.anchors(spec, ctx)
    model = replace(world.model, identity="base")
    found = evaluate_cell(spec, row, trained, model, world.data, ctx, anchors=base)
    assert trained.states is not None
    assert base is not None
    assert [r.anchors.files.root for r in given] == [Path(trained.states.store_dir)]  # type: ignore[union-attr]
    without = replace(trained, states=None)
    other = evaluate_cell(spec, row, without, model, world.data, ctx, anchors=base)
    assert given[1] is None
    assert other.key != found.key
