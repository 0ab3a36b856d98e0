"""Generation: denoise a latent for every slot, decode once. The reference path; `fast` runs the same maths faster.

B batch, L slots, P prompt tokens, K latent dimension, D width of the states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.kernels import token_stats
from dllm_core.layers.dit import Prefix
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.continuous import STOCHASTIC, Solver, solve
from dllm_core.samplers.denoise import draw_tokens
from dllm_core.samplers.stopwatch import Stopwatch

if TYPE_CHECKING:
    from dllm_core.methods.ldlm.method import Method

FEW_STEPS = 16
"""Up to here the deterministic solver is better, beyond it the stochastic one (background of arXiv:2605.07933)."""
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Job:
    """A batch of generations.

    Attributes:
        prompts: 1-D int64 ids.
        lengths: new tokens of each.
        config: steps, temperature, top-k, top-p, seed, end of text.
        sample_ids: with the seed they key all noise of a row.
        solver: which one; resolved.
        guidance: scale of classifier-free guidance.
    """

    prompts: list[Tensor]
    lengths: list[int]
    config: DiffusionGenerationConfig
    sample_ids: tuple[int, ...]
    solver: Solver
    guidance: float


def job_of(
    method: Method,
    prompts: Sequence[Tensor],
    config: DiffusionGenerationConfig,
    *,
    lengths: Sequence[int] | None = None,
    sample_ids: Sequence[int] | None = None,
    solver: str | None = None,
    guidance: float | None = None,
) -> Job:
    """Resolve what is to be generated.

    Raises:
        DllmError: no prompts, an empty prompt, or lists of different lengths.
    """
    options = method.options
    rows = [p.to(method.device).long() for p in prompts]
    if not rows or any(p.ndim != 1 or len(p) == 0 for p in rows):
        raise DllmError("A prompt is empty or not one row of ids.", "Give every prompt at least one token.")
    sizes = list(lengths) if lengths is not None else [config.max_new_tokens] * len(rows)
    ids = tuple(sample_ids) if sample_ids is not None else tuple(range(len(rows)))
    if not len(rows) == len(sizes) == len(ids):
        raise DllmError(
            f"{len(rows)} prompts, {len(sizes)} lengths and {len(ids)} sample ids.", "Give one of each per prompt."
        )
    chosen = solver or options.solver
    if chosen == "auto":
        chosen = "ddim" if config.max_denoising_steps <= FEW_STEPS else "sde"
    scale = options.guidance if guidance is None else guidance
    return Job(rows, sizes, config, ids, chosen, scale)  # type: ignore[arg-type]


def slot_noise(job: Job, latent_dim: int, stream: str) -> Tensor:
    """Return N(0, 1) draws [B, L, K] on CPU; a row's depend on its seed and sample id alone, not on the padding."""
    source = NoiseSource(job.config.seed)
    rows = [
        torch.randn(length, latent_dim, generator=source.generator(sample, 0, stream))
        for sample, length in zip(job.sample_ids, job.lengths, strict=True)
    ]
    return pad_sequence(rows, batch_first=True)


def noise_stream(k: int) -> str:
    """Return the stream of the k-th noise of a job: the start, then those of steps 0, 1, ..."""
    return "latent" if k == 0 else f"step {k - 1}"


def real_slots(job: Job, device: torch.device) -> Tensor | None:
    """Return bool [B, L], None where all rows are equally long."""
    if len(set(job.lengths)) == 1:
        return None
    slots_L = torch.arange(max(job.lengths), device=device)
    return slots_L < torch.tensor(job.lengths, device=device)[:, None]


def prompt_rows(method: Method, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return (what the prompt encoder reads [B, P, D], visible [B, P] or None); padding stands on the left."""
    ids_BP = pad_sequence([p.flip(0) for p in prompts], batch_first=True).flip(1)
    lengths = torch.tensor([len(p) for p in prompts], device=ids_BP.device)
    visible_BP = torch.arange(ids_BP.shape[1] - 1, -1, -1, device=ids_BP.device) < lengths[:, None]
    if method.options.prompt_encoder == "embedding":
        return method.embedding_VD[ids_BP], None if bool(visible_BP.all()) else visible_BP
    states_BPD = method.standardise(method.prompt_reader.states(ids_BP, visible_BP, method.embedding_VD.dtype))
    first_B1 = (ids_BP.shape[1] - lengths)[:, None]  # the outlier at a document's first position is left out
    return states_BPD, visible_BP & (torch.arange(ids_BP.shape[1], device=ids_BP.device) != first_B1)


def denoiser(method: Method, prefix: Prefix | None, real_BL: Tensor | None, guidance: float) -> tuple[object, int]:
    """Return (x_t, t, x0 before -> x0_hat, network passes a call): x_u + w (x_c - x_u) for guidance w != 1."""
    networks = method.networks

    def conditional(x_BLK: Tensor, t_B: Tensor, before_BLK: Tensor) -> Tensor:
        return networks.denoise(x_BLK, t_B.to(x_BLK.device), before_BLK, prefix, real_BL)

    if guidance == 1.0:
        return conditional, 1

    def guided(x_BLK: Tensor, t_B: Tensor, before_BLK: Tensor) -> Tensor:
        with_prompt = conditional(x_BLK, t_B, before_BLK)
        without = networks.denoise(x_BLK, t_B.to(x_BLK.device), before_BLK, None, real_BL)
        return without + guidance * (with_prompt - without)

    return guided, 2


def latents(
    method: Method, job: Job, noises: Callable[[int], Tensor] | None = None
) -> tuple[Tensor, Tensor | None, int]:
    """Return (clean latents [B, L, K], real slots, network passes).

    Args:
        method: in eval mode.
        job: what to generate.
        noises: 0 -> the noise to start from, k + 1 -> that of step k, [B, L, K]; None draws them, keyed per sample.
    """
    device, dtype = method.device, method.embedding_VD.dtype
    steps, latent_dim = job.config.max_denoising_steps, method.networks.latent_dim
    real_BL = real_slots(job, device)
    prompt_BPD, visible_BP = prompt_rows(method, job.prompts)
    prefix = method.networks.prompt(prompt_BPD, visible_BP)
    predict, passes = denoiser(method, prefix, real_BL, job.guidance)

    def drawn_noise(k: int) -> Tensor:
        return slot_noise(job, latent_dim, noise_stream(k)).to(device=device, dtype=dtype)

    noise = drawn_noise if noises is None else noises
    times = method.times.grid(steps, method.options.grid)
    fresh = (lambda k: noise(k + 1)) if job.solver in STOCHASTIC else None
    found_BLK = solve(predict, noise(0), times, job.solver, method.schedule, fresh)  # type: ignore[arg-type]
    return found_BLK, real_BL, passes * steps + 1 + (method.options.prompt_encoder == "backbone")


def tokens_of(method: Method, job: Job, latents_BLK: Tensor, real_BL: Tensor | None) -> Tensor:
    """Return int64 [B, L]: the most probable tokens, or draws at the temperature of the config."""
    outputs_BLD = method.token_outputs(latents_BLK, real_BL)
    if job.config.temperature != 0:
        return drawn(method, job, outputs_BLD)
    best = token_stats.stats(outputs_BLD.flatten(0, 1), method.head_VD, second=False)
    return best.argmax_M.view(latents_BLK.shape[:2])


def drawn(method: Method, job: Job, outputs_BLD: Tensor) -> Tensor:
    """Return tokens drawn at the temperature of the config, int64 [B, L]."""
    outputs_MD, head_VD = outputs_BLD.flatten(0, 1), method.head_VD
    source = NoiseSource(job.config.seed)
    rows = [
        torch.rand(n, generator=source.generator(sample, 0, "token"), dtype=torch.float64)
        for sample, n in zip(job.sample_ids, job.lengths, strict=True)
    ]
    uniform_M = pad_sequence(rows, batch_first=True).flatten().to(outputs_MD.device)
    parts = [
        draw_tokens((outputs_MD[i : i + _CHUNK_ROWS] @ head_VD.T).float(), job.config, uniform_M[i : i + _CHUNK_ROWS])
        for i in range(0, len(outputs_MD), _CHUNK_ROWS)
    ]
    return torch.cat(parts).view(outputs_BLD.shape[:2])


def generate(method: Method, job: Job) -> GenerationOutput:
    """Run a job; every token is final at the same moment."""
    watch = Stopwatch(method.device)
    latents_BLK, real_BL, passes = latents(method, job)
    ids_BL = tokens_of(method, job, latents_BLK, real_BL)
    watch.mark()
    return finished(method, job, ids_BL, passes + 2, watch.seconds(1))


def finished(method: Method, job: Job, ids_BL: Tensor, passes: int, seconds: float) -> GenerationOutput:
    """Cut rows to their lengths, and at the end of text where that is asked for."""
    eos = job.config.eos_token_id
    ends = method.base.eos_token_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    sequences, counts = [], []
    for row, (prompt, length) in enumerate(zip(job.prompts, job.lengths, strict=True)):
        new_L = ids_BL[row, :length].cpu()
        if job.config.stop_at_eos and ends:
            (found,) = torch.isin(new_L, torch.tensor(ends)).nonzero(as_tuple=True)
            new_L = new_L[: int(found[0]) + 1] if len(found) else new_L
        sequences.append(torch.cat((prompt.cpu(), new_L)))
        counts.append(len(new_L))
    return GenerationOutput(sequences, counts, passes, seconds)
