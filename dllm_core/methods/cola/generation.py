"""Generation, block by block: Euler steps of the flow, a clean pass into the cache, tokens.

B batch, N slots of a block, T slots of prompt and response, M cached positions, K latent dimension. Rows are worked on
together, each at its own next block: prompts of different length end in different places of their blocks, and what a
row does depends on itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.errors import DllmError
from dllm_core.methods.cola.flow import euler, guided, steps_of_blocks, time_grid
from dllm_core.methods.cola.networks import Cache
from dllm_core.methods.latent_generation import Request, read_tokens, request_of
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.stopwatch import Stopwatch
from dllm_core.samplers.streaming import DraftStream, OnDraft, Streamer

if TYPE_CHECKING:
    from dllm_core.methods.cola.method import Method


@dataclass(frozen=True)
class Job(Request):
    """A batch of generations.

    Attributes:
        guidance: scale of classifier-free guidance.
        cached: keep keys and values of what is final; False computes them anew in every pass.
    """

    guidance: float
    cached: bool


def job_of(
    method: Method,
    prompts: Sequence[Tensor],
    config: DiffusionGenerationConfig,
    *,
    lengths: Sequence[int] | None = None,
    sample_ids: Sequence[int] | None = None,
    guidance: float | None = None,
    cached: bool = True,
) -> Job:
    """Resolve what is to be generated.

    Raises:
        DllmError: no prompts, an empty prompt, a length below 1, or lists of different lengths.
    """
    request = request_of(prompts, config, method.device, lengths=lengths, sample_ids=sample_ids)
    if min(request.lengths) < 1:
        raise DllmError(f"{min(request.lengths)} new tokens are asked for.", "Give lengths of at least 1.")
    return Job(**vars(request), guidance=method.options.guidance if guidance is None else guidance, cached=cached)


class Decoding:
    """A batch on its way.

    Attributes:
        latents_BTK: latents as the autoencoder has them; of prompts, and of blocks that are done.
        ids_BT: tokens, the mask token where there is none yet; prompts and rows are padded on the right.
        done_BT: bool; tokens that stand.
        fixed_at_BT: the pass at which each token was fixed.
        passes: network passes so far.
    """

    def __init__(self, method: Method, job: Job) -> None:
        self.method, self.job = method, job
        self.device, self.size = method.device, method.options.block_size
        prompt = [len(p) for p in job.prompts]
        total = [p + n for p, n in zip(prompt, job.lengths, strict=True)]
        self.first = [p // self.size for p in prompt]
        self.blocks = [-(-n // self.size) - f for n, f in zip(total, self.first, strict=True)]
        num_steps, fixed = job.config.max_denoising_steps, method.options.block_steps
        self.steps = [[fixed] * n if fixed else steps_of_blocks(num_steps, n) for n in self.blocks]
        self.prompt_B1 = torch.tensor(prompt, device=self.device)[:, None]
        self.total_B1 = torch.tensor(total, device=self.device)[:, None]
        self.first_B1 = torch.tensor(self.first, device=self.device)[:, None]
        slots_T = torch.arange(max(total), device=self.device)
        self.done_BT = slots_T < self.prompt_B1
        self.ids_BT = torch.full(self.done_BT.shape, method.base.contract.mask_token_id, device=self.device)
        self.ids_BT[self.done_BT] = torch.cat(job.prompts)
        self.fixed_at_BT = torch.zeros_like(self.ids_BT)
        self.noise_BLK = job.normal(method.networks.latent_dim, "latent").to(self.device, method.head_VD.dtype)
        uniform_BL = job.uniform("token")
        self.uniform_BL = None if uniform_BL is None else uniform_BL.to(self.device)
        self.passes = 2
        self.latents_BTK = self._read_prompts()
        self.prior_cache: Cache | None = None
        self.decoder_cache: Cache | None = None
        if job.cached and max(self.first):
            self.prior_cache, self.decoder_cache = self._prior_context(0), self._decoder_context(0)
            self.passes += 2

    def _read_prompts(self) -> Tensor:
        """Return latents [B, T, K]: the posterior's mode where the prompt is, 0 elsewhere."""
        longest = int(self.prompt_B1.max())
        real_BP = self.done_BT[:, :longest]
        states_BPD = self.method.language_model_states(self.ids_BT[:, :longest].masked_fill(~real_BP, 0), real_BP)
        mode_BPK = self.method.networks.encoder(states_BPD.masked_fill(~real_BP[..., None], 0.0)).mean
        latents_BTK = mode_BPK.new_zeros(*self.ids_BT.shape, mode_BPK.shape[-1])
        latents_BTK[:, :longest] = mode_BPK.masked_fill(~real_BP[..., None], 0.0)
        return latents_BTK

    # -- what is final ------------------------------------------------------------------------------------------------

    def _before(self, k: int) -> tuple[Tensor, Tensor] | None:
        """Return (slots [B, M], visible) of all blocks before each row's k-th; None where there is none."""
        longest = min((max(self.first) + k) * self.size, self.ids_BT.shape[1])
        if longest == 0:
            return None
        slot_BM = torch.arange(longest, device=self.device).expand(len(self.first), -1)
        return slot_BM, slot_BM < torch.minimum((self.first_B1 + k) * self.size, self.total_B1)

    def _prior_context(self, k: int) -> Cache | None:
        """Compute anew what the k-th block of each row sees of the blocks before it."""
        found = self._before(k)
        if found is None:
            return None
        standard_BTK = self.method.to_prior(self.latents_BTK)
        return self.method.networks.prior.clean(standard_BTK[:, : found[0].shape[1]], *found)

    def _decoder_context(self, k: int) -> Cache | None:
        found = self._before(k)
        if found is None:
            return None
        latents_BMK = self.latents_BTK[:, : found[0].shape[1]]
        return self.method.networks.decoder.extend(latents_BMK, *found, None)[1]

    # -- a block ------------------------------------------------------------------------------------------------------

    def run_block(self, k: int) -> None:
        """Generate the k-th block of every row that has one, from noise to tokens."""
        prior = self.method.networks.prior
        slot_BN = (self.first_B1 + k) * self.size + torch.arange(self.size, device=self.device)
        real_BN = slot_BN < self.total_B1
        known_BN = slot_BN < self.prompt_B1
        at_BN = slot_BN.clamp(max=self.ids_BT.shape[1] - 1)
        rows_B1 = torch.arange(len(self.first), device=self.device)[:, None]
        clean_BNK = self.method.to_prior(self.latents_BTK[rows_B1, at_BN])
        noise_BNK = self.noise_BLK[rows_B1, (slot_BN - self.prompt_B1).clamp(0, self.noise_BLK.shape[1] - 1)]
        steps = [own[k] if k < len(own) else 0 for own in self.steps]

        def velocity(x_BNK: Tensor, t_B: Tensor, *, alone: bool) -> Tensor:
            x_BNK = torch.where(known_BN[..., None], clean_BNK, x_BNK)
            context = None
            if not alone:
                context = self.prior_cache if self.job.cached else self._prior_context(k)
            known = known_BN if k == 0 else None  # where a prompt ends inside a block
            found_BNK = prior.velocity(x_BNK, t_B, slot_BN, real_BN, context, known)
            self.passes += 1
            return found_BNK

        field = guided(
            lambda x, t: velocity(x, t, alone=False), lambda x, t: velocity(x, t, alone=True), self.job.guidance
        )
        found_BNK = euler(field, noise_BNK, time_grid(steps))
        found_BNK = torch.where(known_BN[..., None], clean_BNK, found_BNK)
        # latents that a slot keeps are written before they are read again: cached and uncached passes see the same
        new_BN = real_BN & ~known_BN
        rows_BN = rows_B1.expand_as(at_BN)
        self.latents_BTK[rows_BN[new_BN], at_BN[new_BN]] = self.method.from_prior(found_BNK)[new_BN]
        self._read_out(k, slot_BN, at_BN, real_BN, new_BN)
        if self.job.cached and k + 1 < max(self.blocks):
            own = prior.clean(found_BNK, slot_BN, real_BN, self.prior_cache)
            self.prior_cache = own.after(self.prior_cache)
            self.passes += 1

    def _read_out(self, k: int, slot_BN: Tensor, at_BN: Tensor, real_BN: Tensor, new_BN: Tensor) -> None:
        """Decode the block's latents and write its tokens down."""
        rows_BN = torch.arange(len(self.first), device=self.device)[:, None].expand_as(at_BN)
        cache = self.decoder_cache if self.job.cached else self._decoder_context(k)
        latents_BNK = self.latents_BTK[rows_BN, at_BN]
        outputs_BND, kept = self.method.networks.decoder.extend(latents_BNK, slot_BN, real_BN, cache)
        self.passes += 1
        if self.job.cached:
            self.decoder_cache = kept
        place = (rows_BN[new_BN], at_BN[new_BN])
        uniform_M = None
        if self.uniform_BL is not None:
            uniform_M = self.uniform_BL[place[0], place[1] - self.prompt_B1[place[0], 0]]
        self.ids_BT[place] = read_tokens(outputs_BND[new_BN], self.method.head_VD, self.job.config, uniform_M)
        self.done_BT[place] = True
        self.fixed_at_BT[place] = self.passes

    # -- the end ------------------------------------------------------------------------------------------------------

    def _end(self, row: int) -> tuple[int, int | None]:
        """Return (new tokens so far, how many stand up to the first end of text; None where none came yet)."""
        prompt = len(self.job.prompts[row])
        new_L = self.ids_BT[row, prompt:][self.done_BT[row, prompt:]].cpu()
        return len(new_L), self.job.up_to_end(new_L, self.method.base.eos_token_ids)

    def kept(self, row: int) -> int:
        """Return the new tokens of a row that stand, cut after the first end of text."""
        count, end = self._end(row)
        return count if end is None else end

    def is_finished(self, k: int) -> bool:
        """Return whether no row has anything left to do after its k-th block."""
        return all(k + 1 >= n or self._end(row)[1] is not None for row, n in enumerate(self.blocks))


def generate(
    method: Method, job: Job, streamer: Streamer | None = None, on_draft: OnDraft | None = None
) -> GenerationOutput:
    """Run a job; see `Method.generate`."""
    stream = DraftStream(streamer, len(job.prompts)) if streamer is not None else None
    watch = Stopwatch(method.device)
    decoding = Decoding(method, job)
    if stream:
        stream.commit(decoding.ids_BT[0], len(job.prompts[0]))
    for k in range(max(decoding.blocks)):
        decoding.run_block(k)
        if k == 0:
            watch.mark()
        if on_draft is not None:
            on_draft(decoding.ids_BT.clone(), decoding.done_BT.clone())
        if stream:
            stream.commit(decoding.ids_BT[0], len(job.prompts[0]) + decoding.kept(0))
        if decoding.is_finished(k):
            break
    if stream:
        stream.end()
    counts = [decoding.kept(row) for row in range(len(job.prompts))]
    stops = [len(prompt) + n for prompt, n in zip(job.prompts, counts, strict=True)]
    sequences = [decoding.ids_BT[row, :stop].cpu() for row, stop in enumerate(stops)]
    history = None
    if job.config.record_history:
        history = [
            decoding.fixed_at_BT[row, len(p) : stop].cpu()
            for row, (p, stop) in enumerate(zip(job.prompts, stops, strict=True))
        ]
    return GenerationOutput(sequences, counts, decoding.passes, watch.seconds(1), history)
