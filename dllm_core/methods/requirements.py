"""What a room needs from the rest of the house, stated without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

StateClass = Literal["response_predictors", "response", "all"]


@dataclass(frozen=True, kw_only=True)
class AnchorNeed:
    """Hidden states of a frozen model, read causally, that a room trains on.

    Attributes:
        layers: "embed", 1-indexed block outputs "1".."N-1", and "final" (the last block after the final norm).
        positions: "all"; "response", the rows of response tokens (what a text encoder reads); or
            "response_predictors", the rows whose next token is a response token (what alignment reads).
        heldout: states of the held-out sequences are read too, by `Method.diagnose`.
        sequences: the room loops over this many distinct training sequences, the first of the common order; its
            `select_samples` must agree (`SampleOrder.looped`). None: the whole training set.
        cell: the frozen model is this cell of the grid, once it is trained with the row's own seed, and the row is
            built on it: `Method.from_base` is given that cell's directory. None: the converted base model.
    """

    layers: tuple[str, ...]
    positions: StateClass = "all"
    heldout: bool = False
    sequences: int | None = None
    cell: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrajectoryNeed:
    """Commit orders a room trains on.

    Attributes:
        mode: where the order comes from: `student`, `ar_difficulty`, `left_to_right` or `random`.
        responses: size of the fixed subset of training sequences.
        commit_steps: forwards a response is decoded in; 0 means one token per forward.
        block_size: decoding block of the extraction, in tokens.
    """

    mode: Literal["student", "ar_difficulty", "left_to_right", "random"]
    responses: int
    commit_steps: int
    block_size: int


@dataclass(frozen=True, kw_only=True)
class PrefixNeed:
    """Another cell whose first part this cell continues from.

    Attributes:
        cell: name of that cell.
        share: part of its budget that is trained before the branch, in (0, 1).
    """

    cell: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Everything the flow prepares before a room can train."""

    anchors: AnchorNeed | None = None
    trajectories: TrajectoryNeed | None = None
    prefix: PrefixNeed | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What the evaluator, the benchmark and the report may ask of a room.

    Attributes:
        trains: False for a reference row that is only measured.
        causal: the network runs with causal attention.
        exact_likelihood: `token_nll` gives the exact likelihood (autoregressive rows).
        nelbo: `masked_nll` exists, so that the random-order and the block-wise bound can be estimated.
        unmasking: decodes by iterative unmasking (denoising steps, history, commit order).
        infill: `fill` exists: masks anywhere in a text can be filled in.
        streaming: `generate` can send drafts to a streamer.
        exact_cache: cached decoding equals uncached decoding.
        bound_block_size: `masked_nll` sees all of the blocks before a token's own, hidden or not, and nothing after it:
            every bound is block-wise, on blocks of this many tokens, and there is none for a random order.
        speed_group: rows of one group run the same network and must tie in speed at equal steps.
        diagnostics: `diagnose` returns figures of health on held-out sequences.
        latent: generates through continuous latents: no masks, no bound on the likelihood.
    """

    trains: bool = True
    causal: bool = False
    exact_likelihood: bool = False
    nelbo: bool = False
    unmasking: bool = False
    infill: bool = False
    streaming: bool = False
    exact_cache: bool = False
    bound_block_size: int | None = None
    speed_group: str | None = None
    diagnostics: bool = False
    latent: bool = False


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """The base model as far as the size of a room's own networks follows from it.

    Attributes:
        hidden: width of its states.
        layers: number of blocks.
        vocab: rows of the converted embedding: tokens, mask row and padding.
        parameters: of the converted model; a tied matrix counts once.
        positions_per_response_token: positions of a sequence, prompt included, for each of its response tokens: for
            rooms that run the base model too.
        length: tokens of a sequence, prompt included: what attention scores grow with. The default, with that of
            `positions_per_response_token`, is a window of 32 + 128.
        attention_width: heads times head width; None is `hidden`.
    """

    hidden: int
    layers: int
    vocab: int
    parameters: int
    positions_per_response_token: float = 1.25
    length: int = 160
    attention_width: int | None = None

    @property
    def response(self) -> float:
        """Response tokens of a sequence."""
        return self.length / self.positions_per_response_token


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """What networks of a room's own cost.

    Attributes:
        trainable: module -> trained parameters, in the order of the table that `--dry-run` prints.
        frozen: parameters that are kept in memory besides and not trained.
        flops_per_response_token: operations of training, forward and backward of all parts, for a response token
            that is presented once, extra passes and attention scores included; a room says what it leaves out.
        flops_per_denoised_token: operations of one denoising step of generation for a response token; None: at most a
            third of training.
        snapshot: parameters of a copy of what is trained, kept in the compute dtype while training and then dropped.
    """

    trainable: Mapping[str, int]
    frozen: int
    flops_per_response_token: float
    flops_per_denoised_token: float | None = None
    snapshot: int = 0

    @property
    def num_trainable(self) -> int:
        """Trained parameters of all modules."""
        return sum(self.trainable.values())


class RoomOptions(BaseModel):
    """Base of every room's options: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def requirements(self, num_layers: int) -> Requirements:
        """Return what has to be prepared for a backbone of `num_layers` blocks."""
        return Requirements()

    def capabilities(self) -> Capabilities:
        """Return what can be asked of a model of this room."""
        raise NotImplementedError(f"{type(self).__module__} must state its capabilities")

    def cost_factor(self) -> float:
        """Return training FLOPs relative to one masked-CE pass over the same sequence (for estimates and budgets)."""
        return 1.0

    def training_positions(self, prompt: int, response: int) -> int:
        """Return the positions that a sequence takes in the largest pass of training: what is kept for its backward.

        Args:
            prompt: tokens before the response; 0 where documents are packed.
            response: tokens of the response.
        """
        return prompt + response

    def network(self, base: BaseShape) -> NetworkCost | None:
        """Return sizes of the room's own networks on such a base; None where the base model itself is trained."""
        return None
