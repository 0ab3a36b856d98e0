"""Reading the frozen model's states from the anchor store. S segments, L slots, M rows, D hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import ContractError, DllmError
from dllm_core.methods.protocol import Resources, StepInfo

_SEQUENCES_AT_ONCE = 16


def stored_states(
    resources: Resources, batch: Batch, row_S: Tensor, position_SL: Tensor, layer: str, hidden: int
) -> Tensor:
    """Return states [S, L, D] of positions of rows, on CPU, as stored.

    Args:
        resources: with the anchor store.
        batch: whose rows are read.
        row_S: int64; row of the batch of each segment.
        position_SL: int64; positions in that row.
        layer: name of the layer.
        hidden: D, width of the base model.

    Raises:
        DllmError: no anchor store.
        ContractError: states of another width than the base model's.
        StoreError: the store lacks a row or layer, or belongs to another model.
    """
    if resources.anchors is None:
        raise DllmError(
            "This method reads the frozen model's states, and no anchor store was given.",
            f"Pass Resources(anchors=...) with the rows of layer {layer} that its requirements name.",
        )
    keys = [batch.sequence_keys[row] for row in row_S.tolist()]
    states_MD = resources.anchors.gather(keys, [layer], list(position_SL.cpu()))[layer]
    if states_MD.shape[-1] != hidden:
        raise ContractError(
            f"The anchors of layer {layer} are {states_MD.shape[-1]} wide, the base model is {hidden}.",
            "Use the anchors of the model that this cell starts from.",
        )
    return states_MD.view(*position_SL.shape, -1)


def batches_of(sequences: SequenceSet, samples: Sequence[int]) -> Iterator[Batch]:
    """Yield samples a few at a time: their states need not be in memory together."""
    for first in range(0, len(samples), _SEQUENCES_AT_ONCE):
        yield sequences.batch_of(samples[first : first + _SEQUENCES_AT_ONCE])


def looped_samples(order: SampleOrder, info: StepInfo, sequences: int | None) -> list[tuple[int, int]]:
    """Return (sample id, epoch) of a step in the common order, looped over the first `sequences`; None: all of them."""
    first = info.step * info.batch_size
    return [order.looped(i, sequences) for i in range(first, first + info.batch_size)]
