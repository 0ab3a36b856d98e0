"""Generation: noise from the adapter, then 1 to K passes of the map. B rows, L positions, S segments, D width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_core.backbone.passes.protocol import real_head
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.errors import DllmError
from dllm_core.methods.latent_generation import Request, request_of
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.methods.segments import Segments, segments_of
from dllm_core.methods.single_network import gather_rows
from dllm_core.methods.vfm import soft_masks
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.denoise import Proposal, propose
from dllm_core.samplers.stopwatch import Stopwatch

if TYPE_CHECKING:
    from dllm_core.methods.vfm.method import Method

Source = Literal["adapter", "normal"]

NOISE_STREAM = "latent"
"""Not the stream that training draws from: a prompt may have the seed and the number of a training sequence."""


@dataclass(frozen=True)
class Job(Request):
    """A batch of generations, all of one length.

    Attributes:
        source: where the noise comes from.
    """

    source: Source = "adapter"


def job_of(
    method: Method,
    prompts: Sequence[Tensor],
    config: DiffusionGenerationConfig,
    *,
    sample_ids: Sequence[int] | None = None,
    source: Source = "adapter",
) -> Job:
    """Resolve what is to be generated.

    Raises:
        DllmError: no prompts, an empty prompt, an unknown source, or lists of different lengths.
    """
    request = request_of(prompts, config, method.device, sample_ids=sample_ids)
    if source not in ("adapter", "normal"):
        raise DllmError(f"Unknown source of noise '{source}'.", "Allowed: adapter, normal.")
    return Job(**vars(request), source=source)


def canvas(job: Job) -> Batch:
    """Return prompts and empty slots as a batch: a prompt, its slots right after it, then padding."""
    new = job.config.max_new_tokens
    device = job.prompts[0].device
    rows = [torch.cat((p, p.new_zeros(new))) for p in job.prompts]
    ids_BL = pad_sequence(rows, batch_first=True)
    prompt_B1 = torch.tensor([[len(p)] for p in job.prompts], device=device)
    place_BL = torch.arange(ids_BL.shape[1], device=device).expand_as(ids_BL)
    real_BL = place_BL < prompt_B1 + new
    return Batch(
        input_ids_BL=ids_BL,
        response_BL=real_BL & (place_BL >= prompt_B1),
        document_BL=torch.where(real_BL, 0, -1),
        position_BL=place_BL.masked_fill(~real_BL, 0),
        sample_ids=job.sample_ids,
        epochs=(0,) * len(rows),
        sequence_keys=("",) * len(rows),
    )


def noise_of(method: Method, job: Job, batch: Batch, cut: Segments) -> Tensor:
    """Return z of every slot, fp32 [B, L, D]; a row's draws depend on its seed and sample id alone."""
    shape = (job.config.max_new_tokens, method.backbone.hidden_size)
    eps_SLD = NoiseSource(job.config.seed).normal(batch, NOISE_STREAM, shape).to(method.device)
    if job.source == "normal":
        return eps_SLD
    return method.posterior(batch, cut, None).sample(eps_SLD)


@torch.no_grad()
def generate(method: Method, job: Job) -> GenerationOutput:
    """Run a job; every token is final at the same moment, but for soft masks in several passes."""
    watch = Stopwatch(method.device)
    batch = canvas(job)
    method.backbone.check_length(batch.length)
    cut = segments_of(batch)
    passes = job.config.max_denoising_steps
    if method.options.freeze_base:
        ids_BN, passes = _soft(method, job, batch, cut)
    else:
        z_SLD = noise_of(method, job, batch, cut)
        rows_MD = method.flow.sample(
            method.backbone, batch, cut, z_SLD, passes, method.shift, method.hidden_prompt(batch)
        )
        ids_BN = _proposed(method, job, rows_MD, "token").token_M.view(len(batch), -1)
    watch.mark()
    return job.finished(ids_BN, method.backbone.eos_token_ids, passes + networks_besides(method, job), watch.seconds(1))


def networks_besides(method: Method, job: Job) -> int:
    """Return passes of other networks than the map: the adapter, and the language model that reads the prompt."""
    if job.source == "normal" and not method.options.freeze_base:
        return 0
    return 1 + int(method.options.reads_states)


def _proposed(method: Method, job: Job, rows_MD: Tensor, stream: str) -> Proposal:
    uniform_BN = job.uniform(stream)
    uniform_M = None if uniform_BN is None else uniform_BN.flatten().to(rows_MD.device)
    backbone = method.backbone
    return propose(backbone, rows_MD, job.config, frozenset(), uniform_M=uniform_M, head_WD=real_head(backbone))


def _soft(method: Method, job: Job, batch: Batch, cut: Segments) -> tuple[Tensor, int]:
    """Decode soft masks: each pass decides an equal part of the slots, the most confident first."""
    mean_SLD = method.posterior(batch, cut, None).mean_SLD
    if job.source == "normal":
        mean_SLD = torch.zeros_like(mean_SLD)
    rows, new = len(batch), job.config.max_new_tokens
    passes = min(job.config.max_denoising_steps, new)
    open_BN = torch.ones(rows, new, dtype=torch.bool, device=method.device)
    ids_BN = torch.zeros(rows, new, dtype=torch.long, device=method.device)
    slots_M = batch.response_BL
    for k in range(passes):
        masked_BL = slots_M.clone()
        masked_BL[slots_M] = open_BN.flatten()
        shown_BL = batch.input_ids_BL.clone()
        shown_BL[slots_M] = ids_BN.flatten()
        shown = replace(batch, input_ids_BL=shown_BL)
        hidden_BLD = soft_masks.hidden_states(method, shown, cut, mean_SLD, masked_BL)
        rows_MD = gather_rows(hidden_BLD, method.predictor_rows(slots_M))
        found = _proposed(method, job, rows_MD, f"token {k}")
        now_BN = soft_masks.decide(found.logprob_M.view(rows, new), open_BN, passes - k)
        ids_BN = torch.where(now_BN, found.token_M.view(rows, new), ids_BN)
        open_BN = open_BN & ~now_BN
    return ids_BN, passes
