"""VFM: noise that knows the prompt, and a map from noise to text in a few passes (after arXiv:2603.07276).

S segments (one document's response each), B rows, L slots or positions, P prompt tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.methods.anchor_states import looped_samples
from dllm_core.methods.prompt_reader import PromptReader
from dllm_core.methods.protocol import (
    Corrupted,
    GenerationOutput,
    LossOutput,
    Phase,
    Resources,
    SamplingRequest,
    StepInfo,
)
from dllm_core.methods.requirements import RoomOptions
from dllm_core.methods.segments import Segments
from dllm_core.methods.single_network import SingleNetworkMethod
from dllm_core.methods.vfm import generation, objective, soft_masks
from dllm_core.methods.vfm.adapter import Adapter, Posterior
from dllm_core.methods.vfm.draws import draw
from dllm_core.methods.vfm.flow_map import FlowMap
from dllm_core.methods.vfm.options import Options
from dllm_core.methods.vfm.prompts import embedded_prompts, moments, stored_states, visible_prompts
from dllm_core.methods.vfm.teacher import Teacher
from dllm_core.samplers.config import DiffusionGenerationConfig

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

FLOW, PAIRED, ADAPTER = "flow", "paired", "adapter"


class Method(SingleNetworkMethod):
    """The room's method.

    Phase `flow` trains the map as a denoiser of noisy embeddings, the adapter with it. At t = 1 that alone tends to a
    product of marginals: one pass mixes the modes. Phase `paired` trains one pass from z on the tokens that K passes
    from the same z lead to, which are a function of z. With `freeze_base` there is one phase and no noise.

    Args:
        backbone: the converted checkpoint.
        options: see `Options`.
        language_model: directory of the frozen language model whose states prompts are read through, where the base
            is trained and `prompt_encoder` is `states`.

    Attributes:
        adapter: q(z | prompt).
        flow: time conditioning and sampler of the map.
        teacher: the map at the start of the paired phase; empty before.
        log_gate: log of the soft masks' gate (`freeze_base` alone).
        layer: what the adapter reads of prompts: a layer of the frozen model, or "embedding".
        prompt_reader: the frozen language model, where it is another one than the base.
        mean_D, std_D: of the states that the adapter reads.
    """

    options: Options
    mean_D: Tensor
    std_D: Tensor

    def __init__(self, backbone: Backbone, options: Options, *, language_model: Path | None = None) -> None:
        super().__init__(backbone, options)
        hidden = backbone.hidden_size
        self.layer = options.layer_name(backbone.num_layers) if options.reads_states else "embedding"
        self.causal = options.freeze_base and options.frozen_attention == "causal"
        self.adapter = Adapter(hidden, hidden, options.sizes, spread=not options.freeze_base)
        self.flow = FlowMap(hidden, timed=not options.freeze_base)
        self.teacher = Teacher()
        table_VD = backbone.embedding_weight_VD.detach()[: backbone.contract.num_tokens]
        self.flow.scale.copy_(table_VD.float().square().mean().sqrt())
        self.register_buffer("mean_D", torch.zeros(hidden))
        self.register_buffer("std_D", torch.ones(hidden))
        self.log_gate: nn.Parameter | None = None
        if options.freeze_base:
            backbone.requires_grad_(False)
            self.log_gate = nn.Parameter(torch.tensor([math.log(options.gate)]))
        self.prompt_reader = PromptReader(language_model, self.layer)
        self.to(backbone.device)

    @classmethod
    def from_base(
        cls,
        directory: Path,
        options: RoomOptions,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Start from a converted checkpoint."""
        from dllm_core.backbone.backbone import Backbone

        assert isinstance(options, Options)
        backbone = Backbone.from_pretrained(directory, dtype=dtype, device=device)
        return cls(backbone, options, language_model=Path(directory)).to(device=device, dtype=dtype)

    @property
    def shift(self) -> int:
        """1 where the state before a token predicts it, else 0."""
        return int(self.is_shifted)

    @property
    def head_flops(self) -> float:
        """Operations of one row through the head."""
        return 2.0 * self.backbone.head_weight_VD.numel()

    @property
    def gate(self) -> Tensor:
        """Strength of the soft masks relative to the scale of the embeddings, [1]; positive whatever is learned."""
        assert self.log_gate is not None, "only a frozen base has soft masks"
        return self.log_gate.exp()

    # -- the prompt ---------------------------------------------------------------------------------------------------

    def hidden_prompt(self, batch: Batch) -> Tensor | None:
        """Return bool [B, L]: prompt tokens that the map never sees; None where it sees all of them.

        `prompt: hidden` shows the mask token instead of every one of them, the first one of a document too. Hiding
        them by an attention mask would not do: the last prompt position predicts the first response token.
        """
        if self.options.prompt == "visible":
            return None
        return (batch.document_BL >= 0) & ~batch.response_BL

    def standardise(self, states_SPD: Tensor) -> Tensor:
        """Return states with mean 0 and variance 1 per dimension over the training prompts, fp32."""
        return (states_SPD.float() - self.mean_D.float()) / self.std_D.float()

    def posterior(
        self, batch: Batch, cut: Segments, resources: Resources | None, rows: Tensor | None = None
    ) -> Posterior:
        """Return q(z | prompt) of segments.

        Args:
            batch: the prompts.
            cut: where they are.
            resources: stores, from which states are read; None runs the language model instead (generation).
            rows: which segments, int64; None: all.
        """
        states = self.options.reads_states
        if not states:
            read_SPC = embedded_prompts(self, batch, cut)
        elif resources is None:
            read_SPC = self.standardise(cut.prompts(self.language_model_states(batch)))
        else:
            read_SPC = self.standardise(stored_states(self, batch, cut, resources))
        visible_SP = visible_prompts(batch, cut, states=states)
        read_SPC = read_SPC.masked_fill(~visible_SP[..., None], 0.0)
        picked = slice(None) if rows is None else rows
        found: Posterior = self.adapter(read_SPC[picked], visible_SP[picked], cut.real_SL[picked])
        return found

    @torch.no_grad()
    def language_model_states(self, batch: Batch) -> Tensor:
        """Return the frozen language model's causal states [B, L, D] of the prompts; one pass.

        Raises:
            DllmError: the language model is not at hand.
        """
        if self.options.freeze_base:
            model = self.backbone
        else:
            model = self.prompt_reader.loaded(self.backbone.embedding_weight_VD.dtype, self.device)
        with model.capture([self.layer]) as states:
            if batch.is_plain:
                model.hidden(batch.input_ids_BL, causal=True)
            else:
                model.hidden(
                    batch.input_ids_BL, causal=True, document_BL=batch.document_BL, position_BL=batch.position_BL
                )
        return states[self.layer]

    # -- training -----------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """Return the flow and the paired phase, by their share of the steps."""
        if self.options.freeze_base:
            return (Phase(ADAPTER, 1.0),)
        share = self.options.paired_share
        return (Phase(FLOW, 1.0 - share), Phase(PAIRED, share)) if share else (Phase(FLOW, 1.0),)

    def select_samples(self, order: SampleOrder, info: StepInfo) -> list[tuple[int, int]]:
        """Return the common order, looped over the first `anchor_sequences` where that is set."""
        return looped_samples(order, info, self.options.anchor_sequences)

    def prepare(self, sequences: SequenceSet, samples: Sequence[int], resources: Resources) -> None:
        """Take the moments of the prompts' states, where the adapter reads them."""
        if not self.options.reads_states:
            return
        mean_D, std_D = moments(self, sequences, list(samples)[: self.options.statistics_sequences], resources)
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(std_D)

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw times, noise and coins of the global batch; with a frozen base, the undecided tokens."""
        if self.options.freeze_base:
            return soft_masks.corrupt(batch, noise)
        if info.phase == PAIRED and self.teacher.is_empty:
            self.teacher.take(self.map_parameters().items())
        extras = draw(batch, info, noise, self.options, self.backbone.hidden_size, paired=info.phase == PAIRED)
        extras = {name: tensor.to(batch.input_ids_BL.device) for name, tensor in extras.items()}
        return Corrupted(batch, batch.input_ids_BL, batch.response_BL, extras)

    def map_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the map f: the base model and the time embedding, not the adapter."""
        return {n: p for n, p in self.named_parameters() if n.startswith(("backbone.", "flow."))}

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the denominators of the global means."""
        if self.options.freeze_base:
            return {"sequences": float(corrupted.masked_BL.any(1).sum())}
        return objective.batch_totals(corrupted)

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss.

        Raises:
            DllmError: the adapter reads states, and no anchor store was given or it is of another width.
            StoreError: the store lacks a row or layer, or belongs to another model.
        """
        if self.options.freeze_base:
            return soft_masks.loss(self, corrupted, totals, resources)
        return objective.loss(self, corrupted, totals, info, resources)

    def num_new_parameters(self) -> int:
        """The adapter, and the time embedding or the gate."""
        count = sum(p.numel() for module in (self.adapter, self.flow) for p in module.parameters())
        return count + (0 if self.log_gate is None else self.log_gate.numel())

    # -- measuring and generating -------------------------------------------------------------------------------------

    def diagnose(self, batch: Batch, resources: Resources, noise: NoiseSource) -> dict[str, Any]:
        """Return what the noise carries; see `dllm_core.methods.vfm.health`."""
        from dllm_core.methods.vfm.health import health

        with self.measuring():
            return health(self, batch, resources, noise)

    def sample(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Generate a response for each prompt in `num_steps` passes; see `Method.sample`. Nothing is streamed."""
        config = DiffusionGenerationConfig.from_request(request)
        return self.generate(list(prompts), config, sample_ids=request.sample_ids)

    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        generation_config: DiffusionGenerationConfig | None = None,
        *,
        sample_ids: Sequence[int] | None = None,
        source: generation.Source = "adapter",
    ) -> GenerationOutput:
        """Generate in the dialect of transformers.

        Args:
            input_ids: prompts, int64 [B, P] without padding, or a list of 1-D tensors of any lengths.
            generation_config: `max_new_tokens`, `max_denoising_steps` (passes of the map), `temperature`, `top_k`,
                `top_p`, `seed` and the end of text are used; rules and blocks belong to token-space decoding. At
                temperature 0 a sample still depends on its noise, hence on seed and sample id.
            sample_ids: one id per prompt, which with the seed keys its noise; None means 0..B-1.
            source: `adapter`, or `normal` for N(0, 1) noise that knows nothing of the prompt.

        Returns:
            Sequences on the CPU, prompt included. `num_forwards` counts every network.

        Raises:
            DllmError: an empty prompt, or lists of different lengths.
        """
        config = generation_config or DiffusionGenerationConfig()
        job = generation.job_of(self, list(input_ids), config, sample_ids=sample_ids, source=source)
        with self.measuring():
            return generation.generate(self, job)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: Path) -> None:
        """Write the base model, and the adapter beside it; see `dllm_core.methods.vfm.keeping`."""
        from dllm_core.methods.vfm.keeping import save

        super().save_pretrained(directory)
        save(self, directory)

    @classmethod
    def from_pretrained(
        cls, directory: Path, options: RoomOptions, *, dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            ContractError: no finished VFM cell, or one of other sizes or another base model.
        """
        from dllm_core.methods.vfm.keeping import load

        assert isinstance(options, Options)
        return load(cls, Path(directory), options, dtype=dtype, device=device)
