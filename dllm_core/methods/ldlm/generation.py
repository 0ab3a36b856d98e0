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

from dllm_core.layers.dit import Prefix
from dllm_core.methods.latent_generation import Request, read_tokens, request_of
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.continuous import STOCHASTIC, Solver, solve
from dllm_core.samplers.stopwatch import Stopwatch

if TYPE_CHECKING:
    from dllm_core.methods.ldlm.method import Method

FEW_STEPS = 16
"""Up to here the deterministic solver is better, beyond it the stochastic one (background of arXiv:2605.07933)."""


@dataclass(frozen=True)
class Job(Request):
    """A batch of generations.

    Attributes:
        solver: which one; resolved.
        guidance: scale of classifier-free guidance.
    """

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
    request = request_of(prompts, config, method.device, lengths=lengths, sample_ids=sample_ids)
    chosen = solver or options.solver
    if chosen == "auto":
        chosen = "ddim" if config.max_denoising_steps <= FEW_STEPS else "sde"
    scale = options.guidance if guidance is None else guidance
    return Job(**vars(request), solver=chosen, guidance=scale)  # type: ignore[arg-type]


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
        return job.normal(latent_dim, noise_stream(k)).to(device=device, dtype=dtype)

    noise = drawn_noise if noises is None else noises
    times = method.times.grid(steps, method.options.grid)
    fresh = (lambda k: noise(k + 1)) if job.solver in STOCHASTIC else None
    found_BLK = solve(predict, noise(0), times, job.solver, method.schedule, fresh)  # type: ignore[arg-type]
    return found_BLK, real_BL, passes * steps + 1 + method.options.keeps_language_model


def tokens_of(method: Method, job: Job, latents_BLK: Tensor, real_BL: Tensor | None) -> Tensor:
    """Return int64 [B, L]: the most probable tokens, or draws at the temperature of the config."""
    return worded(method, job, method.token_outputs(latents_BLK, real_BL))


def worded(method: Method, job: Job, outputs_BLD: Tensor) -> Tensor:
    """Return the tokens [B, L] of what is multiplied with the head's rows."""
    uniform_BL = job.uniform("token")
    uniform_M = None if uniform_BL is None else uniform_BL.flatten()
    return read_tokens(outputs_BLD.flatten(0, 1), method.head_VD, job.config, uniform_M).view(outputs_BLD.shape[:2])


def generate(method: Method, job: Job) -> GenerationOutput:
    """Run a job; every token is final at the same moment."""
    watch = Stopwatch(method.device)
    latents_BLK, real_BL, passes = latents(method, job)
    ids_BL = tokens_of(method, job, latents_BLK, real_BL)
    watch.mark()
    return job.finished(ids_BL, method.base.eos_token_ids, passes + 2, watch.seconds(1))
