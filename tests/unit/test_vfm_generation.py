"""Generation of VFM against a plain float64 sampler; batch = one at a time; soft masks; health; keeping."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_core import DiffusionGenerationConfig
from dllm_core.backbone.conversion import convert
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.errors import ContractError, DllmError
from dllm_core.methods.cell import load_cell, save_cell
from dllm_core.methods.protocol import Resources, SamplingRequest
from dllm_core.methods.vfm import health, soft_masks
from dllm_core.methods.vfm.method import Method
from dllm_core.methods.vfm.options import Options
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings
from tests.ldlm_tools import LAYOUTS, extracted_anchors, random_anchors
from tests.method_tools import corrupt, split_losses
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, write_source
from tests.vfm_tools import LAYERS, SHAPE, Naive, phase_info, tiny_vfm

PROMPTS = [torch.tensor([5, 9, 2]), torch.tensor([11]), torch.tensor([3, 4, 8, 15, 16, 23]), torch.tensor([42, 7])]


def _config(passes: int = 3, **more) -> DiffusionGenerationConfig:
    return DiffusionGenerationConfig(
        **{"max_new_tokens": 6, "max_denoising_steps": passes, "stop_at_eos": False, **more}
    )


def _eps(seed: int, sample: int, width: int = 32) -> Tensor:
    return torch.randn(6, width, generator=NoiseSource(seed).generator(sample, 0, "latent"))


@torch.no_grad()
def naive_tokens(method: Method, prompt: Tensor, passes: int, eps_LD: Tensor, source: str) -> Tensor:
    naive = Naive(method)
    ids, slots = [*prompt.tolist(), *[0] * 6], list(range(len(prompt), len(prompt) + 6))
    z_LD = eps_LD.double()
    if source == "adapter":
        read_PD = torch.stack([naive.unit(i) for i in prompt.tolist()])[None]
        seen = torch.ones(1, len(prompt), dtype=torch.bool)
        adapter = naive.method.adapter
        inner = adapter.to_width(read_PD)
        at = torch.arange(-len(prompt), 0), torch.arange(6)
        real = torch.ones(1, 6, dtype=torch.bool)
        out = adapter.perceiver(inner, adapter.query_W.expand(1, 6, -1), *at, seen, real)
        z_LD = adapter.mean(out)[0] + adapter.log_std(out)[0].clamp(-5, 2).exp() * z_LD
    unseen = list(range(len(prompt))) if method.options.prompt == "hidden" else []
    return naive.sample(ids, slots, z_LD, passes, unseen).argmax(1)


@pytest.mark.parametrize("source", ["adapter", "normal"])
@pytest.mark.parametrize("passes", [1, 2, 5])
@pytest.mark.parametrize("prompt", ["visible", "hidden"])
def test_the_sampler_equals_a_plain_float64_one(source, passes, prompt):
    method = tiny_vfm(prompt=prompt, move=0.1).eval()
    out = method.generate(PROMPTS, _config(passes, seed=3), sample_ids=[4, 5, 6, 7], source=source)
    for row, ids in enumerate(PROMPTS):
        wanted = naive_tokens(method, ids, passes, _eps(3, 4 + row), source)
        assert out.sequences[row].tolist() == [*ids.tolist(), *wanted.tolist()]
    assert out.num_forwards == passes + (source == "adapter")
    assert out.new_tokens == [6] * 4


def test_every_family_runs(family):
    method = tiny_vfm(move=0.1, backbone={"family": family}).eval()
    out = method.generate(PROMPTS, _config(2, seed=3))
    for row, ids in enumerate(PROMPTS):
        assert out.sequences[row].tolist() == [
            *ids.tolist(),
            *naive_tokens(method, ids, 2, _eps(3, row), "adapter").tolist(),
        ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"prompt": "hidden"}, {"freeze_base": True}])
def test_a_batch_equals_its_rows_one_at_a_time(temperature, options):
    method = tiny_vfm(move=0.1, **options).eval()
    config = _config(4, temperature=temperature, seed=2)
    together = method.generate(PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        alone = method.generate([prompt], config, sample_ids=[row])
        assert torch.equal(alone.sequences[0], together.sequences[row])


def test_noise_is_keyed_by_seed_and_sample():
    method = tiny_vfm(move=0.1).eval()
    first = method.generate(PROMPTS[:1] * 3, _config(2))
    assert torch.equal(
        torch.stack(first.sequences), torch.stack(method.generate(PROMPTS[:1] * 3, _config(2)).sequences)
    )
    assert not torch.equal(first.sequences[0], first.sequences[1])  # greedy, yet another sample
    other = method.generate(PROMPTS[:1] * 3, _config(2, seed=1))
    assert not torch.equal(first.sequences[0], other.sequences[0])
    assert torch.equal(method.generate(PROMPTS[:1], _config(2), sample_ids=[2]).sequences[0], first.sequences[2])


def test_requests_lengths_and_ends():
    method = tiny_vfm(move=0.1)
    out = method.sample(PROMPTS[:2], SamplingRequest(max_new_tokens=5, num_steps=8))
    assert out.new_tokens == [5, 5]
    assert out.num_forwards == 9
    assert all(int(s.max()) < NUM_TOKENS for s in out.sequences)
    ended = method.generate(PROMPTS[:1], _config(1))
    token = int(ended.sequences[0][5])
    cut = method.generate(PROMPTS[:1], _config(1, stop_at_eos=True, eos_token_id=token))
    assert (
        cut.sequences[0].tolist() == ended.sequences[0][: 3 + ended.sequences[0][3:].tolist().index(token) + 1].tolist()
    )


def test_clear_errors_of_generation():
    method = tiny_vfm()
    for wrong in ([], [torch.tensor([], dtype=torch.long)], [torch.ones(2, 2, dtype=torch.long)]):
        with pytest.raises(DllmError, match="prompt is empty"):
            method.generate(wrong, _config())
    with pytest.raises(DllmError, match="sample ids"):
        method.generate(PROMPTS, _config(), sample_ids=[1])
    with pytest.raises(DllmError, match="Unknown source"):
        method.generate(PROMPTS, _config(), source="prior")  # type: ignore[arg-type]
    with pytest.raises(DllmError, match="64 positions"):
        method.generate(PROMPTS, _config(max_new_tokens=60))
    with pytest.raises(DllmError, match="not at hand"):
        tiny_vfm(prompt_encoder="states").generate(PROMPTS, _config())


# -- the frozen base --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_soft_masks_equal_a_plain_float64_loss(attention):
    method = tiny_vfm(move=0.1, freeze_base=True, frozen_attention=attention, tau=0.7, gate=0.6)
    batch, resources = LAYOUTS["ragged"]().batch_of(range(4)), random_anchors(LAYOUTS["ragged"](), "2")
    assert method.layer == "2"
    corrupted, totals = corrupt(method, batch, phase_info("adapter"))
    found, parts, grads = split_losses(method, corrupted, totals, [1, 3], resources, phase_info("adapter"))
    naive, losses = Naive(method), []
    for row in range(4):
        response = batch.response_BL[row].nonzero()[:, 0].tolist()
        ids = batch.input_ids_BL[row, : response[-1] + 1].tolist()
        mean_LD, _ = naive.posterior(batch, row, list(range(response[0])), len(response), resources)
        mask_D = naive.table_VD[method.backbone.contract.mask_token_id]
        rows = [naive.table_VD[token] for token in ids]
        undecided = corrupted.masked_BL[row].nonzero()[:, 0].tolist()
        for i in undecided:
            rows[i] = mask_D + 0.6 * naive.table_VD[:NUM_TOKENS].square().mean().sqrt() * mean_LD[i - response[0]]
        with torch.no_grad():
            states = naive.backbone.hidden(inputs_embeds_BLD=torch.stack(rows)[None], causal=attention == "causal")[0]
            losses.append(sum(-float(naive.logp(states[i - 1])[ids[i]]) for i in undecided) / len(undecided))
    assert parts["ce_nats"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert found == pytest.approx(sum(losses) / 4 / (2 * 0.7**2), rel=1e-4)
    assert parts["gate"] == pytest.approx(0.6, rel=1e-5)
    assert {n.split(".")[0] for n, g in grads.items() if g.any()} == {"adapter", "log_gate"}


def test_a_frozen_base_stays_bit_identical_and_the_gate_open(tmp_path):
    data = random_sequences(8, 12, 4, 3)
    method = tiny_vfm(freeze_base=True, gate=0.1, prompt_encoder="embedding", move=0.0)
    before = {n: p.detach().clone() for n, p in method.backbone.named_parameters()}
    corrupted, totals = corrupt(method, data.batch_of(range(8)), phase_info("adapter", batch_size=8), seed=7)

    def loss() -> float:
        return split_losses(method, corrupted, totals, [8], None, phase_info("adapter"))[0]

    start = loss()
    rows = _train(method, data, tmp_path, steps=30, lr=0.02)
    assert [row["phase"] for row in rows] == ["adapter"] * 30
    for name, parameter in method.backbone.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert loss() < start - 0.1
    assert float(method.gate.detach()) > 0
    with torch.no_grad():
        method.log_gate.fill_(-30.0)
    assert float(method.gate.detach()) > 0


def test_soft_masks_decide_the_most_confident_slots_in_equal_parts():
    open_BL = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    score_BL = torch.tensor([[0.1, 0.9, 5.0, 0.9, 0.2], [9.0, 0.3, 0.3, 9.0, 9.0]])
    chosen_BL = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(soft_masks.decide(score_BL, open_BL, 3), chosen_BL)
    assert torch.equal(soft_masks.decide(score_BL, open_BL, 1), open_BL)
    method = tiny_vfm(freeze_base=True, prompt_encoder="embedding", move=0.1)
    for asked, passes in ((1, 1), (4, 4), (20, 6)):
        assert method.generate(PROMPTS, _config(asked)).num_forwards == passes + 1


def test_states_read_live_are_those_of_the_store(tmp_path):
    """A frozen base reads prompts itself when it generates: the same as the anchors it was trained from."""
    method = tiny_vfm(freeze_base=True, move=0.1)
    data = LAYOUTS["ragged"]()
    resources = extracted_anchors(tmp_path, data, method.options, method.backbone)
    batch = data.batch_of(range(4))
    cut = health.segments_of(batch)
    stored, live = method.posterior(batch, cut, resources), method.posterior(batch, cut, None)
    torch.testing.assert_close(stored.mean_SLD[cut.real_SL], live.mean_SLD[cut.real_SL], rtol=1e-4, atol=1e-5)
    method.prepare(data, range(4), resources)
    states = method.language_model_states(batch)[
        (batch.document_BL >= 0) & ~batch.response_BL & (batch.position_BL > 0)
    ]
    torch.testing.assert_close(method.mean_D, states.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.std_D, states.std(0, correction=0), rtol=1e-3, atol=1e-5)


def test_anchors_that_are_missing_or_of_another_model_are_told():
    method = tiny_vfm(prompt_encoder="states")
    data = LAYOUTS["ragged"]()
    corrupted, totals = corrupt(method, data.batch_of(range(4)), phase_info("flow"), seed=1)
    assert bool(corrupted.extras["adapter_B"].any())
    with pytest.raises(DllmError, match="no anchor store was given"):
        method.loss(corrupted, totals, phase_info("flow"), Resources())
    with pytest.raises(DllmError, match="48 wide, the base model is 32"):
        method.loss(corrupted, totals, phase_info("flow"), random_anchors(data, method.layer, hidden=48))


# -- health ---------------------------------------------------------------------------------------------------------


def test_health_says_what_the_noise_carries():
    method = tiny_vfm(move=0.2)
    batch = random_sequences(4, 14, 4, NUM_TOKENS).batch_of(range(4))
    found = method.diagnose(batch, Resources(), NoiseSource(0))
    assert set(found["one_pass_nats"]) == {"adapter", "normal", "other_prompt"}
    assert len(set(found["one_pass_nats"].values())) == 3
    assert set(found["sample_agreement"]) == {"normal", "other_prompt", "other_draw"}
    assert set(found["pass_agreement"]) == {"1", "2", "4", "8"}
    assert found["pass_agreement"]["8"] == 1.0
    assert set(found["repeated_token"]) == set(found["repeated_4gram"]) == {"1", "2", "4", "8"}
    assert found["kl_nats_per_dim"] > 0
    with torch.no_grad():  # an adapter that knows nothing is told: no active dimension, no difference
        for parameter in (method.adapter.mean.weight, method.adapter.mean.bias, method.adapter.log_std.weight):
            parameter.zero_()
        method.adapter.log_std.bias.zero_()
    empty = method.diagnose(batch, Resources(), NoiseSource(0))
    assert empty["active_dimensions"] == empty["kl_nats_per_dim"] == 0.0
    assert empty["one_pass_nats"]["adapter"] == pytest.approx(empty["one_pass_nats"]["normal"])
    assert empty["sample_agreement"]["normal"] == 1.0
    with torch.no_grad():  # half of the dimensions follow the prompt
        method.adapter.mean.weight[:16] = torch.randn(16, 24)
    assert method.diagnose(batch, Resources(), NoiseSource(0))["active_dimensions"] == 0.5
    single = method.diagnose(batch.rows(0, 1), Resources(), NoiseSource(0))
    assert "other_prompt" not in single["one_pass_nats"]


def test_health_of_a_frozen_base():
    method = tiny_vfm(freeze_base=True, prompt_encoder="embedding", move=0.3, gate=0.5)
    batch = random_sequences(3, 14, 4, NUM_TOKENS).batch_of(range(3))
    found = method.diagnose(batch, Resources(), NoiseSource(0))
    assert set(found["one_pass_nats"]) == {"adapter", "normal", "other_prompt"}
    assert found["gate"] == pytest.approx(0.5, rel=1e-5)
    assert "kl_nats_per_dim" not in found


def test_repetition_rates_and_swaps_by_hand():
    batch = LAYOUTS["ragged"]().batch_of([0, 1])  # five slots, then two
    cut = health.segments_of(batch)
    assert health.repetition_rates(torch.tensor([7, 7, 7, 7, 7, 1, 2]), cut) == (4 / 5, 1 / 2)
    values = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])[..., None]
    assert health.swapped(values, cut)[..., 0].tolist() == [[6, 7, 6, 7, 6], [1, 2, 3, 4, 5]]


# -- keeping --------------------------------------------------------------------------------------------------------


def _train(method: Method, data, workdir: Path, steps: int = 8, stop_at: int | None = None, **settings) -> list[dict]:
    rows: list[dict] = []
    given = {"steps": steps, "batch_size": 4, "lr": 0.01, "checkpoint_every_s": None, **settings}
    Trainer(
        method, data, SampleOrder(len(data), 0), TrainSettings(**given), Resources(), NoiseSource(0), workdir,
        rows.append, peak_flops=1e9,
    ).run(stop_at)  # fmt: skip
    return rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(dtype, stop_at, tmp_path):
    data, options = random_sequences(8, 12, 4, NUM_TOKENS), {"paired_share": 0.5, "paired_fraction": 0.7}
    whole = tiny_vfm(**options)
    rows = _train(whole, data, tmp_path / "whole", dtype=dtype)
    assert [row["phase"] for row in rows] == ["flow"] * 4 + ["paired"] * 4
    _train(tiny_vfm(**options), data, tmp_path / "cut", stop_at=stop_at, dtype=dtype)
    resumed = tiny_vfm(**options, seed=9)
    assert resumed.teacher.is_empty
    again = _train(resumed, data, tmp_path / "cut", dtype=dtype)
    assert [r["train/loss"] for r in again] == [r["train/loss"] for r in rows[stop_at:]]
    found = resumed.state_dict()
    assert found.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("base")
    convert(write_source(root / "source", layers=LAYERS), root / "base", alignment="shifted")
    return root / "base"


def _cell(base_dir: Path, target: Path, **options) -> Method:
    torch.manual_seed(3)
    method = Method.from_base(base_dir, Options(shape=SHAPE, rollout_steps=3, **options))
    _train(method, random_sequences(8, 12, 4, NUM_TOKENS), target / "work", steps=2, lr=1e-3)
    save_cell(method, target / "cell", cell="vfm", room="vfm", seed=0, tokenizer_dir=base_dir)
    return method


@pytest.mark.parametrize("options", [{}, {"prompt": "hidden"}, {"freeze_base": True, "prompt_encoder": "embedding"}])
def test_a_loaded_cell_generates_the_same(options, base_dir, tmp_path):
    method = _cell(base_dir, tmp_path, **options)
    loaded = load_cell(tmp_path / "cell")
    wanted = method.generate(PROMPTS, _config(3, temperature=1.0))
    found = loaded.generate(PROMPTS, _config(3, temperature=1.0))
    assert all(torch.equal(a, b) for a, b in zip(wanted.sequences, found.sequences, strict=True))
    assert loaded.teacher.is_empty
    assert loaded.num_new_parameters() == method.num_new_parameters()
    half = load_cell(tmp_path / "cell", dtype=torch.bfloat16)
    assert half.mean_D.dtype == half.std_D.dtype == torch.float32
    assert half.generate(PROMPTS, _config(2)).new_tokens == [6] * 4


def test_a_cell_that_reads_states_brings_its_language_model(base_dir, tmp_path):
    torch.manual_seed(3)
    method = Method.from_base(base_dir, Options(shape=SHAPE, prompt_encoder="states"))
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # the base moves, what reads the prompt does not
    wanted = method.generate(PROMPTS, _config(2))
    assert wanted.num_forwards == 2 + 2
    save_cell(method, tmp_path / "cell", cell="vfm", room="vfm", seed=0, tokenizer_dir=base_dir)
    loaded = load_cell(tmp_path / "cell")
    found = loaded.generate(PROMPTS, _config(2))
    assert all(torch.equal(a, b) for a, b in zip(wanted.sequences, found.sequences, strict=True))
    shutil.rmtree(tmp_path / "cell" / "language_model")
    with pytest.raises(DllmError, match="not at hand"):
        load_cell(tmp_path / "cell").generate(PROMPTS, _config(2))


def test_cells_of_another_kind_size_or_base_are_refused(base_dir, tmp_path):
    _cell(base_dir, tmp_path)
    cell = tmp_path / "cell"

    def load(**options):
        return Method.from_pretrained(cell, Options(**{"shape": SHAPE, **options}), dtype=torch.float32, device="cpu")

    load()
    for options, message in (
        ({"prompt": "hidden"}, "prompt = visible, but hidden"),
        ({"freeze_base": True}, "freeze_base = False, but True"),
        ({"prompt_encoder": "states"}, "reads = embedding, but 2"),
        ({"shape": {"width": 16, "depth": 1, "head_width": 8}}, "do not fit their options"),
    ):
        with pytest.raises(ContractError, match=message):
            load(**options)
    with pytest.raises(ContractError, match=r"holds no readable vfm\.safetensors"):
        Method.from_pretrained(base_dir, Options(shape=SHAPE), dtype=torch.float32, device="cpu")
    wide = tmp_path / "wide base"
    convert(write_source(tmp_path / "wide", hidden=64, layers=LAYERS), wide, alignment="shifted")
    shutil.copy(cell / "vfm.safetensors", wide)
    with pytest.raises(ContractError, match="hidden_size = 32, but 64"):
        Method.from_pretrained(wide, Options(shape=SHAPE), dtype=torch.float32, device="cpu")
