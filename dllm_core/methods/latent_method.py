"""What rooms have in common that train networks of their own on a frozen language model's states.

B batch, S segments, L slots, N tokens, D width of the frozen states, V vocabulary. The language model is not in memory
while such a room trains: its states come from the anchor cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from dllm_core.data.batch import Batch
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.methods import anchor_states, latent_keeping
from dllm_core.methods.anchor_states import batches_of, looped_samples
from dllm_core.methods.closed_forms import Statistics, gather_statistics
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.latent_keeping import CellForm
from dllm_core.methods.latent_options import LatentOptions
from dllm_core.methods.prompt_reader import PromptReader
from dllm_core.methods.protocol import Method, Resources, StepInfo
from dllm_core.methods.requirements import RoomOptions
from dllm_core.methods.segments import segments_of
from dllm_core.training.ema import Ema

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class LatentMethod(Method):
    """A method whose networks are its own. A room makes `networks` and then calls `start_averages`.

    Args:
        backbone: a converted model in memory, of which the embedding table is kept, and the model itself where
            generating reads prompts through it; or None.
        options: the room's.
        base: what is known of the language model, where no backbone is given.

    Attributes:
        networks: all that is trained.
        head_VD: rows along which tokens are read out.
        layer: whose states are read.
        mean_D, std_D: of the frozen states over the training data, fp32 whatever the compute dtype.
        ema: averages of the weights that generate; holds none in a loaded cell, whose weights are the averages.
        prompt_reader: the language model, where generating needs it.
    """

    FORM: ClassVar[CellForm]
    """How the room's cells are written."""
    AVERAGED: ClassVar[str] = "networks"
    """The module whose weights are averaged."""

    options: LatentOptions
    networks: nn.Module
    head_VD: Tensor
    mean_D: Tensor
    std_D: Tensor
    ema: Ema

    def __init__(self, backbone: Backbone | None, options: LatentOptions, *, base: Base | None = None) -> None:
        super().__init__(None, options)
        if base is None:
            assert backbone is not None, "give a backbone or what is known of one"
            base = Base.of(backbone)
        self.base = base
        self.layer = options.layer_name(base.num_layers)
        self.register_buffer("mean_D", torch.zeros(base.hidden))
        self.register_buffer("std_D", torch.ones(base.hidden))
        self.prompt_reader = PromptReader(
            base.directory, self.layer, backbone if options.keeps_language_model else None
        )

    @classmethod
    def from_base(
        cls,
        directory: Path,
        options: RoomOptions,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Start from a converted checkpoint, of which one tensor is read."""
        assert isinstance(options, LatentOptions)
        return cls(None, options, base=Base.read(directory)).to(device=device, dtype=dtype)

    # -- the frozen states --------------------------------------------------------------------------------------------

    def standardise(self, states: Tensor) -> Tensor:
        """Return states with mean 0 and variance 1 per dimension over the training data, in the compute dtype."""
        return ((states.float() - self.mean_D.float()) / self.std_D.float()).to(self.head_VD.dtype)

    def stored_states(self, batch: Batch, row_S: Tensor, position_SL: Tensor, resources: Resources) -> Tensor:
        """Return states [S, L, D] as stored, on the method's device; see `anchor_states.stored_states`."""
        found_SLD = anchor_states.stored_states(resources, batch, row_S, position_SL, self.layer, self.base.hidden)
        return found_SLD.to(self.device)

    def prepare(self, sequences: SequenceSet, samples: Sequence[int], resources: Resources) -> None:
        """Take the states' moments, and start from closed forms where the options say so."""
        chosen = list(samples)[: self.options.start_sequences]
        head_VD = self.head_VD.detach().float().cpu()

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches_of(sequences, chosen):
                cut = segments_of(batch)
                states_SLD = self.stored_states(batch, cut.row_S, cut.position_SL, resources)
                yield states_SLD[cut.real_SL].float().cpu(), cut.slots(batch.input_ids_BL)[cut.real_SL].cpu()

        found = gather_statistics(parts(), head_VD)
        self.mean_D.copy_(found.mean_D)
        self.std_D.copy_(found.std_D)
        if self.options.start == "linear":
            states_ND, ids_N = next(parts())
            with torch.no_grad():
                self.start_linear(found, states_ND, ids_N, head_VD)
        self.start_averages()

    @abstractmethod
    def start_linear(self, found: Statistics, states_ND: Tensor, ids_N: Tensor, head_VD: Tensor) -> None:
        """Set straight paths to closed forms; called without gradients.

        Args:
            found: moments over the training data.
            states_ND: states of some response tokens, as stored.
            ids_N: those tokens.
            head_VD: rows of the token head, fp32 on CPU.
        """

    # -- training -----------------------------------------------------------------------------------------------------

    def select_samples(self, order: SampleOrder, info: StepInfo) -> list[tuple[int, int]]:
        """Return the common order, looped over the first `anchor_sequences` where that is set."""
        return looped_samples(order, info, self.options.anchor_sequences)

    def num_new_parameters(self) -> int:
        """All that is trained is new."""
        return sum(p.numel() for p in self.networks.parameters())

    # -- averages -----------------------------------------------------------------------------------------------------

    @property
    def averaged(self) -> nn.Module:
        """The module whose weights are averaged."""
        return self.get_submodule(self.AVERAGED)

    def start_averages(self) -> None:
        """Let the averages be the weights as they are."""
        self.ema = Ema(self.averaged.named_parameters(), self.options.ema_decay).to(self.device)

    def drop_averages(self) -> None:
        """Keep no averages: the weights of a finished cell are the averages, once in memory."""
        self.ema = Ema({}, 0.0)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Run in evaluation mode with the averages, where there are any, in place of the weights; restore both."""
        was_training = self.training
        self.eval()
        try:
            with self.ema.swapped(self.averaged) if self.ema.names else nullcontext():
                yield
        finally:
            self.train(was_training)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: Path) -> None:
        """Write the averaged weights, the frozen head, statistics and config; see `latent_keeping`."""
        latent_keeping.save(self, directory)

    @classmethod
    def from_pretrained(
        cls, directory: Path, options: RoomOptions, *, dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            ContractError: no finished cell of this room, or one with other options.
        """
        assert isinstance(options, LatentOptions)
        return latent_keeping.load(cls, directory, options, dtype=dtype, device=device)
