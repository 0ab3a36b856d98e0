"""A finished LDLM: text without the language model, the averages on disk, prompts through the language model."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_core import DiffusionGenerationConfig, load_cell
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.conversion import convert
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.errors import ContractError, DllmError
from dllm_core.methods.cell import save_cell
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.ldlm.options import Options
from dllm_core.methods.protocol import Resources
from dllm_core.methods.segments import segments_of
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings
from tests.ldlm_tools import LAYERS, SHAPE, extracted_anchors, moved, refusal
from tests.method_tools import corrupt, split_losses
from tests.sequences import random_sequences
from tests.tiny import write_source

CONFIG = DiffusionGenerationConfig(max_new_tokens=6, max_denoising_steps=3, stop_at_eos=False)
PROMPTS = [torch.tensor([5, 9, 2]), torch.tensor([11, 3]), torch.tensor([3, 4, 8, 15])]
FILES = {"cell.json", "config.json", "ldlm.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ldlm")
    convert(write_source(root / "source", layers=LAYERS), root / "model", alignment="shifted")
    return root / "model"


def _train(base: Path, root: Path, **options: Any) -> tuple[Method, Resources, Any]:
    """Return a method trained for a few steps, its anchors and data."""
    torch.manual_seed(1)
    method = moved(Method.from_base(base, Options(shape=SHAPE, start="random", **options)), 0.1)
    data = random_sequences(8, 12, 4, method.base.contract.num_tokens)
    resources = extracted_anchors(root / "anchors", data, method.options, Backbone.from_pretrained(base))
    Trainer(
        method, data, SampleOrder(8, 0), TrainSettings(steps=4, batch_size=4, lr=0.01, checkpoint_every_s=None),
        resources, NoiseSource(0), root / "run", peak_flops=1e9,
    ).run()  # fmt: skip
    return method, resources, data


def _save(method: Method, base: Path, directory: Path) -> Path:
    return save_cell(method, directory, cell="ldlm", room="ldlm", seed=0, tokenizer_dir=base)


def _texts(method: Method) -> list[list[int]]:
    return [s.tolist() for s in method.generate(PROMPTS, CONFIG).sequences]


def _forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("a language model was built")


def test_text_comes_from_an_unseen_prompt_with_the_language_model_deleted(converted, tmp_path, monkeypatch):
    """Training too builds no model: nothing but the embedding table is read from the checkpoint."""
    base = tmp_path / "base"
    shutil.copytree(converted, base)
    data = random_sequences(8, 12, 4, 90)
    options = Options(shape=SHAPE)
    resources = extracted_anchors(tmp_path / "anchors", data, options, Backbone.from_pretrained(base))
    with monkeypatch.context() as patch:
        patch.setattr("dllm_core.backbone.backbone.load_causal_lm", _forbid)
        patch.setattr("dllm_core.backbone.loading.load_causal_lm", _forbid)
        patch.setattr("transformers.PreTrainedModel.__init__", _forbid)
        method = Method.from_base(base, options)
        settings = TrainSettings(steps=3, batch_size=4, lr=0.01, checkpoint_every_s=None)
        Trainer(
            method, data, SampleOrder(8, 0), settings, resources, NoiseSource(0), tmp_path / "r", peak_flops=1e9
        ).run()
        wanted = _texts(method)
        cell = _save(method, base, tmp_path / "cell")
        method_count = sum(isinstance(m, Method) for m in gc.get_objects())
        del method
        gc.collect()
        assert sum(isinstance(m, Method) for m in gc.get_objects()) < method_count
        for directory in (base, tmp_path / "anchors", tmp_path / "r"):
            shutil.rmtree(directory, ignore_errors=True)
        assert {p.name for p in cell.iterdir()} == FILES
        loaded = load_cell(cell)
        assert _texts(loaded) == wanted
        unseen = loaded.tokenizer("Never seen before!", return_tensors="pt").input_ids
        out = loaded.generate(unseen, CONFIG)
        assert out.new_tokens == [6]
        assert loaded.tokenizer.decode(out.sequences[0]).startswith("Never seen before!")
    assert loaded.backbone is None
    names = {type(m).__module__.split(".")[0] for m in loaded.modules()}
    assert names <= {"dllm_core", "torch"}


def test_what_is_written_are_the_averages(converted, tmp_path):
    method, resources, data = _train(converted, tmp_path)
    cell = _save(method, converted, tmp_path / "cell")
    loaded = load_cell(cell)
    live = dict(method.networks.named_parameters())
    averages = method.ema.averages()
    for name, parameter in loaded.networks.named_parameters():
        assert torch.equal(parameter, averages[name]), name
    assert loaded.ema.averages() == {}, "a loaded cell holds its weights once"
    assert sum(not torch.equal(live[n], a) for n, a in averages.items()) > len(averages) // 2
    assert torch.equal(loaded.embedding_VD, method.embedding_VD)
    assert torch.equal(loaded.mean_D, method.mean_D)
    assert torch.equal(loaded.std_D, method.std_D)
    assert torch.equal(loaded.times.cdf, method.times.cdf)
    assert loaded.options == method.options
    assert not loaded.training
    assert _texts(loaded) == _texts(method)
    again = load_cell(_save(loaded, converted, tmp_path / "again"))
    assert _texts(again) == _texts(method)
    batch = data.batch_of(range(4))
    with method.ema.swapped(method.networks):
        wanted = method.diagnose(batch, resources, NoiseSource(0))
    assert loaded.diagnose(batch, resources, NoiseSource(0)) == wanted


def test_a_cell_in_bf16_keeps_its_statistics_and_writes_much_the_same_latents(converted, tmp_path):
    method, resources, data = _train(converted, tmp_path)
    cell = _save(method, converted, tmp_path / "cell")
    half, full = load_cell(cell, dtype=torch.bfloat16), load_cell(cell)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name in ("mean_D", "std_D"):
        assert torch.equal(getattr(half, name), getattr(full, name)), name
    assert torch.equal(half.times.cdf, full.times.cdf)
    assert len(_texts(half)) == 3
    a, b = (m.diagnose(data.batch_of(range(4)), resources, NoiseSource(0)) for m in (half, full))
    assert a["diffusion_mse"]["0.5"] == pytest.approx(b["diffusion_mse"]["0.5"], rel=0.05)


def test_the_base_read_from_files_is_the_one_of_the_model(converted):
    read, held = Base.read(converted), Base.of(Backbone.from_pretrained(converted))
    assert torch.equal(read.embedding_VD, held.embedding_VD)
    assert (read.contract, read.num_layers, read.eos_token_ids, read.hidden) == (
        held.contract,
        held.num_layers,
        held.eos_token_ids,
        held.hidden,
    )
    assert len(read.embedding_VD) == read.contract.num_tokens


# -- prompts through the language model -----------------------------------------------------------------------------


def test_prompts_through_the_language_model_train_from_anchors_and_generate_with_the_copy(converted, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(converted, base)
    method, _, _ = _train(base, tmp_path, prompt_encoder="backbone")
    assert method.prompt_reader.model is None  # training read the store
    out = method.generate(PROMPTS, CONFIG)
    assert out.num_forwards == 3 + 3 + 1  # the language model counts
    wanted = _texts(method)
    cell = _save(method, base, tmp_path / "cell")
    shutil.rmtree(base)
    loaded = load_cell(cell)
    assert _texts(loaded) == wanted
    assert not any(n.startswith("_prompt") for n, _ in loaded.named_parameters())
    alone = [loaded.generate([p], CONFIG, sample_ids=[i]).sequences[0].tolist() for i, p in enumerate(PROMPTS)]
    assert alone == wanted
    again = _save(loaded, cell, tmp_path / "again")
    assert _texts(load_cell(again)) == wanted
    shutil.rmtree(cell / "prompt_backbone")
    with pytest.raises(DllmError) as caught:
        load_cell(cell).generate(PROMPTS, CONFIG)
    assert "language model" in caught.value.problem
    assert "prompt_encoder: embedding" in caught.value.remedy


def test_a_cell_can_be_saved_over_itself(converted, tmp_path):
    method = moved(Method.from_base(converted, Options(shape=SHAPE, prompt_encoder="backbone")), 0.1)
    cell = _save(method, converted, tmp_path / "cell")
    loaded = load_cell(cell)
    wanted = _texts(loaded)
    _save(loaded, converted, cell)
    assert _texts(load_cell(cell)) == wanted


def test_cached_prompt_states_are_the_live_ones_and_the_first_is_hidden(converted, tmp_path):
    method, resources, data = _train(converted, tmp_path, prompt_encoder="backbone", prompt_drop=0.0)
    batch = data.batch_of([0, 1])
    cut = segments_of(batch)
    cached_SPD, visible_SP = method.prompts_of(batch, cut, resources)
    ids_BP = batch.input_ids_BL[:, :4]
    live_BPD = method.standardise(
        method.prompt_reader.states(ids_BP, torch.ones_like(ids_BP, dtype=torch.bool), torch.float32)
    )
    torch.testing.assert_close(cached_SPD, live_BPD, rtol=1e-4, atol=1e-4)
    assert visible_SP.tolist() == [[False, True, True, True]] * 2
    corrupted, totals = corrupt(method, batch)
    loss, _, _ = split_losses(method, corrupted, totals, [2], resources)
    for key in batch.sequence_keys:
        store = resources.anchors.read([key], [method.layer])[method.layer][0]
        store[0] *= -50.0
        resources.anchors.write(key, {method.layer: store})
    assert split_losses(method, corrupted, totals, [2], resources)[0] == loss


def test_a_cell_from_before_the_intercept_writes_what_it_wrote(converted, tmp_path):
    """Its weights lack one tensor, which was as good as zero; in a cell with one it matters."""
    method = moved(Method.from_base(converted, Options(shape=SHAPE)), 0.1)
    cell = _save(method, converted, tmp_path / "cell")
    path, name = cell / "ldlm.safetensors", "networks.token_decoder.intercept_D"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    found = load_cell(cell)
    assert not found.networks.get_parameter(name.removeprefix("networks.")).any()
    before = _texts(method)
    method.networks.token_decoder.intercept_D.data.zero_()
    method.ema.averages()[name.removeprefix("networks.")].zero_()
    assert _texts(found) == _texts(method)
    assert _texts(found) != before


# -- what is refused ------------------------------------------------------------------------------------------------


def test_cells_of_another_shape_layer_or_kind_are_refused(converted, tmp_path):
    method = Method.from_base(converted, Options(shape=SHAPE))
    method.save_pretrained(tmp_path / "cell")

    def load(directory: Path | None = None, **options: Any) -> Method:
        given = Options(**{"shape": SHAPE, **options})
        return Method.from_pretrained(directory or tmp_path / "cell", given, dtype=torch.float32, device="cpu")

    load()
    problem, remedy = refusal(lambda: load(shape=SHAPE.model_copy(update={"latent_dim": 8})))
    assert "latent_dim = 12" in problem
    assert "8 was asked for" in problem
    assert "cell.json" in remedy
    problem, _ = refusal(lambda: load(layer=-2))
    assert "layer = 2" in problem
    assert "3 was asked for" in problem
    problem, _ = refusal(lambda: load(shape=SHAPE.model_copy(update={"encoder_width": 32})))
    assert "encoder" in problem  # which weights do not fit, not only that some do not
    problem, _ = refusal(lambda: load(shape=SHAPE.model_copy(update={"token_head": "own"})))
    assert "token_head_VD" in problem
    problem, _ = refusal(lambda: load(converted))
    assert "not an LDLM" in problem


@pytest.mark.parametrize("damage", ["cut", "gone", "format", "config"])
def test_damaged_cells_are_refused(converted, tmp_path, damage):
    method = Method.from_base(converted, Options(shape=SHAPE))
    cell = _save(method, converted, tmp_path / "cell")
    weights, config = cell / "ldlm.safetensors", cell / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    elif damage == "format":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 99}))
    else:
        config.write_text(config.read_text()[:40])
    with pytest.raises(ContractError) as caught:
        load_cell(cell)
    assert len(str(caught.value).split("\n")) == 2


def test_a_checkpoint_without_readable_embeddings_is_refused(converted, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    problem, _ = refusal(lambda: Method.from_base(broken, Options(shape=SHAPE)))
    assert "embed" in problem
    problem, _ = refusal(lambda: Method.from_base(converted, Options(shape=SHAPE, layer=-9)))
    assert "-9" in problem
