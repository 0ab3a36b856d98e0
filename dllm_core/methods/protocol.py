"""The protocol that every room fulfils. The trainer, evaluator, benchmark and flow know nothing else of a method.

A training step is two calls. `corrupt` sees the *global* batch and does all that is random, so that `totals` (the
denominators of every mean) are known before any forward pass; `loss` then sees one micro-batch at a time and divides
by those totals. Hence splitting a batch changes neither the loss nor the gradient.

Shape letters: B batch, L length, V vocabulary, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from dllm_core.errors import DllmError
from dllm_core.methods.requirements import Capabilities, RoomOptions

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.corruption.noise import NoiseSource
    from dllm_core.data.anchors import AnchorStore
    from dllm_core.data.batch import Batch
    from dllm_core.data.order import SampleOrder
    from dllm_core.data.sequences import SequenceSet
    from dllm_core.data.trajectories import TrajectoryStore
    from dllm_core.samplers.config import DiffusionGenerationConfig
    from dllm_core.samplers.record import CacheDrift, DenoisingStep


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own objective.

    Attributes:
        name: shown in logs.
        share: part of the budget, in (0, 1]; the shares of a method sum to 1.
    """

    name: str
    share: float


@dataclass(frozen=True)
class StepInfo:
    """Where training stands.

    Attributes:
        step: 0-based optimiser step.
        total_steps: steps of the whole run.
        phase: name of the phase the step belongs to.
        phase_step: 0-based step within the phase.
        phase_steps: steps of the phase.
        phase_start: step at which the phase began.
        batch_size: sequences per optimiser step.
    """

    step: int
    total_steps: int
    phase: str
    phase_step: int
    phase_steps: int
    phase_start: int
    batch_size: int

    @property
    def progress(self) -> float:
        """Progress of the phase in [0, 1)."""
        return self.phase_step / max(1, self.phase_steps)


@dataclass
class Resources:
    """Stores a room may read while it trains or is diagnosed; those it did not ask for are None."""

    anchors: AnchorStore | None = None
    trajectories: TrajectoryStore | None = None


@dataclass
class Corrupted:
    """A batch with everything random already drawn. Rooms subclass it or use `extras`.

    Attributes:
        clean: the batch as it was.
        noisy_BL: token ids after corruption, int64.
        masked_BL: bool; positions that were corrupted and are to be predicted. Never found by comparing ids.
        extras: more tensors with leading dimension B.
    """

    clean: Batch
    noisy_BL: Tensor
    masked_BL: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Corrupted:
        """Return the rows start..stop-1."""
        extras = {k: v[start:stop] for k, v in self.extras.items()}
        return type(self)(self.clean.rows(start, stop), self.noisy_BL[start:stop], self.masked_BL[start:stop], extras)

    def to(self, device: torch.device | str) -> Corrupted:
        extras = {k: v.to(device) for k, v in self.extras.items()}
        return type(self)(self.clean.to(device), self.noisy_BL.to(device), self.masked_BL.to(device), extras)


@dataclass
class LossOutput:
    """What a micro-batch contributes.

    Attributes:
        loss: scalar to call backward on; contributions of all micro-batches add up to the global loss.
        parts: name -> contribution to the global mean of that part (they add up as well), detached floats/tensors.
        flops: floating-point operations of this forward and its backward.
        teacher_flops: of that, spent on a frozen teacher in this call (0 with cached anchors).
        positions: token positions forwarded (views and doubled layouts included).
    """

    loss: Tensor
    parts: dict[str, Tensor | float]
    flops: float = 0.0
    teacher_flops: float = 0.0
    positions: int = 0


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """Room-independent generation settings, used by the evaluator and the benchmark.

    Attributes:
        max_new_tokens: tokens to generate for every prompt.
        num_steps: denoising steps for the whole response; ignored by autoregressive rooms.
        temperature: 0 is greedy.
        seed: keys the noise together with `sample_ids`.
        sample_ids: one id per prompt; None means 0..n-1.
        stop_at_eos: False generates exactly `max_new_tokens`.
        block_size: tokens per block, left to right; None is one block. Rooms without blocks ignore it.
        record_history: keep the commit step of every token.
    """

    max_new_tokens: int
    num_steps: int
    temperature: float = 0.0
    seed: int = 0
    sample_ids: tuple[int, ...] | None = None
    stop_at_eos: bool = False
    block_size: int | None = None
    record_history: bool = False


@dataclass
class GenerationOutput:
    """What generation returns.

    Attributes:
        sequences: one int64 tensor per prompt, prompt included.
        new_tokens: generated tokens per prompt, EOS included, nothing after it.
        num_forwards: network passes made for the batch (NFE), every network counted.
        first_token_s: seconds until the first token was final.
        commit_step: with `record_history`, per prompt the 1-based forward at which each new token was fixed.
        drift: with `measure_drift`, what an approximate cache did.
        history: with `record_passes`, every pass.
    """

    sequences: list[Tensor]
    new_tokens: list[int]
    num_forwards: int
    first_token_s: float
    commit_step: list[Tensor] | None = None
    drift: CacheDrift | None = None
    history: list[DenoisingStep] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Valid new tokens per prompt and network pass."""
        return sum(self.new_tokens) / max(1, len(self.new_tokens)) / max(1, self.num_forwards)


@dataclass(frozen=True)
class ScoredTokens:
    """Per-token result of a likelihood or masked prediction.

    Attributes:
        nll_BL: negative log-likelihood in nats, fp32; 0 where not scored.
        correct_BL: bool; argmax equals the token.
        scored_BL: bool.
    """

    nll_BL: Tensor
    correct_BL: Tensor
    scored_BL: Tensor


class Method(nn.Module, ABC):
    """A way to turn an autoregressive checkpoint into a language model that decodes in parallel.

    Args:
        backbone: the converted checkpoint; None for a room that trains networks of its own and holds no backbone.
        options: the room's validated options.

    Attributes:
        directory: where the model was loaded from; None for one that was built in memory.
    """

    options: RoomOptions
    backbone: Backbone | None
    directory: Path | None = None

    def __init__(self, backbone: Backbone | None, options: RoomOptions) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = options
        self._tokenizer: Any = None

    @property
    def capabilities(self) -> Capabilities:
        return self.options.capabilities()

    @property
    def device(self) -> torch.device:
        """Where the weights are: the device of the first parameter."""
        return next(self.parameters()).device

    @property
    def tokenizer(self) -> Any:
        """The tokenizer saved beside the weights, loaded at the first use.

        Raises:
            DllmError: the model was built in memory, or its directory holds no tokenizer.
        """
        if self._tokenizer is None:
            from dllm_core.methods.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self.directory)
        return self._tokenizer

    # -- training ---------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """Return the training phases in order."""
        return (Phase("train", 1.0),)

    def select_samples(self, order: SampleOrder, info: StepInfo) -> list[tuple[int, int]]:
        """Return (sample id, epoch) for each sequence of this step; by default the grid's common order."""
        start = info.step * info.batch_size
        return [order[i] for i in range(start, start + info.batch_size)]

    def prepare(self, sequences: SequenceSet, samples: Sequence[int], resources: Resources) -> None:
        """Take statistics of the training data before the first step of a fresh run.

        Called once, before the optimiser takes its master copies, and never after a restore: all that it computes has
        to lie in parameters or persistent buffers, which every checkpoint keeps. It changes neither their shapes nor
        which of them are trained. (A frozen parameter that changes *later*, e.g. an average, belongs in a buffer.)

        Args:
            sequences: the training set.
            samples: distinct training sequences that this run will present, in order of first presentation.
            resources: stores the room reads.
        """

    def freeze(self, rules: Sequence[str]) -> None:
        """Exclude parts from training (`train.freeze`); by default the backbone's.

        Raises:
            DllmError: an unknown rule, or a room without a backbone.
        """
        if self.backbone is None:
            raise DllmError(
                "train.freeze is set, but this method trains networks of its own and no backbone.",
                "Set train.freeze=[] for its cell (cells.NAME.train.freeze).",
            )
        self.backbone.freeze(rules)

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass (`train.activation_checkpointing`): memory, not the result.

        By default the backbone's; a room with networks of its own whose activations matter overrides it.
        """
        if self.backbone is not None:
            self.backbone.enable_activation_checkpointing()

    @abstractmethod
    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw everything random for the global batch. Runs on CPU, before any forward."""

    @abstractmethod
    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the denominators of the global means (summed over processes by the trainer)."""

    @abstractmethod
    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the global loss."""

    def on_step_end(self, info: StepInfo) -> None:
        """Called after each optimiser step (EMA, adaptive samplers)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups; `lr_scale` and `weight_decay` keys override the defaults."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def num_new_parameters(self) -> int:
        """Parameters that the starting checkpoint did not have."""
        return 0

    # -- measuring --------------------------------------------------------------------------------------------------

    def masked_nll(self, batch: Batch, masked_BL: Tensor) -> ScoredTokens:
        """Return -log p of the clean tokens at masked positions given the others (capability `nelbo`)."""
        raise NotImplementedError(f"{type(self).__module__} has no NELBO")

    def token_nll(self, batch: Batch) -> ScoredTokens:
        """Return the exact -log p of the response tokens (capability `exact_likelihood`)."""
        raise NotImplementedError(f"{type(self).__module__} has no exact likelihood")

    def diagnose(self, batch: Batch, resources: Resources, noise: NoiseSource) -> dict[str, Any]:
        """Return JSON-able figures of health (capability `diagnostics`).

        Args:
            batch: held-out sequences, all of which are in `resources.anchors` where the room's need says `heldout`.
            resources: stores the room reads.
            noise: keyed randomness of the measurement.
        """
        return {}

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Generate a response for each prompt (1-D int64 tensors).

        Args:
            prompts: token ids; every prompt holds at least one token.
            request: room-independent settings.
            on_draft: called after each pass with (canvas [B, L], committed [B, L] bool) where the room can stream.
        """

    def fill(
        self,
        texts: Sequence[Tensor],
        masks: Sequence[Tensor],
        config: DiffusionGenerationConfig,
        *,
        sample_ids: Sequence[int] | None = None,
    ) -> GenerationOutput:
        """Generate tokens in place, wherever a mask is True (capability `infill`).

        Args:
            texts: 1-D int64 ids of any lengths; what stands at a mask is not read.
            masks: bool, of the same shapes.
            config: how; `max_new_tokens` is not used.
            sample_ids: one id per text, which with the seed keys its noise; None means 0..B-1.
        """
        raise NotImplementedError(f"{type(self).__module__} cannot fill in masks")

    # -- keeping ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Write weights and config so that `from_pretrained` gives the same model."""

    @classmethod
    def from_base(
        cls,
        directory: Path,
        options: RoomOptions,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Build the untrained method from the converted base model; global randomness is seeded by the caller.

        A room that needs no backbone in memory overrides this and reads single tensors (the embedding table).

        Args:
            directory: the converted checkpoint.
            options: the room's validated options.
            device: of the weights.
            dtype: of the weights; training starts from fp32.
        """
        from dllm_core.backbone.backbone import Backbone

        return cls(Backbone.from_pretrained(directory, dtype=dtype, device=device), options)

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, directory: Path, options: RoomOptions, *, dtype: torch.dtype, device: torch.device | str
    ) -> Method:
        """Load what `save_pretrained` wrote."""
