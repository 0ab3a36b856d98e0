"""Generation of LDLM: against a plain float64 sampler, batch = one at a time, keyed noise, averages, end of text."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dllm_core import DiffusionGenerationConfig
from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.methods.ldlm import generation
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.protocol import SamplingRequest
from tests import ldlm_tools
from tests.ldlm_tools import tiny_ldlm
from tests.method_tools import step_info

PROMPTS = [torch.tensor([5, 9, 2]), torch.tensor([11]), torch.tensor([3, 4, 8, 15, 16, 23]), torch.tensor([42, 7])]
LENGTHS = [4, 7, 5, 3]


def _config(steps: int = 3, **more) -> DiffusionGenerationConfig:
    return DiffusionGenerationConfig(
        **{"max_new_tokens": 6, "max_denoising_steps": steps, "stop_at_eos": False, **more}
    )


def _clean_latents(method: Method, job: generation.Job) -> Tensor:
    with torch.no_grad():
        return generation.latents(method, job)[0]


@torch.no_grad()
def naive_ddim(method: Method, prompt: Tensor, length: int, steps: int, guidance: float, seed: int, sample: int):
    """Return (tokens, latents) of one row in float64: x_s = alpha_s x0 + sigma_s (x_t - alpha_t x0) / sigma_t."""
    networks, d = ldlm_tools.double(method.networks), method.options.schedule_d
    generator = NoiseSource(seed).generator(sample, 0, "latent")
    x_LK = torch.randn(length, method.networks.latent_dim, generator=generator).double()
    prompt_PD, before_LK = method.embedding_VD.double()[prompt], torch.zeros_like(x_LK)
    times = [1 - k / steps * (1 - 0.01) for k in range(steps + 1)]

    def weights(t: float) -> tuple[float, float]:
        ratio = d * math.tan(math.pi * t / 2) if t < 1 else math.inf
        return 1 / math.hypot(1, ratio), 1.0 if t == 1 else ratio / math.hypot(1, ratio)

    for t, s in pairwise(times):
        x0_LK = ldlm_tools.denoise(networks, x_LK, t, before_LK, prompt_PD)
        if guidance != 1:
            free_LK = ldlm_tools.denoise(networks, x_LK, t, before_LK, prompt_PD[:0])
            x0_LK = free_LK + guidance * (x0_LK - free_LK)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = weights(t), weights(s)
        x_LK = alpha_s * x0_LK + sigma_s * (x_LK - alpha_t * x0_LK) / sigma_t
        before_LK = x0_LK
    states_LD = ldlm_tools.latent_map(networks.latent_decoder, x0_LK)
    table_VD = method.embedding_VD.double()
    head_VD = table_VD / table_VD.norm(dim=1, keepdim=True)
    return (ldlm_tools.token_rows(networks, states_LD) @ head_VD.T).argmax(1), x0_LK


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_ddim_equals_a_plain_float64_sampler(steps, guidance):
    method = tiny_ldlm().eval()
    config = _config(steps, seed=3)
    job = generation.job_of(
        method, PROMPTS, config, lengths=LENGTHS, sample_ids=[4, 5, 6, 7], solver="ddim", guidance=guidance
    )
    latents_BLK = _clean_latents(method, job)
    out = method.generate(PROMPTS, config, lengths=LENGTHS, sample_ids=[4, 5, 6, 7], solver="ddim", guidance=guidance)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens_L, x0_LK = naive_ddim(method, prompt, length, steps, guidance, 3, 4 + row)
        torch.testing.assert_close(latents_BLK[row, :length].double(), x0_LK, rtol=1e-3, atol=1e-4)
        assert out.sequences[row].tolist() == prompt.tolist() + tokens_L.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "sde"])
def test_a_batch_equals_its_rows_one_at_a_time(solver, guidance, temperature):
    method = tiny_ldlm().eval()
    config, ids = _config(temperature=temperature), [9, 2, 30, 4]
    more = {"solver": solver, "guidance": guidance}
    together = method.generate(PROMPTS, config, lengths=LENGTHS, sample_ids=ids, **more)
    job = generation.job_of(method, PROMPTS, config, lengths=LENGTHS, sample_ids=ids, **more)
    latents_BLK = _clean_latents(method, job)
    assert together.new_tokens == LENGTHS
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        alone = method.generate([prompt], config, lengths=[length], sample_ids=[ids[row]], **more)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        single = generation.job_of(method, [prompt], config, lengths=[length], sample_ids=[ids[row]], **more)
        torch.testing.assert_close(latents_BLK[row, :length], _clean_latents(method, single)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 17, 50])
def test_any_number_of_steps_from_1_to_50(steps):
    method = tiny_ldlm().eval()
    out = method.generate(PROMPTS[:2], _config(steps))
    assert out.new_tokens == [6, 6]
    assert out.num_forwards == steps + 3  # denoiser; prompt encoder, latent decoder, token decoder
    assert method.generate(PROMPTS[:2], _config(steps), guidance=2.0).num_forwards == 2 * steps + 3


def test_few_steps_are_deterministic_and_many_are_not():
    method = tiny_ldlm().eval()
    for steps, solver in ((16, "ddim"), (17, "sde")):
        assert generation.job_of(method, PROMPTS, _config(steps)).solver == solver
    assert generation.job_of(tiny_ldlm(solver="ddpm"), PROMPTS, _config(2)).solver == "ddpm"
    assert generation.job_of(tiny_ldlm(guidance=3.0), PROMPTS, _config(2)).guidance == 3.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_seed_and_the_sample_id_make_the_text(temperature):
    method = tiny_ldlm().eval()
    first = method.generate(PROMPTS, _config(seed=1, temperature=temperature)).sequences
    again = method.generate(PROMPTS, _config(seed=1, temperature=temperature)).sequences
    other = method.generate(PROMPTS, _config(seed=2, temperature=temperature)).sequences
    twins = method.generate([PROMPTS[0]] * 2, _config(seed=1, temperature=temperature), sample_ids=[0, 0]).sequences
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(twins[0], twins[1])
    assert torch.equal(twins[0], first[0])
    assert not torch.equal(method.generate([PROMPTS[0]] * 2, _config(seed=1)).sequences[1], twins[0])


def test_a_prompt_is_read():
    method = tiny_ldlm().eval()
    ids = [0, 0]
    job = generation.job_of(method, [PROMPTS[0], PROMPTS[0].flip(0)], _config(), sample_ids=ids)
    one, two = _clean_latents(method, job)
    assert float((one - two).abs().max()) > 1e-3
    free = generation.job_of(method, [PROMPTS[0], PROMPTS[0].flip(0)], _config(), sample_ids=ids, guidance=0.0)
    one, two = _clean_latents(method, free)
    assert torch.equal(one, two)


def test_text_ends_at_the_end_token():
    method = tiny_ldlm().eval()
    whole = method.generate(PROMPTS, _config(max_new_tokens=12))
    new = whole.sequences[0][3:].tolist()
    stop = next(t for t in new[1:] if t != new[0])
    cut = method.generate(PROMPTS, _config(max_new_tokens=12, stop_at_eos=True, eos_token_id=stop))
    assert cut.sequences[0].tolist() == PROMPTS[0].tolist() + new[: new.index(stop) + 1]
    for prompt, ended, free, count in zip(PROMPTS, cut.sequences, whole.sequences, cut.new_tokens, strict=True):
        assert torch.equal(ended, free[: len(ended)])
        assert len(ended) == len(prompt) + count
        assert stop not in ended[len(prompt) : -1]
    several = method.generate(PROMPTS, _config(max_new_tokens=12, stop_at_eos=True, eos_token_id=(stop, new[0])))
    assert several.new_tokens[0] == 1
    assert method.base.eos_token_ids == (0,)


def test_sample_speaks_the_protocol():
    method = tiny_ldlm().eval()
    request = SamplingRequest(max_new_tokens=5, num_steps=4, seed=2, sample_ids=(7, 8, 9, 10))
    drafts = []
    out = method.sample(PROMPTS, request, on_draft=lambda *draft: drafts.append(draft))
    same = method.generate(PROMPTS, _config(4, max_new_tokens=5, seed=2), sample_ids=[7, 8, 9, 10])
    assert all(torch.equal(a, b) for a, b in zip(out.sequences, same.sequences, strict=True))
    assert [s.device.type for s in out.sequences] == ["cpu"] * 4
    assert [s.dtype for s in out.sequences] == [torch.int64] * 4
    assert (out.new_tokens, out.num_forwards, out.commit_step) == ([5] * 4, 7, None)
    assert out.tokens_per_forward == pytest.approx(5 / 7)
    assert out.first_token_s > 0
    assert not method.capabilities.streaming


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_averaged_weights_generate_and_the_live_ones_come_back(mode):
    """In either mode: the trainer's text samples and whoever measures a method that has just been trained use eval."""
    method = tiny_ldlm().eval()
    wanted = method.generate(PROMPTS, _config()).sequences
    method.train(mode == "training")
    with torch.no_grad():
        for parameter in method.networks.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    method.ema.num_updates += 1  # as after a step of training with an average that has not moved yet
    live = {n: p.clone() for n, p in method.networks.named_parameters()}
    found = method.generate(PROMPTS, _config()).sequences
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert method.training == (mode == "training")
    for name, parameter in method.networks.named_parameters():
        assert torch.equal(parameter, live[name]), name
    method.on_step_end(step_info())
    again = method.generate(PROMPTS, _config()).sequences
    assert not all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


def test_what_cannot_be_generated_is_refused_in_two_lines():
    method = tiny_ldlm().eval()
    for prompts, more, word in (
        ([], {}, "prompt"),
        ([torch.tensor([], dtype=torch.long)], {}, "empty"),
        ([torch.zeros(2, 2, dtype=torch.long)], {}, "row"),
        (PROMPTS, {"lengths": [1, 2]}, "2 lengths"),
        (PROMPTS, {"sample_ids": [1]}, "1 sample ids"),
    ):
        with pytest.raises(DllmError) as caught:
            method.generate(prompts, _config(), **more)
        assert len(str(caught.value).split("\n")) == 2
        assert word in caught.value.problem
