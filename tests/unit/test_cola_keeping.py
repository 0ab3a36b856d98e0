"""Keeping a cola cell: resuming across the phases bit for bit, saving and loading, sizes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import params
from dllm_core import DiffusionGenerationConfig
from dllm_core.backbone.contract import read_contract
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.errors import ContractError
from dllm_core.methods.cell import load_cell, save_cell
from dllm_core.methods.cola.method import Method
from dllm_core.methods.cola.networks import ColaNetworks
from dllm_core.methods.cola.options import Options
from dllm_core.methods.cola.shapes import BASES, SHAPES, Shape, parameter_table
from dllm_core.methods.registry import room_options
from dllm_core.methods.requirements import BaseShape
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings
from tests.cola_tools import LAYERS, SHAPE, tiny_cola
from tests.ldlm_tools import random_anchors, refusal
from tests.plan_tools import plan
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, byte_tokenizer, tiny_backbone

STEPS, FIRST = 10, 6
PROMPTS = [torch.tensor([5, 9, 2]), torch.tensor([3, 4, 8, 15, 16, 23])]


def trainer(workdir: Path, dtype: str = "fp32", **options) -> Trainer:
    """Ten steps, six of them the autoencoder's, the last two of which stand still."""
    method = tiny_cola(move=0.0, vae_share=0.6, settle=0.3, start_sequences=8, **options)
    data = random_sequences(16, 14, 3, NUM_TOKENS)
    return Trainer(
        method,
        data,
        SampleOrder(16, 0),
        TrainSettings(steps=STEPS, batch_size=4, micro_batch_size=2, lr=1e-2, dtype=dtype, checkpoint_every_s=None),
        random_anchors(data, method.layer),
        NoiseSource(0),
        workdir,
        peak_flops=1e9,
    )


@pytest.mark.parametrize(
    ("dtype", "joint", "stops"),  # before, while and after the statistics are taken, and in the second phase
    [("fp32", False, (5, 8)), ("fp32", True, (FIRST,)), ("bf16", False, (3, FIRST)), ("bf16", True, (5,))],
)
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path, dtype, joint, stops):
    whole = trainer(tmp_path / "whole", dtype, joint=joint)
    result = whole.run()
    wanted = {n: v.clone() for n, v in whole.method.state_dict().items()}
    assert int(wanted["ema.num_updates"]) == STEPS - FIRST
    assert float(wanted["gathered_count"]) == 2 * 4 * 11
    assert not torch.equal(wanted["latent_std_K"], torch.ones(6))
    for stop in stops:
        trainer(tmp_path / str(stop), dtype, joint=joint).run(stop_at=stop)
        resumed = trainer(tmp_path / str(stop), dtype, joint=joint)
        assert resumed.run().flops == result.flops
        for name, value in resumed.method.state_dict().items():
            assert torch.equal(value, wanted[name]), (stop, name)


def test_the_second_phase_moves_the_prior_alone(tmp_path):
    trainer(tmp_path).run(stop_at=FIRST)
    before = trainer(tmp_path)
    before.begin()
    kept = {n: v.clone() for n, v in before.method.networks.state_dict().items()}
    after = trainer(tmp_path)
    after.run()
    for name, value in after.method.networks.state_dict().items():
        assert torch.equal(value, kept[name]) == (not name.startswith("prior.")), name


def test_a_step_learns(tmp_path):
    """The autoencoder's loss falls, and so does the flow's."""
    method = tiny_cola(move=0.0, vae_share=0.4, time_scale=0.3)
    data = random_sequences(8, 14, 3, NUM_TOKENS)
    states = random_anchors(data, method.layer)
    for n, key in enumerate(data.keys):
        states.anchors.states[key][method.layer] = method.head_VD[data.input_ids_NL[n].long()].detach().clone()
    rows: list[dict] = []
    settings = TrainSettings(steps=100, batch_size=8, lr=5e-3, checkpoint_every_s=None)
    Trainer(
        method, data, SampleOrder(8, 0), settings, states, NoiseSource(0), tmp_path, rows.append, peak_flops=1e9
    ).run()
    nats = [r["train/reconstruction_nats"] for r in rows if r["phase"] == "vae"]
    flow = [r["train/flow_mse"] for r in rows if r["phase"] == "prior"]
    assert sum(nats[-5:]) < 0.8 * sum(nats[:5])
    assert sum(flow[-15:]) < 0.97 * sum(flow[:15])
    found = method.diagnose(data.batch_of(range(8)), states, NoiseSource(1))
    assert found["reconstruction_accuracy"] > 0.3
    assert found["active_dimensions"] == SHAPE.latent_dim


def _saved(directory: Path, method: Method) -> Path:
    tokenizer = directory / "tokenizer"
    byte_tokenizer().save_pretrained(tokenizer)
    return save_cell(method, directory / "cell", cell="cola", room="cola", seed=0, tokenizer_dir=tokenizer)


def test_a_saved_cell_generates_the_same_from_prompts_it_reads_with_its_own_language_model(tmp_path):
    run = trainer(tmp_path / "run")
    run.run()
    method, config = run.method, DiffusionGenerationConfig(max_new_tokens=7, max_denoising_steps=4, stop_at_eos=False)
    directory = _saved(tmp_path, method)
    loaded = load_cell(directory)
    assert loaded.backbone is None
    assert loaded.language_model is None
    wanted, found = (m.generate(PROMPTS, config).sequences for m in (method, loaded))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert loaded.language_model is not None
    for name, average in method.ema.averages().items():
        assert torch.equal(loaded.networks.prior.get_parameter(name).detach(), average), name
    assert torch.equal(loaded.latent_std_K, method.latent_std_K)
    assert read_contract(directory).num_tokens == NUM_TOKENS
    again = _saved(tmp_path / "again", loaded)
    assert torch.equal(load_cell(again).generate(PROMPTS, config).sequences[0], wanted[0])


def test_a_cell_starts_from_a_converted_checkpoint(tmp_path):
    backbone = tiny_backbone("llama", layers=LAYERS)
    backbone.save_pretrained(tmp_path)
    method = Method.from_base(tmp_path, Options(shape=SHAPE))
    assert method.language_model is None
    torch.testing.assert_close(method.head_VD.norm(dim=1), torch.ones(NUM_TOKENS))
    config = DiffusionGenerationConfig(max_new_tokens=3, max_denoising_steps=2, stop_at_eos=False)
    assert method.eval().generate(PROMPTS, config).new_tokens == [3, 3]


def test_a_cell_of_another_kind_is_refused(tmp_path):
    directory = _saved(tmp_path, tiny_cola())
    options = Options(shape=SHAPE, block_size=4)

    def load(changed: Options) -> None:
        Method.from_pretrained(directory, changed, dtype=torch.float32, device="cpu")

    load(options)
    wide = SHAPE.model_copy(update={"latent_dim": 7})
    deep = SHAPE.model_copy(update={"prior_depth": 2})
    for changes, word in (
        ({"shape": wide}, "latent_dim = 6"),
        ({"layer": -2}, "layer = 2"),
        ({"block_size": 8}, "block_size = 4"),
        ({"shape": deep}, "prior"),
    ):
        changed = options.model_copy(update=changes)
        assert word in refusal(lambda changed=changed: load(changed), ContractError)[0]
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "dllm_ldlm"}))
    assert "not a cola cell" in refusal(lambda: load(options), ContractError)[0]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "cola.safetensors").write_bytes(b"nothing")
    assert "do not fit" in refusal(lambda: load(options), ContractError)[0]


# -- sizes and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_parameter_table_counts_the_modules(name):
    base = BASES[name]
    with torch.device("meta"):
        networks = ColaNetworks(SHAPES[name], base.hidden, 16)
    found = {n: sum(p.numel() for p in m.parameters()) for n, m in networks.named_children()}
    assert parameter_table(SHAPES[name], base) == found


@pytest.mark.parametrize("joint", [False, True])
def test_what_the_method_trains_and_keeps_is_what_the_options_say(joint):
    method = tiny_cola(joint=joint)
    network = method.options.network(method.base.shape)
    assert network.num_trainable == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert network.num_trainable == method.num_new_parameters()
    reference = sum(v.numel() for v in method.reference.averages().values())
    assert network.frozen == method.head_VD.numel() + reference
    assert (reference > 0) == joint


def test_the_cell_of_the_grid_is_valid_and_planned():
    (cell,) = params.load("test", cells=["cola"]).cells
    options = room_options(cell.method)(**cell.options)
    need = options.requirements(30).anchors
    assert (need.layers, need.positions, need.heldout) == (("28",), "all", True)
    made = plan("test", cells=["cola"], overrides="cells.cola.options.shape=smoke")
    (row,) = [r for r in made.rows if r.cell == "cola"]
    base = made.model.shape.base(converted=False, positions_per_response_token=1.5, length=24)
    assert row.options.network(base).num_trainable == sum(parameter_table(SHAPES["smoke"], base).values())
    assert Options(anchor_sequences=7).requirements(30).anchors.sequences == 7


def test_the_states_are_those_of_the_base_model_or_of_the_cell_that_is_named():
    assert Options().requirements(30).anchors.cell is None
    assert Options(backbone="ar").requirements(30) == Options().requirements(30)
    named = Options(backbone="repr_align_all", anchor_sequences=7).requirements(30).anchors
    assert (named.cell, named.layers, named.positions, named.sequences) == ("repr_align_all", ("28",), "all", 7)
    with pytest.raises(ValidationError):
        Options(backbone="../elsewhere")


@pytest.mark.parametrize("bad", [{"encoder_width": 0}, {"prior_width": 100, "head_width": 32}, {"latent_dim": 0}])
def test_sizes_that_make_no_network_are_refused_before_one_is_built(bad):
    with pytest.raises(ValidationError) as caught:
        Shape(**{**SHAPE.model_dump(), **bad})
    assert next(iter(bad)) in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [{"vae_share": 1.0}, {"vae_share": 0.0}, {"block_size": 0}, {"masked_share": 1.0}, {"time_scale": 0}, {"x": 1}],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValidationError):
        Options(**bad)


def test_a_small_base_model_has_its_own_cost():
    base = BaseShape(hidden=32, layers=4, vocab=97, parameters=0)
    joint, plain = (Options(shape=SHAPE, joint=j).training_flops(base) for j in (True, False))
    assert joint > plain > 0
