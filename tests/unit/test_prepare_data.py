from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import params
from dllm_core.backbone.conversion import convert
from dllm_core.backbone.identity import model_identity, tokenizer_identity
from dllm_core.data import anchor_files
from dllm_core.data.anchors import needed_rows
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DataError, ResourceError, StoreError
from dllm_core.methods.trajectory.subset import subset
from params.schema import GridSpec
from steps.anchor_needs import WantedAnchors, wanted_anchors
from steps.cache import upkeep
from steps.cache_anchors import AnchorArtifact, AnchorPart, cache_anchors, cover_anchors
from steps.context import Context
from steps.prepare_data import DataArtifact, prepare_data
from steps.prepare_model import ModelArtifact
from tests.tiny import NUM_TOKENS, write_source

LENGTH = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelArtifact:
    home = tmp_path_factory.mktemp("model")
    path = home / "converted"
    contract = convert(write_source(home / "source"), path, alignment="shifted")
    return ModelArtifact(
        path=str(path),
        identity=model_identity(path),
        tokenizer=tokenizer_identity(path),
        source="tiny",
        family="llama",
        alignment="shifted",
        mask_token_id=contract.mask_token_id,
        num_tokens=contract.num_tokens,
        num_layers=2,
        hidden_size=32,
        num_parameters=1,
        max_length=64,
        pretrain_nats_per_token=None,
        key="k",
        hit=False,
        origin="run",
        seconds=0.0,
    )


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    root.mkdir()
    draw = random.Random(0)
    for i in range(12):
        lines = (
            f"line {draw.randrange(10**9)}: fellow citizens, {draw.randrange(10**9)} times!\n" for _ in range(8 + i)
        )
        (root / f"speech{i:02d}.txt").write_text("".join(lines))
    return root


@pytest.fixture
def spec(text_dir: Path) -> GridSpec:
    return make_spec(text_dir)


def make_spec(text_dir: Path | str, cells: list[str] | None = None, **overrides: str) -> GridSpec:
    settings = {
        "data.prompt_tokens": "8",
        "data.response_tokens": "16",
        "data.train_sequences": "40",
        "data.heldout_sequences": "6",
        "eval.nelbo_sequences": "4",
        "eval.mask_ratio_sequences": "4",
        "eval.block_size": "8",
        "bench.new_tokens": "16",
        "bench.steps": "[4]",
        "bench.prompt_tokens": "8",
        "train.dtype": "fp32",
        "train.batch_size": "4",
        "budget.kind": "tokens",
        "budget.value": "320",  # 5 steps of 4 x 16
        "runtime.device": "cpu",
        **overrides,
    }
    cells = cells or ["repr_align_4"]
    return params.load("laptop", cells=cells, overrides=settings, data=str(text_dir))


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., Context]:
    def make(run_id: str = "run1", **options: Any) -> Context:
        logged: list[str] = []
        ctx = Context(run_id=run_id, runs_dir=tmp_path / "runs", log=logged.append, **options)
        ctx.lines = logged  # type: ignore[attr-defined]
        return ctx

    return make


# -- prepare_data ---------------------------------------------------------------------------------------------------


def test_text_is_prepared_once(spec: GridSpec, model: ModelArtifact, context: Callable[..., Context]) -> None:
    first = prepare_data(spec, model, context())
    assert (first.num_train, first.num_heldout, first.length, first.mean_response_tokens) == (40, 6, LENGTH, 16.0)
    assert first.num_documents == 12
    assert first.kind == "text"
    train, heldout = SequenceSet.load(Path(first.train_dir)), SequenceSet.load(Path(first.heldout_dir))
    assert train.fingerprint == first.train_fingerprint
    assert json.loads(Path(first.keys_file).read_text()) == list(train.keys)
    assert not set(train.documents) & set(heldout.documents)
    assert train.num_tokens == NUM_TOKENS
    assert 0 < first.unigram_nats_per_token < float(torch.log(torch.tensor(97.0)))
    second = prepare_data(spec, model, context("run2"))
    assert second == replace(first, hit=True, origin="run1")


def test_a_changed_file_or_setting_is_prepared_anew(
    spec: GridSpec, text_dir: Path, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    first = prepare_data(spec, model, context())
    elsewhere = text_dir.rename(text_dir.with_name("moved"))
    moved = prepare_data(make_spec(elsewhere), model, context("run2"))
    assert moved.hit, "the text decides, not the path"
    assert prepare_data(make_spec(elsewhere, **{"train.lr": "0.5"}), model, context("run2")).hit
    fewer = prepare_data(make_spec(elsewhere, **{"data.train_sequences": "20"}), model, context("run2"))
    assert (fewer.hit, fewer.num_train) == (False, 20)
    (elsewhere / "speech00.txt").write_text("something else, " * 40)
    changed = prepare_data(make_spec(elsewhere), model, context("run2"))
    assert not changed.hit
    assert changed.fingerprint != first.fingerprint


def test_failures_leave_nothing_behind(text_dir: Path, model: ModelArtifact, context: Callable[..., Context]) -> None:
    (text_dir / "speech03.txt").write_bytes(b"\xff\xfe")
    ctx = context()
    with pytest.raises(DataError, match="not UTF-8"):
        prepare_data(make_spec(text_dir), model, ctx)
    assert not list((ctx.runs_dir / "cache" / "prepare_data").glob("*"))


def test_a_hit_imports_nothing_heavy(
    spec: GridSpec, model: ModelArtifact, context: Callable[..., Context], tmp_path: Path
) -> None:
    ctx = context()
    data = prepare_data(spec, model, ctx)
    anchors = cache_anchors(spec, model, data, ctx)
    assert anchors is not None
    told = {"spec": spec.model_dump_json(), "model": model.__dict__, "runs": str(ctx.runs_dir)}
    (tmp_path / "told.json").write_text(json.dumps(told))
    code = f"""
import json, sys
from pathlib import Path
told = json.loads(Path({str(tmp_path / "told.json")!r}).read_text())
from params.schema import GridSpec
from steps.prepare_model import ModelArtifact
from steps.context import Context
from steps.prepare_data import prepare_data
from steps.cache import upkeep
from steps.cache_anchors import cache_anchors
spec, model = GridSpec.model_validate_json(told["spec"]), ModelArtifact(**told["model"])
ctx = Context(run_id="run2", runs_dir=Path(told["runs"]))
data = prepare_data(spec, model, ctx)
anchors = cache_anchors(spec, model, data, ctx)
assert data.hit and anchors.hit, (data.hit, anchors.hit)
heavy = [m for m in ("torch", "transformers", "numpy", "safetensors", "tokenizers") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- cache_anchors --------------------------------------------------------------------------------------------------


def run_both(spec: GridSpec, model: ModelArtifact, ctx: Context) -> tuple[DataArtifact, AnchorArtifact]:
    data = prepare_data(spec, model, ctx)
    anchors = cache_anchors(spec, model, data, ctx)
    assert anchors is not None
    return data, anchors


def only(anchors: AnchorArtifact | None) -> AnchorPart:
    assert anchors is not None
    (part,) = anchors.parts
    return part


def test_only_sequences_within_the_budget_are_computed(
    spec: GridSpec, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    data, anchors = run_both(spec, model, context())
    order = SampleOrder(40, 0)
    part = only(anchors)
    assert part.sample_ids == tuple(sorted(order[i][0] for i in range(5 * 4)))
    assert (part.wanted.layers, part.wanted.positions) == (("1", "final"), "response_predictors")
    store = anchors.open()
    train = SequenceSet.load(Path(data.train_dir))
    batch = train.batch_of(part.sample_ids)
    rows = needed_rows(batch, "response_predictors")
    assert store.missing(list(rows), part.wanted.layers, rows) == []
    assert len(list(Path(anchors.store_dir).rglob("*.safetensors"))) == 20
    assert anchors.num_bytes == sum(p.stat().st_size for p in Path(anchors.store_dir).rglob("*.safetensors"))
    assert part.error is not None
    assert part.error < 0.01
    seconds, flops = part.stand_alone_cost(10)
    assert 0 < seconds == pytest.approx(part.seconds / 2)
    assert 0 < flops == pytest.approx(part.flops / 2)


def test_rows_without_anchors_cost_nothing(
    text_dir: Path, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    spec, ctx = make_spec(text_dir, ["ar", "random_mask"]), context()
    assert cache_anchors(spec, model, prepare_data(spec, model, ctx), ctx) is None


def test_a_larger_budget_or_another_layer_computes_only_what_is_new(
    spec: GridSpec, text_dir: Path, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    ctx = context()
    data, first = run_both(spec, model, ctx)
    before = {p: p.stat().st_mtime_ns for p in Path(first.store_dir).rglob("*.safetensors")}
    assert cache_anchors(spec, model, data, context("run2")).hit
    larger = cache_anchors(make_spec(text_dir, **{"budget.value": "500"}), model, data, ctx)
    assert (larger.hit, len(only(larger).sample_ids)) == (False, 32)
    assert larger.store_dir == first.store_dir
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert any("12 of 32 sequences" in line for line in ctx.lines)
    everything = only(cache_anchors(make_spec(text_dir, ["repr_align_all"]), model, data, ctx))
    assert everything.wanted.layers == ("embed", "1", "final")
    assert everything.seconds >= only(first).seconds, "stand-alone cost does not shrink because others paid before"
    assert cache_anchors(spec, model, data, context("run3")).hit


def samples(spec: GridSpec, model: ModelArtifact, data: DataArtifact, ctx: Context) -> set[int]:
    (one,) = wanted_anchors(spec, model, data, ctx)
    assert one.sample_ids == tuple(sorted(set(one.sample_ids)))
    return set(one.sample_ids)


def test_two_seeds_need_the_sequences_of_both(
    text_dir: Path, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    overrides = {"train.batch_size": "4", "data.prompt_tokens": "8", "data.response_tokens": "32"}
    overrides |= {"budget.kind": "tokens", "budget.value": "320"}
    spec = params.load(
        "laptop", cells=["random_mask", "repr_align_4"], overrides=overrides, seeds=[0, 1], data=str(text_dir)
    )
    data = replace(prepare_data(make_spec(text_dir), model, context()), num_train=1000, mean_response_tokens=32.0)
    for budget, steps in ((320, 3), (384, 3), (385, 4)):
        planned = spec.model_copy(update={"budget": spec.budget.model_copy(update={"value": float(budget)})})
        expected = {SampleOrder(1000, seed)[i][0] for seed in (0, 1) for i in range(steps * 4)}
        assert samples(planned, model, data, context()) == expected
    everything = spec.model_copy(update={"budget": spec.budget.model_copy(update={"value": 1e6})})
    assert samples(everything, model, data, context()) == set(range(1000))


def test_the_looped_subset_of_a_trajectory_row_is_covered(
    text_dir: Path, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    options = {"commit_steps": "4", "extraction_block": "16", "responses": "30"}
    overrides = {f"cells.repr_align_trajectory.options.{name}": value for name, value in options.items()}
    spec = make_spec(text_dir, ["repr_align_trajectory"], **overrides)
    data = replace(prepare_data(make_spec(text_dir), model, context()), num_train=1000)
    order = SampleOrder(1000, 0)
    # 5 steps of 4, branch after 2 of them, then 30 different responses
    expected = {order[i][0] for i in range(2 * 4)} | {s for s, _ in subset(order, 2 * 4, 30)}
    assert samples(spec, model, data, context()) == expected


def test_lost_and_damaged_chunks_are_computed_again(
    spec: GridSpec, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    data, first = run_both(spec, model, context())
    files = sorted(Path(first.store_dir).rglob("*.safetensors"))
    contents = {p: p.read_bytes() for p in files}
    files[0].unlink()
    files[1].write_bytes(contents[files[1]][:200])
    ctx = context("run2")
    second = cache_anchors(spec, model, data, ctx)
    assert not second.hit
    assert any("2 of 20 chunks are no longer" in line for line in ctx.lines)
    for path in files[:2]:
        header = anchor_files.read_header(path)
        assert header is not None
        old = len(contents[path]) - int.from_bytes(contents[path][:8], "little")
        new = path.read_bytes()
        assert new[-old + 8 :] == contents[path][-old + 8 :]
    assert cache_anchors(spec, model, data, context("run3")).hit


def test_the_store_is_listed_and_cleared_like_an_entry(
    spec: GridSpec, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    ctx = context()
    data, first = run_both(spec, model, ctx)
    (stored,) = (e for e in upkeep.entries(ctx.cache) if e.home.parent.name == "anchors-store")
    assert stored.name == "anchors-store/hidden states of tiny"
    assert stored.size >= first.num_bytes
    assert upkeep.remove(ctx.cache, stored)
    assert not Path(first.store_dir).exists()
    assert not cache_anchors(spec, model, data, context("run2")).hit
    assert cache_anchors(spec, model, data, context("run3")).hit


def test_another_model_has_a_store_of_its_own(
    spec: GridSpec, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    data, first = run_both(spec, model, context())
    other = cache_anchors(spec, replace(model, identity="other"), data, context())
    assert not other.hit
    assert other.store_dir != first.store_dir


def test_without_the_cache_states_are_computed_again(
    spec: GridSpec, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    data, first = run_both(spec, model, context())
    before = {p: p.stat().st_mtime_ns for p in Path(first.store_dir).rglob("*.safetensors")}
    fresh = context("run2", use_cache=False)
    again = cache_anchors(spec, model, data, fresh)
    assert not again.hit
    assert all(p.stat().st_mtime_ns != t for p, t in before.items())
    assert cache_anchors(spec, model, data, context("run2", use_cache=False)).hit


def test_refusals_come_before_any_work(
    text_dir: Path, model: ModelArtifact, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, ctx = make_spec(text_dir, **{"anchors.dtype": "int8"}), context()
    data = prepare_data(spec, model, ctx)
    for positions in ("all", "response"):
        one = WantedAnchors(layers=("1",), positions=positions, heldout=False, sample_ids=(0,))
        with pytest.raises(StoreError, match="int8 keep a state's direction only"):
            cover_anchors(spec, [one], model, data, ctx)
    monkeypatch.setattr(anchor_files, "free_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"The anchors need .* has 1\.0 kB free") as error:
        cache_anchors(spec, model, data, ctx)
    assert len(str(error.value).splitlines()) == 2
    assert not (ctx.runs_dir / "cache" / "anchors-store").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "fp8"])
def test_every_stored_precision_agrees_with_live_states(
    dtype: str, text_dir: Path, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    _, anchors = run_both(make_spec(text_dir, **{"anchors.dtype": dtype}), model, context())
    error = only(anchors).error
    assert error is not None
    assert error < {"fp32": 1e-4, "bf16": 0.01, "int8": 0.1, "fp8": 0.1}[dtype]


def test_states_of_something_else_are_noticed(
    spec: GridSpec, text_dir: Path, model: ModelArtifact, context: Callable[..., Context]
) -> None:
    ctx = context()
    data, anchors = run_both(spec, model, ctx)
    store = anchors.open()
    train = SequenceSet.load(Path(data.train_dir))
    part = only(anchors)
    for sample in part.sample_ids:
        wrong = {layer: torch.randn(LENGTH, 32) for layer in part.wanted.layers}
        store.files.path(train.keys[sample]).unlink()
        store.write(train.keys[sample], wrong, ((7, 23),))
    with pytest.raises(StoreError, match="standard deviations off"):
        cache_anchors(make_spec(text_dir, **{"budget.value": "500"}), model, data, ctx)
