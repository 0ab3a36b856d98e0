"""The step that makes the base model: cached by content, cheap when it is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_core.backbone.identity import model_identity
from dllm_core.errors import ContractError, DllmError
from params.schema import DataSpec, ModelSpec
from steps.context import Context
from steps.prepare_model import prepare_model
from tests.tiny import TEXT


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(runs_dir=tmp_path / "runs", log=lambda line: None)


def test_directory_is_converted_once(tiny_source_dir: Path, tmp_path: Path, ctx: Context) -> None:
    source = shutil.copytree(tiny_source_dir, tmp_path / "model")
    made = prepare_model(ModelSpec(source=str(source)), ctx)
    assert not made.hit
    assert (made.family, made.num_layers, made.hidden_size, made.num_tokens) == ("llama", 2, 32, 97)
    assert made.identity == model_identity(made.path)
    again = prepare_model(ModelSpec(source=str(source)), ctx)
    assert again.hit
    assert (again.identity, again.path, again.key) == (made.identity, made.path, made.key)
    moved = source.rename(tmp_path / "elsewhere")
    assert prepare_model(ModelSpec(source=str(moved)), ctx).hit, "content counts, not the path"
    other = prepare_model(ModelSpec(source=str(moved), alignment="same_position"), ctx)
    assert not other.hit
    assert other.alignment == "same_position"
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 64
    weights.write_bytes(bytes(data))
    assert not prepare_model(ModelSpec(source=str(moved)), ctx).hit


def test_hit_imports_nothing_heavy(tiny_source_dir: Path, ctx: Context) -> None:
    prepare_model(ModelSpec(source=str(tiny_source_dir)), ctx)
    source, runs = str(tiny_source_dir), str(ctx.runs_dir)
    code = (
        "import sys; from pathlib import Path; from params.schema import ModelSpec; "
        "from steps.context import Context; from steps.prepare_model import prepare_model; "
        f"made = prepare_model(ModelSpec(source={source!r}), Context(runs_dir=Path({runs!r}))); "
        "assert made.hit, made; "
        "heavy = {'torch', 'transformers', 'mlflow', 'pandas', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


def test_errors_leave_nothing_behind(tiny_source_dir: Path, tmp_path: Path, ctx: Context) -> None:
    with pytest.raises(DllmError, match="no model directory"):
        prepare_model(ModelSpec(source="./nothing"), ctx)
    made = prepare_model(ModelSpec(source=str(tiny_source_dir)), ctx)
    with pytest.raises(ContractError, match=r"'shifted'.*'same_position'"):
        prepare_model(ModelSpec(source=made.path, alignment="same_position"), ctx)
    assert len(list((ctx.runs_dir / "cache" / "model").iterdir())) == 1


def test_scratch_never_sees_held_out_documents(tmp_path: Path, ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_core.data.records import read_records
    from dllm_core.data.split import split_records

    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"Document {i}. " + TEXT * 3, encoding="utf-8")
    data = DataSpec(source=str(folder), heldout_fraction=0.4)
    scratch = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 48, "vocab": 300, "steps": 3, "length": 16}
    spec = ModelSpec(source="scratch", scratch={**scratch, "batch_size": 2})
    seen: list[str] = []
    import steps.prepare_model as module

    real = module._texts
    monkeypatch.setattr(module, "_texts", lambda records: seen.extend(r.document_id for r in records) or real(records))
    made = prepare_model(spec, ctx, data=data)
    train, heldout = split_records(list(read_records(str(folder))), heldout_fraction=0.4, seed=0)
    assert seen == [r.document_id for r in train]
    assert heldout
    assert made.num_tokens == 300
    assert made.pretrain_nats_per_token is not None
    assert prepare_model(spec, ctx, data=data).hit
    assert prepare_model(spec, ctx, data=data.model_copy(update={"train_sequences": 5})).hit, "it reads no sequences"
    assert not prepare_model(spec, ctx, data=data.model_copy(update={"split_seed": 1})).hit
