import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_core import DiffusionGenerationConfig, load_cell
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.conversion import convert
from dllm_core.errors import ContractError, DllmError
from dllm_core.methods.cell import read_cell, save_cell
from dllm_core.methods.protocol import Resources, SamplingRequest
from dllm_core.methods.registry import room_method, room_options
from tests.method_tools import corrupt, step_info
from tests.sequences import random_sequences
from tests.tiny import TEXT, write_source

ROOMS = {
    "ar": {"tuned": True},
    "random_mask": {},
    "repr_align": {"layers": [0, 2]},
    "trajectory": {"block_sizes": [4, 8], "mode": "random"},
    "block_causal": {"block_size": 4},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cell")
    convert(write_source(root / "source"), root / "model", alignment="shifted")
    return root / "model"


def _save(converted: Path, directory: Path, room: str, **options: object):
    given = room_options(room)(**{**ROOMS[room], **options})
    method = room_method(room)(Backbone.from_pretrained(converted), given)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_cell(method, directory, cell=f"{room}-cell", room=room, seed=3, tokenizer_dir=converted, summary={"steps": 7})
    return method


@pytest.mark.parametrize("room", list(ROOMS))
def test_a_saved_cell_loads_as_the_same_model(converted, tmp_path, room):
    method = _save(converted, tmp_path / "cell", room)
    loaded = load_cell(tmp_path / "cell")
    assert type(loaded) is type(method)
    assert loaded.options == method.options
    assert not loaded.training
    for (name, a), (_, b) in zip(method.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    batch = random_sequences(2, 12, 3, 90).batch_of([0, 1])
    if room == "ar":
        assert torch.equal(loaded.token_nll(batch).nll_BL, method.token_nll(batch).nll_BL)
    else:
        masked_BL = batch.response_BL
        assert torch.equal(loaded.masked_nll(batch, masked_BL).nll_BL, method.masked_nll(batch, masked_BL).nll_BL)
    info = read_cell(tmp_path / "cell")
    assert (info.cell, info.method, info.seed, info.summary) == (f"{room}-cell", room, 3, {"steps": 7})
    assert load_cell(tmp_path / "cell", dtype=torch.bfloat16).backbone.embedding_weight_VD.dtype == torch.bfloat16


def test_the_six_lines_of_the_readme(converted, tmp_path):
    _save(converted, tmp_path / "cell", "random_mask")
    cell = load_cell(tmp_path / "cell")
    ids = cell.tokenizer("The quick brown", return_tensors="pt").input_ids
    config = DiffusionGenerationConfig(max_new_tokens=12, max_denoising_steps=4, stop_at_eos=False)
    out = cell.generate(ids, generation_config=config)
    text = cell.tokenizer.decode(out.sequences[0])
    assert text.startswith("The quick brown")
    assert len(out.sequences[0]) == ids.shape[1] + 12
    assert out.num_forwards == 4
    again = cell.generate([ids[0], ids[0, :5]], generation_config=config)
    assert torch.equal(again.sequences[0], out.sequences[0])
    assert int(torch.cat(again.sequences).max()) < cell.backbone.contract.num_tokens


def test_infilling_and_sampling_go_through_the_same_loop(converted, tmp_path):
    method = _save(converted, tmp_path / "cell", "repr_align")
    ids = load_cell(tmp_path / "cell").tokenizer(TEXT[:24], return_tensors="pt").input_ids
    hole_BC = torch.zeros_like(ids, dtype=torch.bool)
    hole_BC[0, 8:14] = True
    config = DiffusionGenerationConfig(max_denoising_steps=3, stop_at_eos=False)
    out = method.generate(ids, config, infill_mask=hole_BC)
    assert torch.equal(out.sequences[0][~hole_BC[0]], ids[0][~hole_BC[0]])
    assert out.new_tokens == [6]
    drafts = []
    request = SamplingRequest(max_new_tokens=8, num_steps=4, temperature=0.7, sample_ids=(5,), record_history=True)
    sampled = method.sample([ids[0]], request, on_draft=lambda canvas, done: drafts.append(int(done.sum())))
    assert drafts == [26, 28, 30, 32]
    assert sampled.commit_step is not None
    assert sorted(sampled.commit_step[0].tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    again = method.sample([ids[0, :3], ids[0]], SamplingRequest(**{**request.__dict__, "sample_ids": (1, 5)}))
    assert torch.equal(again.sequences[1], sampled.sequences[0])


def test_a_literal_mask_string_in_a_prompt_is_text(converted, tmp_path):
    _save(converted, tmp_path / "cell", "random_mask")
    cell = load_cell(tmp_path / "cell")
    text = "say <|mask|> or [MASK] now"
    ids = cell.tokenizer(text, return_tensors="pt").input_ids
    assert int(ids.max()) < cell.backbone.contract.num_tokens
    config = DiffusionGenerationConfig(max_new_tokens=4, max_denoising_steps=2, stop_at_eos=False)
    assert cell.tokenizer.decode(cell.generate(ids, config).sequences[0]).startswith(text)
    # not even the mask's own id in the prompt is filled in
    ids[0, 2] = cell.backbone.contract.mask_token_id
    assert int(cell.generate(ids, config).sequences[0][2]) == cell.backbone.contract.mask_token_id


def test_another_contract_is_refused_and_names_both_values(converted, tmp_path):
    _save(converted, tmp_path / "cell", "trajectory")
    assert load_cell(tmp_path / "cell").backbone.contract.block_size == 8
    with pytest.raises(ContractError, match=r"alignment='shifted'.*alignment='same_position'"):
        load_cell(tmp_path / "cell", expect={"alignment": "same_position"})
    path = tmp_path / "cell" / "config.json"
    config = json.loads(path.read_text())
    for name, value in (("mask_token_id", 98), ("alignment", "same_position"), ("block_size", 4)):
        other = {**config, "dllm": {**config["dllm"], name: value}}
        path.write_text(json.dumps(other))
        with pytest.raises(ContractError, match=name) as error:
            load_cell(tmp_path / "cell")
        assert len(str(error.value).splitlines()) == 2
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "dllm"}))
    with pytest.raises(ContractError):
        load_cell(tmp_path / "cell")
    path.write_text(json.dumps(config))
    cell_path = tmp_path / "cell" / "cell.json"
    cell = json.loads(cell_path.read_text())
    cell_path.write_text(json.dumps({**cell, "options": {**cell["options"], "block_sizes": [16]}}))
    with pytest.raises(ContractError, match=r"block_size=8.*block_size=16"):
        load_cell(tmp_path / "cell")


def test_what_is_no_cell_is_refused_in_two_lines(converted, tmp_path):
    _save(converted, tmp_path / "cell", "random_mask")
    path = tmp_path / "cell" / "cell.json"
    content = json.loads(path.read_text())
    cases = {
        "damaged": "{",
        "format_version 99": json.dumps({**content, "format_version": 99}),
        "Unknown method 'random_masks'": json.dumps({**content, "method": "random_masks"}),
        "do not fit": json.dumps({**content, "options": {"path_wieght": 1}}),
        "is damaged": json.dumps({k: v for k, v in content.items() if k != "seed"}),
    }
    for message, text in cases.items():
        path.write_text(text)
        with pytest.raises(DllmError, match=message) as error:
            load_cell(tmp_path / "cell")
        assert len(str(error.value).splitlines()) == 2
    path.unlink()
    with pytest.raises(DllmError, match="no finished cell"):
        load_cell(tmp_path / "cell")


def test_a_loaded_cell_can_be_trained_on(converted, tmp_path):
    _save(converted, tmp_path / "cell", "random_mask")
    cell = load_cell(tmp_path / "cell")
    batch = random_sequences(2, 12, 3, 90).batch_of([0, 1])
    corrupted, totals = corrupt(cell, batch)
    cell.loss(corrupted, totals, step_info(), Resources()).loss.backward()
    assert cell.backbone.embedding_weight_VD.grad is not None


def test_a_model_in_memory_says_that_it_has_no_tokenizer(converted):
    method = room_method("random_mask")(Backbone.from_pretrained(converted), room_options("random_mask")())
    with pytest.raises(DllmError, match="built in memory"):
        _ = method.tokenizer


def test_options_and_registry_load_no_torch():
    code = (
        "import sys\n"
        "from dllm_core.methods.registry import room_names, room_options\n"
        "for room in room_names():\n"
        "    options = room_options(room)(**({'tuned': True} if room == 'ar' else {}))\n"
        "    options.requirements(30), options.capabilities(), options.cost_factor()\n"
        "import dllm_core.methods.trajectory.subset\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
