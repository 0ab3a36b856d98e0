"""The decoding loop of all token-space models: initialise canvas -> denoise -> accept -> renoise.

B batch, C canvas length, M scored rows, D hidden. Scheduled rules read nothing back from the device while they run;
`threshold` and `stop_at_eos` read one small tensor per pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.acceptance import AdaptiveRule, Draft, acceptance_rule
from dllm_core.samplers.blocks import Plan, StepPlan, block_tables, split_blocks
from dllm_core.samplers.canvas import Canvas
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.denoise import propose
from dllm_core.samplers.denoisers import (
    Denoiser,
    FullCanvas,
    GuidedCanvas,
    Shape,
    denoiser_for,
    model_block_size,
    shift_of,
)
from dllm_core.samplers.drift import DriftMeter
from dllm_core.samplers.record import DenoisingStep
from dllm_core.samplers.stopping import EndOfText, Stability
from dllm_core.samplers.stopwatch import Stopwatch
from dllm_core.samplers.streaming import DraftStream, OnDraft, Streamer
from dllm_core.samplers.verify import Verifier

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


Rows = Tensor | Sequence[Tensor]


def generate(
    backbone: Backbone,
    input_ids: Rows,
    config: DiffusionGenerationConfig,
    *,
    infill_mask: Rows | None = None,
    sample_ids: Sequence[int] | None = None,
    streamer: Streamer | None = None,
    on_draft: OnDraft | None = None,
) -> GenerationOutput:
    """Continue prompts, or fill in masks anywhere.

    Args:
        backbone: a converted checkpoint; its contract says how states and tokens align.
        input_ids: int64 [B, L], or a list of 1-D tensors of any lengths; at least one token each.
        config: steps, acceptance rule, temperature, blocks, EOS, seed; and how much to generate after each prompt.
        infill_mask: bool, shaped as `input_ids`; True where a token is to be generated in place. Nothing is appended
            then, and `config.max_new_tokens` is not used.
        sample_ids: one id per row, which with the seed keys its noise; None means 0..B-1.
        streamer: transformers' streamer protocol, one row only.
        on_draft: called after each pass with (canvas, committed): ids [B, C] with drafts where there are any and the
            mask token elsewhere, and bool [B, C], True where a token stands.

    Returns:
        Sequences without padding, on the CPU, cut after the first EOS with `stop_at_eos`. An EOS counts only where
        nothing given follows it, so text that is infilled in the middle is never cut. The output of a row does not
        depend on the batch it is in (up to rounding of near-ties).

    Raises:
        DllmError: rows that cannot be decoded, settings of another kind, fewer steps than blocks, a span longer than
            the model's context.
    """
    if not isinstance(config, DiffusionGenerationConfig):
        raise DllmError(
            f"A {type(config).__name__} does not say how to denoise.",
            "Give a DiffusionGenerationConfig; DiffusionGenerationConfig.from_dict makes one of a dict.",
        )
    if infill_mask is None:
        canvas = Canvas.from_prompts(input_ids, config.max_new_tokens)
    else:
        canvas = Canvas.from_infill(input_ids, infill_mask)
    stream = DraftStream(streamer, len(canvas.lengths)) if streamer is not None else None
    with torch.inference_mode():
        decoding = Decoding(backbone, canvas, config, sample_ids)
        verifier = Verifier(backbone, canvas, config, decoding.sample_ids) if config.verify else None
        if stream:
            stream.commit(decoding.canvas_BC[0], decoding.settled(0))
        while (step := decoding.plan.next_step(decoding.device)) is not None:
            stop = decoding.block_end(0) if stream else 0
            drafted_BC = decoding.advance(step)
            if verifier:
                verifier.check(decoding)
            if on_draft is not None:
                on_draft(drafted_BC, decoding.real_BC & ~decoding.masked_BC)
            if stream:
                stream.draft(drafted_BC[0], stop)
                stream.commit(decoding.canvas_BC[0], decoding.settled(0))
    output = decoding.output()
    if stream:
        stream.commit(output.sequences[0], len(output.sequences[0]))
        stream.end()
    return output


def positions(chosen_BC: Tensor, count: int) -> Tensor:
    """Return the flat indices of the True entries, in order; `count` is how many there are, known to the caller."""
    return torch.nonzero_static(chosen_BC.flatten(), size=count)[:, 0]


class Decoding:
    """The state of one `generate` call.

    Attributes:
        plan: what is still to do, on the host.
        canvas_BC: int64; the present canvas.
        masked_BC: bool; places still to fill.
        commit_BC: int64; the 1-based pass at which each place was last filled, 0 before.
    """

    def __init__(
        self,
        backbone: Backbone,
        canvas: Canvas,
        config: DiffusionGenerationConfig,
        sample_ids: Sequence[int] | None,
        *,
        fused: bool = True,
    ) -> None:
        self.device = backbone.device
        self.stopwatch = Stopwatch(self.device)
        canvas.check(len(backbone.embedding_weight_VD), first_token_given=shift_of(backbone) == 1)
        self.backbone, self.config, self.lengths, self.fused = backbone, config, canvas.lengths, fused
        self.rule = acceptance_rule(config.sampler_config)
        self.mask_token_id = backbone.contract.mask_token_id
        # positions to fill, per row, known on the host: the plan is made from them
        self.places = [row.nonzero()[:, 0].tolist() for row in canvas.to_fill_BC.cpu()]
        model_block = model_block_size(backbone)
        blocks_of_rows = [split_blocks(places, config.block_size, model_block) for places in self.places]
        for places, blocks in zip(self.places, blocks_of_rows, strict=True):
            config.require_steps(len(places), len(blocks))
        config.require_block(max(map(len, self.places)))
        self.plan = Plan(blocks_of_rows, config.max_denoising_steps, self.rule, config.multi_block)

        to_fill_BC = canvas.to_fill_BC.to(self.device)
        self.real_BC = canvas.real_BC.to(self.device)
        tables = block_tables(blocks_of_rows, to_fill_BC.shape[1])
        self.block_BC, self.place_BC = (table.to(self.device) for table in tables)
        self.canvas_BC = self.rule.initialize_canvas(
            canvas.input_ids_BC.to(self.device), to_fill_BC, self.mask_token_id
        )
        self.masked_BC = to_fill_BC
        self.commit_BC = torch.zeros_like(self.canvas_BC)
        self._start_denoiser(Shape(canvas.lengths, to_fill_BC.shape[1]), self.real_BC & ~to_fill_BC)
        self._start_stopping(to_fill_BC)
        self._start_noise(to_fill_BC, tuple(range(len(self.lengths)) if sample_ids is None else sample_ids))
        self.passes = 0
        self.history: list[DenoisingStep] = []

    def _start_denoiser(self, shape: Shape, given_BC: Tensor) -> None:
        config, backbone = self.config, self.backbone
        self.is_guided = config.guidance_scale != 1
        if self.is_guided:
            shape = Shape(shape.lengths * 2, shape.length)

        def guided(inner: Denoiser) -> Denoiser:
            return GuidedCanvas(inner, given_BC, self.mask_token_id) if self.is_guided else inner

        made = denoiser_for(backbone, shape, config.cache, quick=self.fused, compiling=config.compile)
        self.denoiser = guided(made)
        self.drift = None
        if config.measure_drift:
            self.drift = DriftMeter(backbone, guided(FullCanvas(backbone, shape)), config.guidance_scale)

    def _start_stopping(self, to_fill_BC: Tensor) -> None:
        config, self.needs = self.config, self.rule.needs
        eos = config.eos_token_ids or self.backbone.eos_token_ids
        self.end_of_text = None
        if config.stop_at_eos and eos:
            self.end_of_text = EndOfText(torch.tensor(eos, device=self.device), self.real_BC, to_fill_BC)
        self.stability = None
        if config.stability_threshold is not None:
            self.stability = Stability(config.stability_threshold, config.confidence_threshold)
        if config.confidence_threshold is not None:
            self.needs = self.needs | {"entropy"}
        # how many are accepted is known beforehand only where scores have no say in it
        self.is_scheduled = not self.rule.adaptive and self.stability is None

    def _start_noise(self, to_fill_BC: Tensor, sample_ids: tuple[int, ...]) -> None:
        self.noise, self.sample_ids = NoiseSource(self.config.seed), sample_ids
        if len(sample_ids) != len(self.lengths):
            raise DllmError(
                f"{len(sample_ids)} sample ids do not name {len(self.lengths)} rows.", "Give one sample id per row."
            )
        self.rank_BC = (to_fill_BC.cumsum(-1) - 1).clamp(min=0)
        self.priority_BC = self._uniform("order").float() if "priority" in self.rule.needs else None

    def _uniform(self, stream: str) -> Tensor:
        """Return float64 [B, C] draws in [0, 1) for the places to fill; row b depends on its own key alone."""
        width = max([1, *(len(p) for p in self.places)])
        drawn_BR = torch.zeros(len(self.places), width, dtype=torch.float64)
        for row, (sample_id, places) in enumerate(zip(self.sample_ids, self.places, strict=True)):
            generator = self.noise.generator(sample_id, 0, f"decode {stream}")
            drawn_BR[row, : len(places)] = torch.rand(len(places), generator=generator, dtype=torch.float64)
        return drawn_BR.to(self.device, non_blocking=True).gather(1, self.rank_BC)

    # -- one pass ---------------------------------------------------------------------------------------------------

    def advance(self, step: StepPlan) -> Tensor:
        """Make one pass and return the canvas with the drafts of this pass in it, [B, C]."""
        self.passes += 1
        active_BC = (self.block_BC >= step.block_B[:, None]) & (self.block_BC <= step.last_B[:, None])
        candidate_BC = self.rule.candidates(self.masked_BC, active_BC)
        draft = self._denoise(candidate_BC, step)
        accepted_BC = self._accept(draft, step)
        drafted_BC = torch.where(candidate_BC, draft.token_BC, self.canvas_BC)
        if self.stability:
            rest_B = self.stability.at_rest_B(drafted_BC, active_BC, step.block_B, draft)
            accepted_BC = accepted_BC | (candidate_BC & rest_B[:, None])
        if self.config.record_passes or self.config.verify:
            score_BC = torch.where(candidate_BC, self.rule.score(draft), torch.nan)
            self.history.append(DenoisingStep(self.canvas_BC, drafted_BC, accepted_BC, score_BC))
        fixed_BC = accepted_BC & self.masked_BC
        self.commit_BC = torch.where(fixed_BC, self.passes, self.commit_BC)
        masked_BC = self.masked_BC
        self.canvas_BC, self.masked_BC = self.rule.renoise(
            self.canvas_BC, masked_BC, draft, accepted_BC, self.mask_token_id
        )
        self.stopwatch.mark()
        self.plan.advance(None if self.is_scheduled else self._fixed(masked_BC))
        if self.end_of_text:
            self._end_rows(self.end_of_text)
        return drafted_BC

    def _accept(self, draft: Draft, step: StepPlan) -> Tensor:
        if self.config.multi_block is None:
            return self.rule.accept(draft, step.keep_BK[:, 0])
        assert isinstance(self.rule, AdaptiveRule)
        return self.rule.accept_in_blocks(draft, self.block_BC - step.block_B[:, None], step.keep_BK)

    def _fixed(self, masked_before_BC: Tensor) -> list[list[int]]:
        """Return by how many the open places of each block became fewer (p2 masks placed tokens anew)."""
        fewer_BC = masked_before_BC.long() - self.masked_BC.long()
        num_blocks = max(len(row.blocks) for row in self.plan.rows)
        fewer_BN = fewer_BC.new_zeros(len(fewer_BC), num_blocks + 1).scatter_add_(1, self.block_BC + 1, fewer_BC)
        return fewer_BN[:, 1:].tolist()

    def _end_rows(self, end_of_text: EndOfText) -> None:
        """Finish the rows whose text has ended, and begin no block behind an end that still has gaps before it."""
        end_B = end_of_text.position_B(self.canvas_BC, self.masked_BC)
        place_C = torch.arange(self.canvas_BC.shape[1], device=self.device)
        open_B = (self.masked_BC & (place_C < end_B[:, None])).any(-1)
        for row, (end, is_open) in enumerate(torch.stack((end_B, open_B.long()), 1).tolist()):
            if end < self.canvas_BC.shape[1]:
                if is_open:
                    self.plan.rows[row].end_at(end)
                else:
                    self.plan.finish(row)

    def _denoise(self, candidate_BC: Tensor, step: StepPlan) -> Draft:
        """Run the network on the canvas and its head on the states that predict the candidates."""
        where_M = positions(candidate_BC, step.num_scored)
        hidden_MD = self.denoiser.predict(self.canvas_BC, step.spans, where_M)
        if self.drift:
            self.drift.add(self.canvas_BC, step.spans, where_M, hidden_MD)
        unconditional_MD = None
        if self.is_guided:
            hidden_MD, unconditional_MD = hidden_MD.chunk(2)
        placed_M = uniform_M = temperature_M = None
        if self.rule.revises:
            placed_M = torch.where(self.masked_BC, -1, self.canvas_BC).flatten()[where_M]
        if not self.config.is_greedy:
            uniform_M = self._uniform(f"tokens {self.passes}").flatten()[where_M]
        if self.config.t_max is not None:
            of_rows = [self.config.temperature_at(share) for share in step.shares_left]
            temperature_B = torch.tensor(of_rows).to(self.device, non_blocking=True)
            temperature_M = temperature_B[where_M // candidate_BC.shape[1]]
        proposal = propose(
            self.backbone,
            hidden_MD,
            self.config,
            self.needs,
            uniform_M=uniform_M,
            placed_M=placed_M,
            unconditional_MD=unconditional_MD,
            temperature_M=temperature_M,
            head_WD=self.denoiser.head_WD if self.fused else None,
        )

        def spread(values_M: Tensor | None) -> Tensor | None:
            if values_M is None:
                return None
            return values_M.new_zeros(candidate_BC.numel()).index_copy_(0, where_M, values_M).view_as(candidate_BC)

        token_BC, logprob_BC = spread(proposal.token_M), spread(proposal.logprob_M)
        assert token_BC is not None
        assert logprob_BC is not None
        margin_BC, entropy_BC = spread(proposal.margin_M), spread(proposal.entropy_M)
        return Draft(candidate_BC, token_BC, logprob_BC, margin_BC, entropy_BC, self.priority_BC, self.place_BC)

    # -- results ----------------------------------------------------------------------------------------------------

    def settled(self, row: int) -> int:
        """Return the position of the active block: what lies before it is final. 0 once the row is finished."""
        span = self.plan.rows[row].span
        return 0 if span is None else span.start

    def block_end(self, row: int) -> int:
        """Return the position at which the active block of an unfinished row ends."""
        span = self.plan.rows[row].span
        assert span is not None, "the row has an active block"
        return span.stop

    def output(self) -> GenerationOutput:
        """Return the finished sequences."""
        canvas_BC, commit_BC = self.canvas_BC.cpu(), self.commit_BC.cpu()
        ends = list(self.lengths)
        if self.end_of_text:
            found = self.end_of_text.position_B(self.canvas_BC, self.masked_BC).tolist()
            ends = [min(n, end + 1) for n, end in zip(ends, found, strict=True)]
        kept = [[p for p in places if p < end] for places, end in zip(self.places, ends, strict=True)]
        commits = [commit_BC[row, places] for row, places in enumerate(kept)]
        first = min((int(c.min()) for c in commits if len(c)), default=0)
        return GenerationOutput(
            sequences=[canvas_BC[row, :end].clone() for row, end in enumerate(ends)],
            new_tokens=[len(places) for places in kept],
            num_forwards=self.passes,
            first_token_s=self.stopwatch.seconds(first),
            commit_step=commits if self.config.record_history else None,
            drift=self.drift.result() if self.drift else None,
            history=[step.cpu() for step in self.history] if self.config.record_passes else None,
        )
