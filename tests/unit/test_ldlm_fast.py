"""Plans against the reference: same tokens, same latents, whatever the solver, the guidance and the batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.errors import DllmError
from dllm_core.layers import compiling, packed_linear
from dllm_core.layers.attention import Attention, joined, rotation
from dllm_core.methods.ldlm import fast, generation, packed, parts, plans
from dllm_core.methods.ldlm.method import Method
from dllm_core.samplers.config import DiffusionGenerationConfig
from tests.ldlm_tools import SHAPE, tiny_ldlm
from tests.tiny import NUM_TOKENS

LATENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def model(dtype: torch.dtype = torch.float32, **options: Any) -> Method:
    return tiny_ldlm(**options).to(dtype).eval()


def prompts(rows: int = 2, length: int = 5, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(NUM_TOKENS, (length,), generator=generator) for _ in range(rows)]


def job(method: Method, steps: int, rows: Sequence[Tensor] | None = None, tokens: int = 11, **more: Any) -> Any:
    config = DiffusionGenerationConfig(max_new_tokens=tokens, max_denoising_steps=steps, seed=7, stop_at_eos=False)
    return generation.job_of(method, prompts() if rows is None else rows, config, **more)


@torch.no_grad()
def both(method: Method, work: Any, sampler: fast.FastSampler | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents and tokens of the reference, then of the plan."""
    latents_BLK, real_BL, _ = generation.latents(method, work)
    tokens_BL = generation.tokens_of(method, work, latents_BLK, real_BL)
    sampler = sampler or fast.FastSampler(method)
    plan = sampler.plan(fast.shape_of(work))
    sampler.put(plan, work)
    found_BL = plan.run()
    return latents_BLK, tokens_BL, plan.latents_BLK, found_BL


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "sde"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_plan_generates_what_the_reference_does(solver: str, steps: int, guidance: float) -> None:
    method = model()
    latents_BLK, tokens_BL, fast_BLK, fast_BL = both(method, job(method, steps, solver=solver, guidance=guidance))
    assert error(fast_BLK, latents_BLK) < LATENT_TOLERANCE[torch.float32]
    assert torch.equal(fast_BL, tokens_BL)


def moved_density(method: Method) -> None:
    """Let the time density follow losses that rise late."""
    before = method.times.grid(4)
    method.times.refresh_every = 1
    for _ in range(50):
        t_B = torch.rand(512) * 0.98 + 0.01
        method.times.observe(t_B, t_B**4)
        method.times.end_step()
    assert not torch.allclose(method.times.grid(4), before, atol=0.02)


@pytest.mark.parametrize("head", ["frozen", "own"])
@pytest.mark.parametrize("grid", ["u", "t"])
def test_heads_and_grids(head: str, grid: str) -> None:
    method = model(shape=SHAPE.model_copy(update={"token_head": head, "prompt_depth": 0}), grid=grid)
    moved_density(method)
    latents_BLK, tokens_BL, fast_BLK, fast_BL = both(method, job(method, 4, solver="sde"))
    assert error(fast_BLK, latents_BLK) < LATENT_TOLERANCE[torch.float32]
    assert torch.equal(fast_BL, tokens_BL)


def test_bf16_stays_within_its_rounding_of_the_reference() -> None:
    method = model(torch.bfloat16)
    latents_BLK, tokens_BL, fast_BLK, fast_BL = both(method, job(method, 5, solver="sde", tokens=32))
    assert fast_BLK.dtype == torch.bfloat16
    assert error(fast_BLK, latents_BLK) < LATENT_TOLERANCE[torch.bfloat16]
    assert float((fast_BL == tokens_BL).float().mean()) > 0.8


def test_bf16_is_as_near_to_fp32_as_the_reference_is() -> None:
    exact = model(torch.bfloat16).float()
    low = model(torch.bfloat16)
    truth_BLK, *_ = both(exact, job(exact, 5, tokens=32))
    reference_BLK, _, fast_BLK, _ = both(low, job(low, 5, tokens=32))
    assert error(fast_BLK, truth_BLK) < 1.5 * error(reference_BLK, truth_BLK)


def test_a_batch_equals_its_rows_one_at_a_time() -> None:
    method, rows = model(), prompts(3)
    together = method.generate(rows, job(method, 3, rows).config, path="fast", solver="ddpm", sample_ids=[4, 9, 2])
    for row, sample, expected in zip(rows, [4, 9, 2], together.sequences, strict=True):
        alone = method.generate([row], job(method, 3, rows).config, path="fast", solver="ddpm", sample_ids=[sample])
        assert torch.equal(alone.sequences[0], expected)


def test_outputs_look_alike_from_outside() -> None:
    method = model()
    for temperature, guidance in ((0.0, 1.0), (0.8, 2.0)):
        config = DiffusionGenerationConfig(max_new_tokens=9, max_denoising_steps=3, temperature=temperature)
        found, expected = (
            method.generate(prompts(), config, path=path, guidance=guidance) for path in ("fast", "reference")
        )
        assert found.num_forwards == expected.num_forwards
        assert found.new_tokens == expected.new_tokens
        assert all(torch.equal(a, b) for a, b in zip(found.sequences, expected.sequences, strict=True))


def test_a_second_job_leaves_nothing_behind() -> None:
    method = model()
    sampler = fast.FastSampler(method)
    first = job(method, 3, solver="sde")
    *_, alone_BLK, alone_BL = both(method, first, sampler)
    alone_BLK, alone_BL = alone_BLK.clone(), alone_BL.clone()
    both(method, job(method, 3, prompts(seed=8), solver="sde", sample_ids=[5, 6]), sampler)
    *_, again_BLK, again_BL = both(method, first, sampler)
    assert torch.equal(again_BLK, alone_BLK)
    assert torch.equal(again_BL, alone_BL)


@pytest.mark.parametrize("name", ["networks.denoiser.from_before.weight", "embedding_VD", "networks.denoiser.out.bias"])
def test_changed_weights_are_seen(name: str) -> None:
    method = model()
    config = job(method, 3).config
    before = method.generate(prompts(), config, path="fast")
    with torch.no_grad():
        method.get_parameter(name).copy_(torch.randn_like(method.get_parameter(name)))
    after, expected = (method.generate(prompts(), config, path=path) for path in ("fast", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(after.sequences, expected.sequences, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after.sequences, before.sequences, strict=True))


def test_a_changed_time_density_is_seen() -> None:
    method = model(grid="u")
    work, sampler = job(method, 4), fast.FastSampler(method)
    both(method, work, sampler)
    moved_density(method)
    latents_BLK, _, fast_BLK, _ = both(method, work, sampler)
    assert error(fast_BLK, latents_BLK) < LATENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize(("solver", "draws"), [("ddim", 1), ("ddpm", 5), ("sde", 5)])
def test_no_noise_is_drawn_in_vain(solver: Any, draws: int) -> None:
    """The start and a draw a step, but for the last, whose prediction is the result."""
    assert plans.Shape(1, 2, 3, 5, solver).num_noises == draws


def test_old_plans_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "KEPT_PLANS", 2)
    method = model()
    sampler = fast.FastSampler(method)
    shapes = [fast.shape_of(job(method, steps)) for steps in (1, 2, 3)]
    kept = [sampler.plan(shape) for shape in shapes]
    assert sampler.plan(shapes[2]) is kept[2]
    assert sampler.plan(shapes[1]) is kept[1]
    assert sampler.plan(shapes[0]) is not kept[0]
    assert sampler.plan(shapes[1]) is kept[1]
    assert sampler.plan(shapes[2]) is not kept[2]


def test_what_has_no_plan_falls_back_and_says_why() -> None:
    method = model()
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    for more, reason in (({"lengths": [3, 5]}, "rows differ"), ({}, "prompts differ")):
        given = prompts() if "lengths" in more else rows
        work = job(method, 2, given, **more)
        assert reason in str(fast.refusal(method, work))
        auto, expected = (method.generate(given, work.config, path=p, **more) for p in ("auto", "reference"))
        assert all(torch.equal(a, b) for a, b in zip(auto.sequences, expected.sequences, strict=True))
        for path in ("fast", "compiled"):
            with pytest.raises(DllmError, match=reason):
                method.generate(given, work.config, path=path, **more)
    assert (
        fast.refusal(model(prompt_encoder="backbone"), job(method, 2)) == "prompts are read through the language model"
    )


def test_auto_takes_the_plans_and_training_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    method, ran = model(), []
    original = plans.Plan.run
    monkeypatch.setattr(plans.Plan, "run", lambda self: ran.append(1) or original(self))
    config = job(method, 1).config
    method.generate(prompts(), config)
    assert ran == [1]
    method.generate(prompts(), config, path="reference")
    method.train().generate(prompts(), config)
    assert ran == [1]
    assert method.training


def test_compiling_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "compiled", parts.eager)  # what is compiled does not matter here
    method, config = model(), job(model(), 2).config
    method.generate(prompts(), config)
    assert method._fast is not None
    assert not method._fast.wished
    first = method._fast
    method.generate(prompts(), config, path="fast")
    assert method._fast is first
    method.generate(prompts(), config, path="compiled")
    assert method._fast.wished


def test_copies_make_plans_of_their_own() -> None:
    method = model()
    config = job(method, 2).config
    expected = method.generate(prompts(), config).sequences
    other = copy.deepcopy(method)
    with torch.no_grad():
        method.networks.denoiser.from_noisy.weight.zero_()
    found = other.generate(prompts(), config, path="fast").sequences
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [parts.place_eager, parts.place_fused])
def test_placed_heads_attend_as_the_module_does(implementation: Any) -> None:
    torch.manual_seed(0)
    module = Attention(24, 3)
    torch.nn.init.normal_(module.query_norm.weight, 1, 0.3)
    torch.nn.init.normal_(module.key_norm.weight, 1, 0.3)
    x_BLW, context_BPW = torch.randn(2, 6, 24), torch.randn(2, 4, 24)
    slot_L, prompt_P = torch.arange(6), torch.arange(-4, 0)
    with torch.no_grad():
        own, other = rotation(slot_L, 8), rotation(prompt_P, 8)
        seen = joined(module.keys_values(context_BPW, other), module.keys_values(x_BLW, own))
        expected = module(x_BLW, seen, own)
        weights = packed.AttentionWeights.of(module, torch.Tensor.detach, looks_elsewhere=True)
        looked = packed.Looked.empty(x_BLW, 2, 3, 10, 8)
        run = parts.Parts(**{**vars(parts.eager()), "place": implementation})
        tables = [packed.Table.at(p, weights.norms, torch.float32) for p in (prompt_P, slot_L)]
        packed.look_at(run, context_BPW, weights, tables[0], looked)
        found = packed.attention(run, x_BLW, weights, tables[1], looked)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fused_parts_generate_the_same_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = dataclasses.replace(parts.eager(), place=parts.place_fused, step=parts.step_fused, in_tensors=True)
    monkeypatch.setattr(parts, "compiled", lambda: fused)
    method = model()
    for solver in ("ddim", "sde"):
        sampler = fast.FastSampler(method, compiled=True)
        latents_BLK, tokens_BL, fast_BLK, fast_BL = both(method, job(method, 4, solver=solver, guidance=2.0), sampler)
        assert error(fast_BLK, latents_BLK) < LATENT_TOLERANCE[torch.float32]
        assert torch.equal(fast_BL, tokens_BL)


def test_steps_in_tensors_and_in_numbers_agree() -> None:
    state, x0_hat, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    numbers = plans.solver_plan("sde", [1.0, 0.7, 0.4, 0.1], tiny_ldlm(move=0).schedule)[2]
    assert numbers.c_before
    assert numbers.c_noise
    a, b = state.clone(), state.clone()
    parts.step_eager(a, x0_hat, noise, numbers)
    parts.step_fused(b, x0_hat, noise, torch.tensor(numbers))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a[..., 4:], x0_hat)


def test_without_reordering_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "reorders", lambda dtype: False)
    method = model()
    latents_BLK, tokens_BL, fast_BLK, fast_BL = both(method, job(method, 3, solver="sde"))
    assert error(fast_BLK, latents_BLK) < LATENT_TOLERANCE[torch.float32]
    assert torch.equal(fast_BL, tokens_BL)


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    sampler = fast.FastSampler(model(), compiled=True)
    assert not sampler.compiled
    assert "compiler" in sampler.notes["compile"]


def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no such target\nand more")

    monkeypatch.setattr(parts, "compiled", lambda: dataclasses.replace(parts.eager(), place=broken, in_tensors=True))
    monkeypatch.setattr(fast, "can_compile", lambda device: None)
    method = model()
    sampler = fast.FastSampler(method, compiled=True)
    _, tokens_BL, _, fast_BL = both(method, job(method, 3, solver="sde"), sampler)
    assert torch.equal(fast_BL, tokens_BL)
    assert not sampler.compiled
    assert sampler.notes == {"compile": "no such target"}


@pytest.mark.slow
@pytest.mark.skipif(fast.can_compile(torch.device("cpu")) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("solver", ["ddim", "sde"])
def test_compiled_parts_generate_the_same(solver: str) -> None:
    method = model()
    sampler = fast.FastSampler(method, compiled=True)
    assert sampler.compiled
    latents_BLK, tokens_BL, fast_BLK, fast_BL = both(method, job(method, 3, solver=solver), sampler)
    assert sampler.compiled, sampler.notes
    assert error(fast_BLK, latents_BLK) < LATENT_TOLERANCE[torch.float32]
    assert torch.equal(fast_BL, tokens_BL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["ddim", "sde"])
def test_graphs_replay_what_the_reference_does(compiled: bool, dtype: torch.dtype, solver: str) -> None:
    method = model(dtype).to("cuda")
    sampler = fast.FastSampler(method, compiled=compiled)
    assert (sampler.graphs, sampler.compiled) == (True, compiled), sampler.notes
    for seed in (3, 8):  # the second job replays what the first one recorded
        work = job(method, 4, prompts(seed=seed), tokens=32, solver=solver, guidance=1.5, sample_ids=[seed, 1])
        latents_BLK, tokens_BL, fast_BLK, fast_BL = both(method, work, sampler)
        assert error(fast_BLK, latents_BLK) < max(LATENT_TOLERANCE[dtype], 1e-4)
        assert float((fast_BL == tokens_BL).float().mean()) > (0.8 if dtype is torch.bfloat16 else 0.95)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_does_not_wait_for_the_device() -> None:
    method = model().to("cuda")
    sampler = fast.FastSampler(method, compiled=False, graphs=False)
    plan = sampler.plan(fast.shape_of(job(method, 4)))
    plan.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
