"""What a decode does, pass by pass: tokens placed, rows through the head, tokens through the network.

Nothing is worked out beside the engine: a decode is run and watched. Where no score has a say in how many tokens stand
(`planned`), any network does, and the smallest one there is takes the place of a real one. Rules that go by scores
are watched on the model and prompts in question (`watched`).

B batch, C canvas length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_core.errors import DllmError
from dllm_core.samplers.blocks import block_tables, split_blocks
from dllm_core.samplers.canvas import Canvas
from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, DiffusionGenerationConfig
from dllm_core.samplers.denoisers import model_block_size
from dllm_core.samplers.loop import generate

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.contract import Alignment
    from dllm_core.samplers.record import DenoisingStep

HEADINGS = ("pass", "blocks", "tokens", "standing", "head rows", "network tokens")


@dataclass(frozen=True)
class Pass:
    """One pass, all rows of the batch together.

    Attributes:
        first_block, last_block: the blocks that were worked on, from the leftmost of any row to the rightmost.
        tokens: places that stand now and did not before.
        standing: generated places that stand after the pass.
        head_rows: states that went through the output head; with guidance both of a place.
        network_tokens: tokens that went through the blocks of the network, padding and both halves of a guided batch
            included.
    """

    first_block: int
    last_block: int
    tokens: int
    standing: int
    head_rows: int
    network_tokens: int


@dataclass(frozen=True)
class Inspection:
    """A decode as it was.

    Attributes:
        passes: in order; as many as the number of function evaluations (NFE).
        rows: sequences in the batch.
        canvas_tokens: tokens of the whole canvas of the batch, padding included: what a pass without a cache runs.
        new_tokens: tokens that count, over all rows: after an early end fewer than there were places.
    """

    passes: tuple[Pass, ...]
    rows: int
    canvas_tokens: int
    new_tokens: int

    @property
    def num_forwards(self) -> int:
        """Network passes (NFE)."""
        return len(self.passes)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that count, per row and pass."""
        return self.new_tokens / self.rows / max(1, self.num_forwards)

    def total(self, name: str) -> int:
        """Return the sum of a field of `Pass` over all passes."""
        return sum(getattr(p, name) for p in self.passes)

    def table(self, *, every_pass: bool = False) -> str:
        """Return the passes as text, and their sums below.

        Args:
            every_pass: a line for each; else passes that do the same one after the other share a line, in which
                what changes from one to the next stands as `first..last`.
        """

        def alike(p: Pass) -> tuple[Any, ...]:
            return (p.first_block, p.last_block, p.tokens, p.network_tokens)

        numbered = list(enumerate(self.passes, 1))
        groups = (
            [[n] for n in numbered] if every_pass else [list(g) for _, g in groupby(numbered, lambda n: alike(n[1]))]
        )
        lines = [HEADINGS, *(_line(group) for group in groups)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
        text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*text, self.summary()])

    def summary(self) -> str:
        """Return the sums as two lines of text."""
        whole = self.canvas_tokens * self.num_forwards
        head, network = self.total("head_rows"), self.total("network_tokens")
        return (
            f"{self.num_forwards} passes (NFE), {self.new_tokens} tokens, "
            f"{self.tokens_per_forward:.2f} per row and pass\n"
            f"head: {head:,} rows ({_share(head, whole)} of all); network: {network:,} tokens "
            f"({_share(network, whole)} of whole canvases)"
        )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"


def _line(group: Sequence[tuple[int, Pass]]) -> tuple[str, ...]:
    (first_number, first), (last_number, last) = group[0], group[-1]

    def span(a: int, b: int) -> str:
        return f"{a:,}" if a == b else f"{a:,}..{b:,}"

    return (
        span(first_number, last_number),
        span(first.first_block, first.last_block),
        f"{first.tokens:,}",
        span(first.standing, last.standing),
        span(first.head_rows, last.head_rows),
        f"{first.network_tokens:,}",
    )


def watched(
    backbone: Backbone,
    input_ids: Tensor | Sequence[Tensor],
    config: DiffusionGenerationConfig,
    *,
    infill_mask: Tensor | Sequence[Tensor] | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Inspection:
    """Decode, and return what the passes did; arguments as for `generate`.

    What `verify` and `measure_drift` run beside the decode is not part of it: both are left out.

    Raises:
        DllmError: as `generate` does.
    """
    asked = replace(config, verify=False, measure_drift=False, record_passes=True)
    standing: list[int] = []

    def count_standing(_: Tensor, committed_BC: Tensor) -> None:
        standing.append(int(committed_BC.sum()))

    with _counting(backbone) as network:
        output = generate(
            backbone, input_ids, asked, infill_mask=infill_mask, sample_ids=sample_ids, on_draft=count_standing
        )
    assert output.history is not None
    assert len(output.history) == len(network) == len(standing) == output.num_forwards, "every pass is seen once"
    canvas = (
        Canvas.from_prompts(input_ids, config.max_new_tokens)
        if infill_mask is None
        else Canvas.from_infill(input_ids, infill_mask)
    )
    return Inspection(
        passes=tuple(_passes(backbone, canvas, asked, output.history, network, standing)),
        rows=len(canvas.lengths),
        canvas_tokens=canvas.input_ids_BC.numel() * (2 if config.guidance_scale != 1 else 1),
        new_tokens=sum(output.new_tokens),
    )


def _passes(
    backbone: Backbone,
    canvas: Canvas,
    config: DiffusionGenerationConfig,
    history: Sequence[DenoisingStep],
    network: Sequence[int],
    standing: Sequence[int],
) -> Iterator[Pass]:
    places = [row.nonzero()[:, 0].tolist() for row in canvas.to_fill_BC.cpu()]
    blocks = [split_blocks(row, config.block_size, model_block_size(backbone)) for row in places]
    block_BC, _ = block_tables(blocks, canvas.input_ids_BC.shape[1])
    given = int((canvas.real_BC & ~canvas.to_fill_BC).sum())
    halves = 2 if config.guidance_scale != 1 else 1
    before = given
    for step, num_network, now in zip(history, network, standing, strict=True):
        at_work = block_BC[~step.score_BC.isnan()]
        yield Pass(
            first_block=int(at_work.min()) + 1,
            last_block=int(at_work.max()) + 1,
            tokens=now - before,
            standing=now - given,
            head_rows=halves * len(at_work),
            network_tokens=num_network,
        )
        before = now


@contextmanager
def _counting(backbone: Backbone) -> Iterator[list[int]]:
    """Collect the tokens of each pass through the decoder."""
    counts: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states_BLD = kwargs.get("inputs_embeds")
        ids_BL = kwargs.get("input_ids", args[0] if args else None)
        given = ids_BL if states_BLD is None else states_BLD
        assert given is not None
        counts.append(given.shape[0] * given.shape[1])

    handle = backbone.decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def planned(
    config: DiffusionGenerationConfig,
    prompt_lengths: Sequence[int],
    *,
    alignment: Alignment = "shifted",
    model_block: int | None = None,
) -> Inspection:
    """Return the passes of a rule whose counts are known beforehand, for any model that allows the setting.

    The text may end early (`stop_at_eos`), which nothing but a model can tell: these are the passes of one that does
    not.

    Args:
        config: of the decode.
        prompt_lengths: tokens of each prompt of the batch.
        alignment: of the model; `shifted` runs the state before a block once more where keys are kept.
        model_block: block size of a block-causal model; None for models in which every token sees the whole canvas.

    Raises:
        DllmError: scores have a say in how many tokens stand; or a setting that `generate` refuses.
    """
    what = None
    if config.sampler_config.name in ADAPTIVE_SAMPLERS:
        what = f"The rule '{config.sampler_config.name}' goes by scores"
    elif config.stability_threshold is not None:
        what = f"With stability_threshold={config.stability_threshold} it depends on the drafts when a block is done"
    if what is not None:
        raise DllmError(
            f"{what}: how many tokens a pass accepts is not known beforehand.",
            "Give a model and a prompt, and see what happens on them.",
        )
    assert prompt_lengths, "there is at least one row"
    length = max(prompt_lengths) + config.max_new_tokens
    backbone = _smallest_backbone(length, alignment, model_block)
    prompts = [torch.zeros(n, dtype=torch.long) for n in prompt_lengths]
    return watched(backbone, prompts, replace(config, stop_at_eos=False))


def _smallest_backbone(length: int, alignment: Alignment, model_block: int | None) -> Backbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.contract import Contract

    num_tokens = 2
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=num_tokens + 1,
                hidden_size=4,
                intermediate_size=4,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                max_position_embeddings=length,
            )
        )
    contract = Contract(
        alignment=alignment,
        mask_token_id=num_tokens,
        num_tokens=num_tokens,
        block_size=model_block,
        attention="bidirectional" if model_block is None else "block_causal",
    )
    return Backbone(model.eval(), contract)
