"""What the latent rooms share: cells written before load after, statistics in bf16, options without torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dllm_core import DiffusionGenerationConfig
from dllm_core.methods.latent_generation import read_tokens, request_of
from dllm_core.methods.latent_keeping import keep_language_model
from dllm_core.methods.registry import room_method, room_names, room_options
from tests.cola_tools import tiny_cola
from tests.ldlm_tools import LAYOUTS, random_anchors, refusal, tiny_ldlm
from tests.tiny import NUM_TOKENS, tiny_backbone
from tests.vfm_tools import tiny_vfm

ROOMS = ("cola", "ldlm", "vfm")
OWN_NETWORKS = {"cola": tiny_cola, "ldlm": tiny_ldlm}
PROMPTS = [torch.tensor([5, 9, 2]), torch.tensor([3, 4, 8, 15, 16])]
CONFIG = DiffusionGenerationConfig(max_new_tokens=6, max_denoising_steps=3, stop_at_eos=False)

NAMES_AND_SHAPES = {"cola": "a8423fb34646ad39", "ldlm": "3b1abac0ec1a8003", "vfm": "b46dd08fdfcfcf85"}
"""SHA-256 over the names and shapes in format 1 of the tiny cells, taken from files that each room first wrote."""
CONTRACT = {
    "alignment": "shifted",
    "mask_token_id": NUM_TOKENS,
    "num_tokens": NUM_TOKENS,
    "block_size": None,
    "weighting": "mean_masked",
    "normaliser": "sequence_then_batch",
}
FACTS = {
    "ldlm": {"latent_dim": 12, "layer": "2"},
    "cola": {"latent_dim": 6, "layer": "2", "block_size": 4},
}
ADDED = {"ldlm": ("networks.token_decoder.intercept_D",), "cola": ()}
"""Tensors that came after the first format: zero in a cell that lacks them."""
TRAINING_ALONE = ("ema.", "average.", "reference.", "gathered_")


def config_of(room: str) -> dict:
    """Return config.json of format 1."""
    return {
        "model_type": f"dllm_{room}",
        "format_version": 1,
        "dtype": "float32",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "eos_token_id": [0],
        **FACTS[room],
        "dllm": CONTRACT,
    }


def digest(path: Path, without: Sequence[str] = ()) -> str:
    with safe_open(path, framework="pt") as file:
        assert set(without) <= set(file.keys())
        shapes = {n: list(file.get_slice(n).get_shape()) for n in file.keys() if n not in without}  # noqa: SIM118
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


def written_by_hand(room: str, directory: Path):
    """Write a tiny cell as format 1 says, without the code that saves; return its method."""
    method = OWN_NETWORKS[room]().eval()
    tensors = {n: t.detach().clone() for n, t in method.state_dict().items() if not n.startswith(TRAINING_ALONE)}
    for name in ADDED[room]:
        del tensors[name]
        method.state_dict()[name].zero_()
    directory.mkdir()
    save_file(tensors, directory / f"{room}.safetensors")
    (directory / "config.json").write_text(json.dumps(config_of(room)))
    if room == "cola":
        tiny_backbone("llama", layers=4).save_pretrained(directory / "prompt_backbone")
    return method


@pytest.mark.parametrize("room", OWN_NETWORKS)
def test_a_cell_of_the_first_format_loads_and_is_written_again_alike(room, tmp_path):
    method = written_by_hand(room, tmp_path / "old")
    assert digest(tmp_path / "old" / f"{room}.safetensors") == NAMES_AND_SHAPES[room]
    loaded = room_method(room).from_pretrained(
        tmp_path / "old", method.options, dtype=torch.float32, device=torch.device("cpu")
    )
    found, wanted = (m.generate(PROMPTS, CONFIG).sequences for m in (loaded, method))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert loaded.ema.averages() == {}
    loaded.train()  # a finished cell generates the same whatever its mode
    assert torch.equal(loaded.generate(PROMPTS, CONFIG).sequences[0], wanted[0])
    loaded.save_pretrained(tmp_path / "new")
    assert digest(tmp_path / "new" / f"{room}.safetensors", ADDED[room]) == NAMES_AND_SHAPES[room]
    since = {"attention": "bidirectional"}  # what contracts have come to name since
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config_of(room) | {"dllm": CONTRACT | since}


def test_a_vfm_cell_of_the_first_format_loads_and_is_written_again_alike(tmp_path):
    method = tiny_vfm().eval()
    old, new = tmp_path / "old", tmp_path / "new"
    method.backbone.save_pretrained(old)
    tensors = {n: t.detach().clone() for n, t in method.state_dict().items() if not n.startswith(("backbone", "teach"))}
    told = {"format": "dllm_vfm 1", "freeze_base": "False", "prompt": "visible", "reads": "embedding"}
    told["hidden_size"] = "32"
    save_file(tensors, old / "vfm.safetensors", metadata=told)
    assert digest(old / "vfm.safetensors") == NAMES_AND_SHAPES["vfm"]
    loaded = room_method("vfm").from_pretrained(old, method.options, dtype=torch.float32, device="cpu")
    wanted = method.generate(PROMPTS, CONFIG).sequences
    assert torch.equal(loaded.generate(PROMPTS, CONFIG).sequences[0], wanted[0])
    loaded.save_pretrained(new)
    assert digest(new / "vfm.safetensors") == NAMES_AND_SHAPES["vfm"]
    with safe_open(new / "vfm.safetensors", framework="pt") as file:
        assert file.metadata() == told


@pytest.mark.parametrize("room", OWN_NETWORKS)
def test_statistics_are_not_rounded_with_the_weights(room, tmp_path):
    """A dimension of mean 300 and deviation 1 comes out right from a cell in bf16, whose steps there are 2 wide."""
    method = OWN_NETWORKS[room]()
    method.mean_D.fill_(301.0)
    method.std_D.fill_(1.0)
    method.save_pretrained(tmp_path)
    half = room_method(room).from_pretrained(tmp_path, method.options, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    standard = half.standardise(torch.tensor([300.5]).expand(32))
    assert standard.dtype == torch.bfloat16
    assert standard.tolist() == [-0.5] * 32


@pytest.mark.parametrize("room", OWN_NETWORKS)
def test_stored_states_are_those_of_the_rows_and_positions(room):
    data, method = LAYOUTS["packed"](), OWN_NETWORKS[room]()
    resources = random_anchors(data, method.layer)
    batch = data.batch_of(range(4))
    row_S, position_SL = torch.tensor([3, 0]), torch.tensor([[4, 1], [0, 5]])
    found_SLD = method.stored_states(batch, row_S, position_SL, resources)
    for s, row in enumerate(row_S.tolist()):
        states_LD = resources.anchors.states[batch.sequence_keys[row]][method.layer]
        assert torch.equal(found_SLD[s], states_LD[position_SL[s]])


def test_a_language_model_is_linked_and_never_written_through(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for directory, text in ((source, "new"), (target, "old")):
        directory.mkdir()
        (directory / "weights").write_text(text)
    (tmp_path / "elsewhere").hardlink_to(target / "weights")
    keep_language_model(source, target)
    assert (target / "weights").read_text() == "new"
    assert (target / "weights").samefile(source / "weights")
    assert (tmp_path / "elsewhere").read_text() == "old"
    keep_language_model(target, target)  # a cell saved over itself
    assert (target / "weights").read_text() == "new"


# -- generation -----------------------------------------------------------------------------------------------------


def test_draws_of_a_row_depend_on_its_seed_and_id_alone():
    config = DiffusionGenerationConfig(max_new_tokens=4, temperature=1.0, seed=3)
    request = request_of(PROMPTS, config, torch.device("cpu"), lengths=[2, 5], sample_ids=[7, 1])
    alone = request_of(PROMPTS[:1], config, torch.device("cpu"), lengths=[2], sample_ids=[7])
    assert torch.equal(request.normal(3, "z")[0, :2], alone.normal(3, "z")[0])
    assert torch.equal(request.uniform("z")[0, :2], alone.uniform("z")[0])
    assert not request.normal(3, "z")[0, 2:].any()
    assert not torch.equal(request.normal(3, "z")[0, :2], request.normal(3, "other")[0, :2])


@pytest.mark.parametrize("own", [(), (9,)])
@pytest.mark.parametrize("given", [None, 8])
def test_rows_are_cut_after_the_first_end_of_text(own, given):
    config = DiffusionGenerationConfig(max_new_tokens=4, stop_at_eos=True, eos_token_id=given)
    request = request_of(PROMPTS, config, torch.device("cpu"), lengths=[3, 4])
    ids_BL = torch.tensor([[1, 9, 8, 8], [2, 3, 4, 9]])
    found = request.finished(ids_BL, own, 5, 0.0)
    end = given or (own[0] if own else None)
    for row, (prompt, length) in enumerate(zip(PROMPTS, (3, 4), strict=True)):
        new = ids_BL[row, :length].tolist()
        kept = new[: new.index(end) + 1] if end in new else new
        assert found.sequences[row].tolist() == [*prompt.tolist(), *kept]
        assert found.new_tokens[row] == len(kept)


def test_drawn_tokens_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(5, 3, generator=generator)
    output_D = torch.randn(3, generator=generator)
    count = 4000
    uniform_M = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    config = DiffusionGenerationConfig(max_new_tokens=1, temperature=0.7)
    ids_M = read_tokens(output_D.expand(count, -1), head_VD, config, uniform_M)
    wanted_V = (head_VD @ output_D / 0.7).double().softmax(0)
    torch.testing.assert_close(torch.bincount(ids_M, minlength=5).double() / count, wanted_V, atol=1e-3, rtol=0)
    best_M = read_tokens(output_D.expand(2, -1), head_VD, config, None)
    assert best_M.tolist() == [int((head_VD @ output_D).argmax())] * 2


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_found_by_name_and_its_options_load_no_torch(room):
    assert room in room_names()
    assert room_options(room).__module__ == f"dllm_core.methods.{room}.options"
    assert room_method(room).__module__ == f"dllm_core.methods.{room}.method"
    code = (
        "import sys; from dllm_core.methods.registry import room_options; "
        "from dllm_core.methods.requirements import BaseShape; "
        f"options = room_options('{room}')(); options.requirements(30); "
        "options.network(BaseShape(hidden=576, layers=30, vocab=49216, parameters=134500000)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(("layer", "name"), [(-1, "final"), (-2, "3"), (-3, "2"), (-4, "1"), (-5, "embed")])
def test_layers_count_hidden_states_from_the_end(room, layer, name):
    assert room_options(room)(layer=layer).layer_name(4) == name


@pytest.mark.parametrize("room", ROOMS)
def test_unknown_shapes_and_layers_are_refused_with_what_is_known(room):
    problem, remedy = refusal(lambda: room_options(room)(shape="labtop").requirements(4))
    assert "'labtop'" in problem
    assert "Did you mean 'laptop'?" in remedy
    assert "qwen3_1_7b" in remedy
    problem, remedy = refusal(lambda: room_options(room)(layer=-6).layer_name(4))
    assert "-6" in problem
    assert "4 blocks" in problem
    assert "-5" in remedy


UNMASKING = [
    ("sampler_config", {"sampler_config": "p2"}),
    ("cache", {"cache": "prefix", "block_size": 2}),
    ("guidance_scale", {"guidance_scale": 1.5}),
    ("t_max", {"t_max": 0.8, "t_min": 0.2}),
    ("stability_threshold", {"stability_threshold": 2}),
    ("record_passes", {"record_passes": True}),
    ("verify", {"verify": True}),
]


@pytest.mark.parametrize(("name", "settings"), UNMASKING)
def test_settings_of_unmasking_are_refused_by_name(name, settings):
    config = DiffusionGenerationConfig(max_new_tokens=6, **settings)
    problem, remedy = refusal(lambda: request_of(PROMPTS, config, torch.device("cpu")))
    assert "latents" in problem
    assert "token-space" in remedy
    assert name in problem
