"""Bad settings: two lines, the key as the user typed it, where it stands, what is allowed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

import params
from params import ParamsError

ROOT = Path(__file__).resolve().parents[2]
TRAIN_KEYS = (
    "train.activation_checkpointing, train.batch_size, train.betas, train.checkpoint_every_s, train.clip_norm, "
    "train.dtype, train.eps, train.freeze, train.log_every_s, train.lr, train.micro_batch_size, train.min_lr_ratio, "
    "train.sample_every_steps, train.steps, train.warmup_ratio, train.weight_decay"
)
CELLS = ", ".join(sorted(p.stem for p in (ROOT / "params" / "cells").glob("*.yaml")))


def refused(**arguments: Any) -> list[str]:
    """Return the lines of the error."""
    with pytest.raises(ParamsError) as caught:
        params.load(arguments.pop("preset", "laptop"), **arguments)
    lines = str(caught.value).split("\n")
    assert lines == [caught.value.problem, caught.value.remedy]
    return lines


def test_unknown_preset() -> None:
    assert refused(preset="labtop") == [
        "Unknown preset 'labtop'.",
        "Did you mean 'laptop'? Known: gpu_small, laptop, ldlm_hour, overnight, qwen3_1_7b, smoke, test.",
    ]
    assert refused(preset="here/my.yaml") == [
        "No preset file 'here/my.yaml'.",
        "Check the path, or give the name of a known one.",
    ]


def test_unknown_cell() -> None:
    assert refused(cells="random_msk") == ["Unknown cell 'random_msk'.", f"Did you mean 'random_mask'? Known: {CELLS}."]
    assert refused(cells="zzzz")[1] == f"Known: {CELLS}."
    assert refused(cells=" , ") == ["--cells names no cell.", f"Known: {CELLS}."]


def test_unknown_key() -> None:
    assert refused(overrides="train.lrr=1") == [
        "Unknown key 'train.lrr' (from --set).",
        f"Did you mean 'train.lr'? Known: {TRAIN_KEYS}.",
    ]
    problem, remedy = refused(overrides="trrain.lr=1")
    assert problem == "Unknown key 'trrain.lr' (from --set)."
    assert remedy.startswith("Did you mean 'train.lr'? Known: anchors, ")
    assert refused(overrides="preset=x")[0] == "Unknown key 'preset' (from --set)."
    assert refused(overrides="data.fields.txt=a") == [
        "data.fields.txt = txt is not valid (from --set).",
        "Allowed: a mapping from text, prompt, response, messages to text.",
    ]


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("train.lr=-1", "train.lr = -1", "a number > 0"),
        ("train.lr=fast", "train.lr = fast", "a number > 0"),
        ("train.lr=true", "train.lr = true", "a number > 0"),
        ("train.lr=.inf", "train.lr = inf", "a number > 0"),
        ("train.batch_size=0", "train.batch_size = 0", "a whole number >= 1"),
        ("train.batch_size=2.5", "train.batch_size = 2.5", "a whole number >= 1"),
        ("train.micro_batch_size=x", "train.micro_batch_size = x", "a whole number >= 1 or null"),
        ("train.warmup_ratio=1", "train.warmup_ratio = 1", "a number >= 0 and < 1"),
        ("train.betas=[0.9]", "train.betas = [0.9]", "a list of 2, each a number >= 0 and < 1"),
        ("train.betas=[1,2]", "train.betas = 1", "a list of 2, each a number >= 0 and < 1"),
        ("train.dtype=fp16", "train.dtype = fp16", "auto, fp32, bf16"),
        ("train.freeze=[heads]", "train.freeze = heads", "a list, each embeddings, mlp"),
        ("train.activation_checkpointing=3", "train.activation_checkpointing = 3", "true or false"),
        ("model.alignment=shift", "model.alignment = shift", "shifted, same_position"),
        ("data.heldout_fraction=1", "data.heldout_fraction = 1", "a number > 0 and < 1"),
        ("eval.mask_ratios=[]", "eval.mask_ratios = []", "a list, each a number > 0 and <= 1"),
        ("eval.samples=0", "eval.samples = 0", "a whole number >= 1"),
        ("budget.kind=hours,budget.value=1", "budget.kind = hours", "tokens, flops, seconds, epochs"),
        ("budget.value=0", "budget.value = 0", "a number > 0"),
        ("seeds=[-1]", "seeds = -1", "a list, each a whole number >= 0 and <= 4294967295"),
        ("runtime.device=tpu", "runtime.device = tpu", "auto, cpu, cuda"),
    ],
)
def test_out_of_range(text: str, problem: str, remedy: str) -> None:
    assert refused(overrides=text) == [f"{problem} is not valid (from --set).", f"Allowed: {remedy}."]


def test_a_section_is_no_value() -> None:
    problem, remedy = refused(overrides="train=3")
    assert problem == "train = 3 is not valid (from --set)."
    assert remedy.startswith("Allowed: a mapping of lr, min_lr_ratio, ")
    assert refused(overrides=["train=3", "train.lr=1"])[1] == "Set one of the two."


def test_set_that_cannot_be_read() -> None:
    assert refused(overrides="train.lr") == [
        "--set train.lr has no value.",
        "Allowed: --set key=value, e.g. --set train.lr=1e-4.",
    ]
    assert refused(overrides="train.lr=[1") == [
        "--set train.lr=[1 cannot be read.",
        "Allowed: a number, true/false, null, text, or a list like [8,32].",
    ]
    assert refused(seeds="0,x") == ["--seeds 0,x cannot be read.", "Allowed: whole numbers, e.g. --seeds 0,1,2."]
    assert refused(seeds="") == [
        "seeds = [] is not valid (from --seeds).",
        "Allowed: a list, each a whole number >= 0 and <= 4294967295.",
    ]


def test_keys_of_cells() -> None:
    assert refused(overrides="cells.repr_aling_4.options.weight=1") == [
        "Unknown key 'cells.repr_aling_4.options.weight' (from --set): 'repr_aling_4' is no cell of this grid.",
        f"Did you mean 'repr_align_4'? Known: {', '.join(sorted(c.name for c in params.load().cells))}.",
    ]
    for key in ("cells.ar.option.tuned", "cells.ar.options", "cells.ar.method"):
        assert refused(overrides=f"{key}=1") == [
            f"Unknown key '{key}' (from --set).",
            "Allowed: cells.ar.options.KEY=VALUE or cells.ar.train.KEY=VALUE.",
        ]
    problem, remedy = refused(overrides="cells.ar_tuned.train.lrr=1")
    assert problem == "Unknown key 'cells.ar_tuned.train.lrr'."
    assert remedy.startswith("Did you mean 'lr'? Known: activation_checkpointing, ")
    assert refused(overrides="cells.ar_tuned.train.lr=0") == [
        "cells.ar_tuned.train.lr = 0 is not valid.",
        "Allowed: a number > 0.",
    ]
    assert refused(overrides="cells.ar_tuned.train.steps=3") == [
        "cells.ar_tuned.train.steps cannot be set.",
        "A grid has one budget for all rows: set train.steps.",
    ]


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        (
            "train.steps=3,budget.kind=tokens,budget.value=3",
            "budget and train.steps exclude each other, but both are set.",
            "Set budget: {kind: tokens|flops|seconds|epochs, value: ...} or train.steps, one of the two.",
        ),
        (
            "budget=null",
            "budget and train.steps exclude each other, but neither is set.",
            "Set budget: {kind: tokens|flops|seconds|epochs, value: ...} or train.steps, one of the two.",
        ),
        (
            "budget.kind=seconds",
            "budget.kind = seconds (from --set) changes the unit of budget.value = 15000000000000.0.",
            "Set budget.value together with budget.kind.",
        ),
        (
            "train.batch_size=4,train.micro_batch_size=3",
            "train.micro_batch_size = 3 does not divide train.batch_size = 4.",
            "Allowed: 1, 2, 4.",
        ),
        (
            "data.response_tokens=16",
            "eval.block_size = 32 is larger than data.response_tokens = 16.",
            "Allowed: 1 to 16.",
        ),
        (
            "data.layout=pack",
            "data.layout = pack needs data.sequence_length, which is not set.",
            "Set data.sequence_length, e.g. 1024, or data.layout=windows.",
        ),
        (
            "data.sequence_length=64",
            "data.sequence_length = 64, but data.layout = windows does not use it.",
            "Set data.layout=pack, or data.prompt_tokens and data.response_tokens instead.",
        ),
        (
            "data.split=train",
            "data.split = train, but data.source = embedded:sotu has no splits.",
            "Allowed with hf:NAME only; a held-out part is always cut off by data.heldout_fraction.",
        ),
        (
            "data.fields.prompt=q",
            "data.fields maps prompt, but prompt and response come together.",
            "Allowed: text, or prompt and response, or messages.",
        ),
        (
            "data.fields={messages: m, text: t}",
            "data.fields maps messages and also text.",
            "Allowed: text, or prompt and response, or messages.",
        ),
        (
            "model.scratch.layers=2",
            "model.scratch is set, but model.source = embedded:smollm2-135m-instruct.",
            "Set model.source=scratch to train a model from scratch, or model.scratch=null.",
        ),
        (
            "model.source=scratch,model.scratch.heads=3",
            "model.scratch.hidden = 256 is not a multiple of model.scratch.heads = 3.",
            "Allowed: hidden = heads x (an even head width).",
        ),
        (
            "model.source=scratch,model.scratch.heads=256,model.scratch.kv_heads=1",
            "model.scratch.hidden / heads = 1 is odd, rotary positions need pairs.",
            "Allowed: hidden = heads x (an even head width).",
        ),
        (
            "model.source=scratch,model.scratch.kv_heads=3",
            "model.scratch.kv_heads = 3 does not divide model.scratch.heads = 4.",
            "Allowed: a divisor of heads.",
        ),
        (
            "model.source=scratch,model.scratch.architecture=gpt2,model.scratch.kv_heads=2",
            "model.scratch.kv_heads = 2, but gpt2 has no grouped key/value heads.",
            "Set model.scratch.kv_heads=4 (= heads), or take architecture llama or qwen3.",
        ),
        (
            "eval.nelbo_sequences=5000",
            "eval.nelbo_sequences = 5000 is more than data.heldout_sequences = 16.",
            "Allowed: at most 16; or raise data.heldout_sequences.",
        ),
        (
            "bench.steps=[8,256]",
            "bench.steps = 256 is more than bench.new_tokens = 128: a step accepts at least one token.",
            "Allowed: at most 128.",
        ),
        (
            "bench.prompt_tokens=161",
            "bench.prompt_tokens = 161 is more than the 160 tokens of a held-out sequence, from which prompts are cut.",
            "Allowed: at most 160.",
        ),
        ("seeds=[0,0]", "seeds names 0 more than once.", "Allowed: each at most once."),
    ],
)
def test_settings_that_contradict_each_other(text: str, problem: str, remedy: str) -> None:
    assert refused(overrides=text) == [problem, remedy]


def test_cells_named_twice() -> None:
    assert refused(cells="ar,ar") == ["cells names ar more than once.", "Allowed: each at most once."]


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("train: {lrr: 1}", "Unknown key 'train.lrr' (from {}).", f"Did you mean 'train.lr'? Known: {TRAIN_KEYS}."),
        ("train: {lr: -1}", "train.lr = -1 is not valid (from {}).", "Allowed: a number > 0."),
        ("trrain: {lr: 1}", "Unknown key 'trrain' (from {}).", None),
        ("preset: x", "Unknown key 'preset' (from {}).", "A preset is named by its file."),
        ("1: 2", "Unknown key '1' (from {}).", None),
        ("train: {1: 2}", "Unknown key 'train.1' (from {}).", f"Did you mean 'train'? Known: {TRAIN_KEYS}."),
        (
            "cells: {ar: {option: 1}}",
            "Unknown key 'cells.ar.option' (from {}).",
            "Did you mean 'cells.ar.options'? "
            "Known: cells.ar.description, cells.ar.optional, cells.ar.options, cells.ar.train.",
        ),
        ("cells: {ar: 3}", "cells.ar = 3 is not valid (from {}).", "Allowed: a mapping of its settings, or {}."),
        (
            "cells: {ar: {optional: maybe}}",
            "cells.ar.optional = maybe is not valid (from {}).",
            "Allowed: true or false.",
        ),
        ("cells: 3", "cells = 3 is not valid (from {}).", "Allowed: a list of cell names."),
        ("cells: [random_msk]", "Unknown cell 'random_msk'.", f"Did you mean 'random_mask'? Known: {CELLS}."),
        ("- a", "{} holds ['extends: test'].", None),
        ("train:\n  lr: 1\n  lr: 2", "{} line 4: 'lr' stands there twice.", "Correct the YAML; indent with spaces."),
        ("train:\n\tlr: 1", "{} line 3: found character '\\t' that cannot start any token.", None),
    ],
)
def test_bad_preset_files(tmp_path: Path, text: str, problem: str, remedy: str | None) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- 'extends: test'" if text == "- a" else f"extends: test\n{text}\n")
    lines = refused(preset=str(path))
    assert lines[0] == problem.replace("{}", str(path))
    assert remedy is None or lines[1] == remedy


def test_preset_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {path}\n")
    assert refused(preset=str(path)) == [f"{path} extends itself.", "Remove one of the extends: lines."]
    path.write_bytes(b"description: \xe9t\xe9\n")
    assert refused(preset=str(path)) == [f"{path} is not UTF-8 text.", "Save it as UTF-8."]
    path.write_text("description: nothing else\n")
    assert refused(preset=str(path))[0].startswith("cells = [] is not valid")
    path.write_text("extends: 5\n")
    assert refused(preset=str(path)) == [
        f"extends = 5 is not valid (from {path}).",
        "Allowed: the name of a preset, or a path to a YAML file.",
    ]
    path.write_text("extends: other.yaml\n")
    assert refused(preset=str(path))[0] == f"No preset file '{tmp_path / 'other.yaml'}'."
    (tmp_path / "other.yaml").write_text("extends: ../other/../" + f"{tmp_path.name}/mine.yaml\n")
    assert refused(preset=str(path))[0] == f"{path} extends itself."


def test_a_preset_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "mine.yaml"
    path.touch()
    monkeypatch.setattr(Path, "read_text", locked)
    assert refused(preset=str(path)) == [
        f"{path} cannot be read (Permission denied).",
        "Make it readable, or give another file.",
    ]


@pytest.mark.parametrize("source", ["model", "data"])
def test_an_empty_source_is_a_slip_and_not_the_working_directory(source: str) -> None:
    """`--data "$TEXT"` with an unset variable read every text below the directory that it was typed in."""
    assert refused(**{source: " "})[0] == f"--{source} is empty."


def test_a_seed_that_no_generator_takes() -> None:
    """torch refused it in every row, once the model had been converted and the text tokenised."""
    assert params.load("test", seeds=str(2**32 - 1)).seeds == (2**32 - 1,)
    lines = refused(seeds="99999999999999999999")
    assert lines == [
        "seeds = 99999999999999999999 is not valid (from --seeds).",
        "Allowed: a list, each a whole number >= 0 and <= 4294967295.",
    ]


def test_a_home_directory_that_nobody_has() -> None:
    assert refused(data="~nobody-of-this-name/text.txt") == [
        "'~nobody-of-this-name/text.txt' is in a home directory that is not known here.",
        "Write out the path.",
    ]


def test_a_huge_batch_is_refused_at_once() -> None:
    """The allowed sizes were counted one by one: this took longer than anybody waits."""
    lines = refused(overrides="train.batch_size=9999999999999999999999,train.micro_batch_size=2")
    assert lines[0] == "train.micro_batch_size = 2 does not divide train.batch_size = 9999999999999999999999."
    assert lines[1] == "Allowed: 1, 3, 9, 11, 23, 33, 9999999999999999999999."


def test_bad_cell_files(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("name: other\nmethod: ar\n")
    assert refused(cells=str(path)) == [f"name = other is not the file's name (from {path}).", "Allowed: toy."]
    path.write_text("options: {}\n")
    assert refused(cells=str(path)) == [
        f"cells.toy.method is not set (from {path}).",
        "Allowed: text matching ^[a-z][a-z0-9_]*$.",
    ]
    path.write_text("method: ar\noption: {}\n")
    assert refused(cells=str(path)) == [
        f"Unknown key 'cells.toy.option' (from {path}).",
        "Did you mean 'cells.toy.options'? Known: cells.toy.description, cells.toy.method, cells.toy.name, "
        "cells.toy.options, cells.toy.train.",
    ]


def test_a_value_of_a_shipped_preset_is_located_in_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from params.loader import _Draft, _merge

    draft = _Draft()
    _merge(draft, {"train": {"lr": 1}}, "params/presets/laptop.yaml")
    _merge(draft, {"train": {"eps": 1}}, "--set")
    assert draft.locate("train.lr") == " (from params/presets/laptop.yaml)"
    assert draft.locate("train.eps") == " (from --set)"
    assert draft.locate("eval.dtype") == ""


def test_unknown_cell_of_a_spec() -> None:
    with pytest.raises(ParamsError, match="Cell 'random_msk' is not in this grid") as caught:
        params.load().cell("random_msk")
    assert caught.value.remedy.startswith("Did you mean 'random_mask'?")


def test_the_error_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(ParamsError("problem", "remedy")))
    assert (error.problem, error.remedy, str(error)) == ("problem", "remedy", "problem\nremedy")
