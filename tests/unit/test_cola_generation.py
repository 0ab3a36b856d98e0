"""Generation of Cola: against a plain sampler without caches, batch = one at a time, counts, streaming, keyed noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_core import DiffusionGenerationConfig
from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.methods.cola import generation
from dllm_core.methods.cola.flow import steps_of_blocks
from dllm_core.methods.cola.method import Method
from dllm_core.methods.cola.objective import FlowInputs, velocities
from dllm_core.methods.protocol import SamplingRequest
from tests.cola_tools import tiny_cola

PROMPTS = [torch.tensor([5, 9, 2]), torch.tensor([11]), torch.tensor([3, 4, 8, 15, 16, 23]), torch.arange(40, 52)]
LENGTHS = [6, 9, 5, 3]
IDS = [9, 2, 30, 4]


def _config(steps: int = 7, **more) -> DiffusionGenerationConfig:
    return DiffusionGenerationConfig(
        **{"max_new_tokens": 6, "max_denoising_steps": steps, "stop_at_eos": False, **more}
    )


def _run(method: Method, prompts, config, lengths=None, ids=None, **more) -> generation.Decoding:
    job = generation.job_of(method, prompts, config, lengths=lengths, sample_ids=ids, **more)
    with torch.no_grad():
        decoding = generation.Decoding(method, job)
        for k in range(max(decoding.blocks)):
            decoding.run_block(k)
    return decoding


@torch.no_grad()
def naive(method: Method, prompt: Tensor, length: int, steps: int, guidance: float, seed: int, sample: int):
    """Return (tokens, latents) of one row: every velocity by the training layout over the whole document so far."""
    size, total = method.options.block_size, len(prompt) + length
    states = method.language_model_states(prompt[None], torch.ones(1, len(prompt), dtype=torch.bool))
    z = torch.zeros(1, total, method.networks.latent_dim)
    z[:, : len(prompt)] = method.networks.encoder(states).mean
    c = method.to_prior(z)
    noise = torch.randn(length, z.shape[-1], generator=NoiseSource(seed).generator(sample, 0, "latent"))
    first = len(prompt) // size
    blocks = range(first, -(-total // size))
    for block, count in zip(blocks, steps_of_blocks(steps, len(blocks)), strict=True):
        own = range(max(block * size, len(prompt)), min((block + 1) * size, total))
        c[0, list(own)] = noise[[i - len(prompt) for i in own]]
        stop = min((block + 1) * size, total)
        known = torch.arange(stop)[None] < len(prompt)
        for k in range(count):
            t = torch.tensor([1 - k / count])
            found = []
            for alone in (False, True):
                # z_t stands where the noisy half has it: as noise at t = 1 on nothing, whatever t the network is told
                slot = torch.arange(stop)[None]
                real = torch.ones(1, stop, dtype=torch.bool)
                prior, cut = method.networks.prior, block * size
                cache = prior.clean(c[:, :cut], slot[:, :cut], real[:, :cut]) if cut and not alone else None
                v = prior.velocity(c[:, cut:stop], t, slot[:, cut:], real[:, cut:], cache, known[:, cut:])
                found.append(v)
            v = found[1] + guidance * (found[0] - found[1])
            for i in own:
                c[0, i] -= v[0, i - block * size] / count
    z[:, len(prompt) :] = method.from_prior(c)[:, len(prompt) :]
    logits = method.networks.decoder(z)[0, len(prompt) :] @ method.head_VD.T
    return logits.argmax(-1), z[0]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 8])
def test_generation_equals_a_plain_sampler(steps, guidance):
    method = tiny_cola().eval()
    config = _config(steps, seed=3)
    found = _run(method, PROMPTS, config, LENGTHS, IDS, guidance=guidance)
    out = method.generate(PROMPTS, config, lengths=LENGTHS, sample_ids=IDS, guidance=guidance)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens, latents = naive(method, prompt, length, steps, guidance, 3, IDS[row])
        torch.testing.assert_close(found.latents_BTK[row, : len(latents)], latents, rtol=1e-4, atol=1e-4)
        assert out.sequences[row].tolist() == prompt.tolist() + tokens.tolist()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_equals_uncached(guidance):
    method = tiny_cola().eval()
    more = {"guidance": guidance}
    cached = _run(method, PROMPTS, _config(), LENGTHS, IDS, **more)
    anew = _run(method, PROMPTS, _config(), LENGTHS, IDS, cached=False, **more)
    torch.testing.assert_close(cached.latents_BTK, anew.latents_BTK, rtol=1e-5, atol=1e-5)
    assert torch.equal(cached.ids_BT, anew.ids_BT)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_batch_equals_its_rows_one_at_a_time(guidance, temperature):
    method = tiny_cola().eval()
    config = _config(temperature=temperature)
    together = method.generate(PROMPTS, config, lengths=LENGTHS, sample_ids=IDS, guidance=guidance)
    latents = _run(method, PROMPTS, config, LENGTHS, IDS, guidance=guidance).latents_BTK
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        alone = method.generate([prompt], config, lengths=[length], sample_ids=[IDS[row]], guidance=guidance)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        own = _run(method, [prompt], config, [length], [IDS[row]], guidance=guidance).latents_BTK[0]
        torch.testing.assert_close(latents[row, : len(own)], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("total", [8, 9, 11, 12])
def test_velocities_of_training_and_decoding_agree_at_every_block_edge(total):
    """The same latents and noise through the [clean | noisy] layout and through the cache, the ragged block too."""
    method = tiny_cola().eval()
    prior, size, t = method.networks.prior, 4, torch.tensor([0.7])
    generator = torch.Generator().manual_seed(0)
    c, noise = torch.randn(2, 1, total, 6, generator=generator)
    nobody = torch.zeros(1, total, dtype=torch.bool)
    inputs = FlowInputs(c, noise, t, ~nobody, nobody, nobody, (total - 1) // size * size, 0)
    slot = torch.arange(total)[None]
    with torch.no_grad():
        whole, _ = velocities(prior, inputs)
        noisy, cache = 0.3 * c + 0.7 * noise, None
        for start in range(0, total, size):
            own = slice(start, min(start + size, total))
            real = ~nobody[:, own]
            found = prior.velocity(noisy[:, own], t, slot[:, own], real, cache)
            torch.testing.assert_close(found, whole[:, own], rtol=1e-5, atol=1e-5)
            cache = prior.clean(c[:, own], slot[:, own], real, cache).after(cache)


def test_decoding_token_by_token_is_decoding_at_once():
    method = tiny_cola().eval()
    decoder, z = method.networks.decoder, torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    slot, real = torch.arange(7).expand(2, -1), torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        whole, cache, pieces = decoder(z), None, []
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            rows, cache = decoder.extend(z[:, start:stop], slot[:, start:stop], real[:, start:stop], cache)
            pieces.append(rows)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


def test_every_network_is_counted():
    """12 prompt tokens are three whole blocks of 4; 10 new ones make blocks of 4, 4 and 2, 7 steps make 3, 2 and 2."""
    method = tiny_cola(guidance=2.0).eval()
    calls = {"prior": 0, "decoder": 0, "clean": 0, "encoder": 0, "model": 0}

    def counting(name, function):
        def called(*arguments, **more):
            calls[name] += 1
            return function(*arguments, **more)

        return called

    networks, model = method.networks, method.language_model
    networks.prior.velocity = counting("prior", networks.prior.velocity)
    networks.prior.clean = counting("clean", networks.prior.clean)
    networks.decoder.extend = counting("decoder", networks.decoder.extend)
    networks.encoder.forward = counting("encoder", networks.encoder.forward)
    model.hidden = counting("model", model.hidden)
    out = method.generate([PROMPTS[3]], _config(7, record_history=True), lengths=[10])
    assert calls == {"prior": 14, "decoder": 4, "clean": 3, "encoder": 1, "model": 1}
    assert out.num_forwards == sum(calls.values()) == 23
    assert out.tokens_per_forward == pytest.approx(10 / 23)
    # prompt 4; six passes and the tokens; a clean pass, four and the tokens; and once more
    assert out.commit_step[0].tolist() == [11] * 4 + [17] * 4 + [23] * 2
    plain = method.generate([PROMPTS[3]], _config(7), lengths=[10], guidance=1.0)
    assert plain.num_forwards == 16
    short = method.generate([PROMPTS[1]], _config(1), lengths=[2])  # no whole block before, one block to make
    assert short.num_forwards == 2 + 2 + 1
    few = method.generate([PROMPTS[3]], _config(1), lengths=[10], guidance=1.0)  # at least one step a block
    assert few.num_forwards == 4 + 3 * 2 + 2
    fixed = tiny_cola(block_steps=5).eval().generate([PROMPTS[3]], _config(1), lengths=[10], guidance=1.0)
    assert fixed.num_forwards == 4 + 3 * 6 + 2


def test_noise_is_keyed_by_seed_and_sample():
    method = tiny_cola().eval()
    pair = [PROMPTS[0], PROMPTS[0]]
    same = _run(method, pair, _config(), ids=[3, 3]).latents_BTK
    torch.testing.assert_close(same[0], same[1])  # rows of one product may be summed in another order
    other = _run(method, pair, _config(), ids=[3, 4]).latents_BTK
    assert not torch.equal(other[0], other[1])
    torch.testing.assert_close(other[0], same[0])
    assert not torch.equal(_run(method, pair, _config(seed=1), ids=[3, 3]).latents_BTK, same)


def test_the_prompt_matters_and_guidance_of_zero_leaves_whole_blocks_of_it_out():
    method = tiny_cola().eval()
    prompts, ids = [PROMPTS[3][:8], PROMPTS[3][:8].flip(0)], [3, 3]
    one, two = _run(method, prompts, _config(), ids=ids).latents_BTK[:, 8:]
    assert float((one - two).abs().max()) > 1e-3
    one, two = _run(method, prompts, _config(), ids=ids, guidance=0.0).latents_BTK[:, 8:]
    torch.testing.assert_close(one, two)
    inside = [PROMPTS[0], PROMPTS[0].flip(0)]  # a prompt that ends inside the block stays, with or without a prefix
    one, two = _run(method, inside, _config(), ids=ids, guidance=0.0).latents_BTK[:, 3:]
    assert float((one - two).abs().max()) > 1e-3


def test_text_ends_at_the_end_token_and_so_does_the_work():
    method = tiny_cola().eval()
    whole = method.generate(PROMPTS[:1], _config(max_new_tokens=20))
    new = whole.sequences[0][3:].tolist()
    stop = new[4]
    cut = method.generate(PROMPTS[:1], _config(max_new_tokens=20, stop_at_eos=True, eos_token_id=stop))
    assert cut.sequences[0].tolist() == PROMPTS[0].tolist() + new[: new.index(stop) + 1]
    assert cut.new_tokens == [new.index(stop) + 1]
    assert cut.num_forwards < whole.num_forwards


class Recorder:
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value[0].tolist())

    def end(self) -> None:
        self.ended = True


def test_blocks_stream_as_they_become_final():
    method, recorder, drafts = tiny_cola().eval(), Recorder(), []
    out = method.generate(
        [PROMPTS[2]], _config(max_new_tokens=9), streamer=recorder, on_draft=lambda *d: drafts.append(d)
    )
    assert [len(p) for p in recorder.parts] == [6, 2, 4, 3]
    assert [token for part in recorder.parts for token in part] == out.sequences[0].tolist()
    assert recorder.ended
    mask = method.base.contract.mask_token_id
    assert [int(done.sum()) for _, done in drafts] == [8, 12, 15]
    for canvas, done in drafts:
        assert torch.equal(canvas[done], out.sequences[0][: int(done.sum())])
        assert bool((canvas[~done] == mask).all())
    with pytest.raises(DllmError):
        method.generate(PROMPTS[:2], _config(), streamer=Recorder())


def test_sample_speaks_the_protocol():
    method = tiny_cola().eval()
    request = SamplingRequest(max_new_tokens=5, num_steps=4, seed=2, sample_ids=(7, 8, 9, 10), block_size=2)
    out = method.sample(PROMPTS, request)
    same = method.generate(PROMPTS, _config(4, max_new_tokens=5, seed=2), sample_ids=[7, 8, 9, 10])
    assert all(torch.equal(a, b) for a, b in zip(out.sequences, same.sequences, strict=True))
    assert [s.dtype for s in out.sequences] == [torch.int64] * 4
    assert out.new_tokens == [5] * 4
    assert out.first_token_s > 0
    assert out.commit_step is None
    assert method.capabilities.streaming
    assert method.capabilities.exact_cache


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_the_averaged_prior_generates_and_the_live_one_comes_back(mode):
    method = tiny_cola().eval()
    wanted = _run(method, PROMPTS, _config()).ids_BT
    method.train(mode == "training")
    with torch.no_grad():
        for parameter in method.networks.prior.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    method.ema.num_updates += 1
    live = {n: p.clone() for n, p in method.networks.named_parameters()}
    found = method.generate(PROMPTS, _config()).sequences
    for row, sequence in enumerate(found):
        assert torch.equal(sequence, wanted[row, : len(sequence)])
    assert method.training == (mode == "training")
    assert all(torch.equal(p, live[n]) for n, p in method.networks.named_parameters())


def test_what_cannot_be_generated_is_refused_in_two_lines():
    method = tiny_cola().eval()
    alone = tiny_cola(in_memory=False).eval()
    for made, prompts, more, word in (
        (method, [], {}, "prompt"),
        (method, [torch.tensor([], dtype=torch.long)], {}, "empty"),
        (method, [torch.zeros(2, 2, dtype=torch.long)], {}, "row"),
        (method, PROMPTS, {"lengths": [1, 2]}, "2 lengths"),
        (method, PROMPTS, {"sample_ids": [1]}, "1 sample ids"),
        (alone, PROMPTS, {}, "not at hand"),
    ):
        with pytest.raises(DllmError) as caught:
            made.generate(prompts, _config(), **more)
        assert len(str(caught.value).split("\n")) == 2
        assert word in caught.value.problem
