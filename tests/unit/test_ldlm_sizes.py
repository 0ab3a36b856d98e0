"""Sizes and costs of LDLM: counted modules, counted operations, the plan's figures, and what its options refuse."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

import params
from dllm_core.methods.ldlm.networks import LatentNetworks
from dllm_core.methods.ldlm.options import Options
from dllm_core.methods.ldlm.shapes import BASES, SHAPES, Shape, forward_flops, parameter_table
from dllm_core.methods.registry import room_options
from dllm_core.methods.requirements import BaseShape
from tests.ldlm_tools import LAYERS, SHAPE, random_anchors, tiny_ldlm
from tests.method_tools import corrupt, step_info
from tests.plan_tools import plan
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS

NO_KEYS = 10**15
"""As many sequences as no batch holds: what is left of the closed form are weights."""
PINNED = {
    "smoke": 939_681,
    "laptop": 24_027_457,
    "qwen3_1_7b": 218_421_505,
    "qwen3_6_35b_a3b": 1_356_527_361,
    "qwen3_6_27b": 7_040_391_041,
    "paper": 289_054_209,
}
STATED = {
    "laptop": (10e6, 25e6),
    "qwen3_1_7b": (0.9 * 200e6, 1.1 * 200e6),
    "qwen3_6_35b_a3b": (0.95 * 1.39e9, 1.05 * 1.39e9),
    "qwen3_6_27b": (0.95 * 6.75e9, 1.05 * 6.75e9),
    "paper": (0.95 * 300e6, 1.05 * 300e6),
}


def counted(shape: Shape, base: BaseShape) -> dict[str, int]:
    """Return the parameters of the modules themselves, on no device."""
    with torch.device("meta"):
        networks = LatentNetworks(shape, base.hidden, base.vocab)
    found = {name.replace("_", " "): sum(p.numel() for p in m.parameters()) for name, m in networks.named_children()}
    if networks.token_head_VD is not None:
        found["token head"] = networks.token_head_VD.numel()
    assert sum(found.values()) == sum(p.numel() for p in networks.parameters())
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_the_parameter_table_counts_the_modules(name):
    base = BASES.get(name, BASES["laptop"])
    table = parameter_table(SHAPES[name], base)
    assert table == counted(SHAPES[name], base)
    assert sum(table.values()) == PINNED[name]
    low, high = STATED.get(name, (0, 1e6))
    assert low <= sum(table.values()) <= high


@pytest.mark.parametrize("head", ["frozen", "own"])
@pytest.mark.parametrize("latent_dim", [12, None])
def test_the_table_holds_for_any_mix_of_widths_and_depths(head, latent_dim):
    base = BaseShape(hidden=36, layers=4, vocab=50, parameters=0)
    for changes in ({}, {"prompt_depth": 0}, {"encoder_depth": 3, "token_depth": 2}, {"denoiser_depth": 1}):
        shape = SHAPE.model_copy(update={"token_head": head, "latent_dim": latent_dim, **changes})
        assert parameter_table(shape, base) == counted(shape, base)


def test_what_the_method_trains_is_what_the_options_say():
    method = tiny_ldlm()
    network = method.options.network(method.base.shape)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert network.num_trainable == trained == method.num_new_parameters()
    assert network.frozen == sum(p.numel() for p in method.parameters() if not p.requires_grad)
    assert network.flops_per_response_token == method.options.training_flops(method.base.shape)


def test_the_plan_shows_the_sizes_of_the_modules():
    made = plan("test", cells=["ldlm"], overrides="cells.ldlm.options.shape=smoke")
    (row,) = [r for r in made.rows if r.cell == "ldlm"]
    base = made.model.shape.base(converted=False, positions_per_response_token=1.5, length=24)
    network = row.options.network(base)
    with torch.device("meta"):
        networks = LatentNetworks(SHAPES["smoke"], base.hidden, base.vocab)
    assert network.num_trainable == sum(p.numel() for p in networks.parameters())


# -- operations -----------------------------------------------------------------------------------------------------


def _modulation_backward(rows: int, width: int, depth: int, *, final: bool) -> int:
    """Return operations of the backward pass of so many rows of modulations; the sinusoids need no gradient."""
    linears = 6 * width * depth + (2 * width if final else 0) + width
    return 2 * rows * (2 * width * linears + 256 * width)


@pytest.mark.parametrize("extra", [{}, {"self_condition": 1.0}, {"self_condition": 1.0, "consistency": 0.5}])
@pytest.mark.parametrize("head", ["frozen", "own"])
def test_training_flops_are_those_that_torch_counts(extra, head):
    """Equal but for what the formula leaves out or simplifies, each counted here by hand.

    Left out: modulations, and here attention scores, of which torch's counter does not know the CPU kernel
    (tests/unit/test_latent_attention.py counts them). Simplified: the first matrices of networks whose input is data
    need no input gradient, and the first pass of self-conditioning has no prediction before it.
    """
    shape = Shape(
        latent_dim=48,
        encoder_width=64,
        encoder_depth=2,
        decoder_width=96,
        decoder_depth=1,
        denoiser_width=128,
        denoiser_depth=2,
        token_width=32,
        token_depth=1,
        head_width=32,
        token_head=head,
    )
    options = {"self_condition": 0.0, "token_fraction": 1.0, "prompt_drop": 0.0, **extra}
    method = tiny_ldlm(shape=shape, **options)
    rows, length, prompt = 4, 34, 2
    data = random_sequences(rows, length, prompt, NUM_TOKENS)
    corrupted, totals = corrupt(method, data.batch_of(range(rows)))
    with FlopCounterMode(display=False) as counter:
        out = method.loss(corrupted, totals, step_info(step=1, steps=100), random_anchors(data, method.layer))
        out.loss.backward()
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}

    base = method.base.shape
    slots, hidden, latent = rows * (length - prompt), base.hidden, 48
    assert out.positions == slots
    assert out.flops == method.options.step_flops(base, slots, rows * prompt, sequences=rows)
    of_weights = method.options.step_flops(base, slots, rows * prompt, sequences=NO_KEYS)
    saved = 2 * hidden * (latent + 64) + 2 * hidden * (hidden + 32) + 2 * latent * 128
    saved += options["self_condition"] * 2 * latent * 128
    # matrices with biases are another operation of the counter when they run forward
    passes = 1 + options["self_condition"] + (1 if extra.get("consistency") else 0)
    forward_biased = passes * slots * 2 * 128 * latent
    modulations = _modulation_backward(rows, 128, 2, final=True) + _modulation_backward(1, 128, 2, final=False)
    saved_prompt = 2 * hidden * 128
    wanted = of_weights - rows * prompt * saved_prompt - slots * saved - forward_biased + modulations
    assert found["aten.mm"] == pytest.approx(wanted, rel=1e-12)
    assert sum(found.values()) == pytest.approx(of_weights, rel=0.05)


def test_the_average_step_has_the_usual_share_of_prompt_positions():
    """A window of 160 tokens, 32 of them prompt: about 3 % of the operations at the laptop's sizes."""
    base, options = BASES["laptop"], Options()
    assert options.training_flops(base) == pytest.approx(options.step_flops(base, 128, 32) / 128)
    flops, alone = (forward_flops(SHAPES["laptop"], base, 128, prompt) for prompt in (32, 0))
    prompts = 0.25 * 3 * flops["prompt encoder"] + 3.5 * (flops["denoiser"] - alone["denoiser"])
    assert options.training_flops(base) - options.step_flops(base, 128, 0) / 128 == pytest.approx(prompts)
    assert 0.02 < prompts / options.training_flops(base) < 0.05


def test_the_share_of_tokens_scales_the_head_alone():
    base = BASES["laptop"]
    flops = forward_flops(SHAPES["laptop"], base, 128, 32)
    whole, half = (Options(token_fraction=f).training_flops(base) for f in (1.0, 0.5))
    assert whole - half == pytest.approx(0.5 * 2 * flops["token head"])
    assert Options(consistency=1.0, token_fraction=1.0).training_flops(base) - whole == pytest.approx(flops["denoiser"])


# -- options --------------------------------------------------------------------------------------------------------


def test_the_cell_of_the_grid_is_valid():
    (cell,) = params.load("laptop", cells=["ldlm"]).cells
    options = room_options(cell.method)(**cell.options)
    need = options.requirements(30).anchors
    assert (need.layers, need.positions, need.heldout) == (("28",), "response", True)
    assert options.capabilities().latent
    assert options.capabilities().diagnostics
    assert not options.capabilities().nelbo


def test_a_prompt_encoder_that_reads_states_asks_for_all_positions():
    assert Options(prompt_encoder="backbone").requirements(LAYERS).anchors.positions == "all"
    assert Options(anchor_sequences=7).requirements(LAYERS).anchors.sequences == 7


def test_noise_of_the_decoder_is_the_same_per_token_at_any_width():
    options = Options()
    assert options.noise_level(768) == 3.0
    assert options.noise_level(192) == pytest.approx(1.5)
    assert Options(decoder_noise=0.0).noise_level(192) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_width": 0},
        {"prompt_depth": -1},
        {"denoiser_width": 100, "head_width": 32},
        {"token_width": 33},
        {"unknown": 3},
    ],
)
def test_sizes_that_make_no_network_are_refused_before_one_is_built(changes):
    with pytest.raises(ValidationError) as caught:
        Shape(**{**SHAPE.model_dump(), **changes})
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [{"layer": 0}, {"self_condition": 1.5}, {"token_fraction": 0.0}, {"ema_decay": 1.0}, {"solver": "euler"}, {"x": 1}],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValidationError):
        Options(**bad)
