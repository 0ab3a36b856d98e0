"""What the adapter reads of prompts: unit-RMS embeddings, or the frozen model's states. S segments, P prompt tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.methods import anchor_states
from dllm_core.methods.anchor_states import batches_of
from dllm_core.methods.protocol import Resources
from dllm_core.methods.segments import Segments, segments_of
from dllm_core.methods.vfm.flow_map import unit_embeddings

if TYPE_CHECKING:
    from dllm_core.methods.vfm.method import Method

_STD_MIN = 1e-4


def visible_prompts(batch: Batch, cut: Segments, *, states: bool) -> Tensor:
    """Return bool [S, P]: prompt tokens that are there. States leave out a document's first position, an outlier."""
    if not states:
        return cut.prompt_real_SP
    return cut.prompt_real_SP & (cut.prompts(batch.position_BL) > 0)


def embedded_prompts(method: Method, batch: Batch, cut: Segments) -> Tensor:
    """Return the prompts' embeddings at RMS 1, fp32 [S, P, D]; no gradient reaches the table."""
    return unit_embeddings(method.backbone.embedding_weight_VD, cut.prompts(batch.input_ids_BL))


def stored_states(method: Method, batch: Batch, cut: Segments, resources: Resources) -> Tensor:
    """Return the frozen model's states of the prompts as stored, [S, P, D].

    Raises:
        DllmError: no anchor store.
        ContractError: states of another width than the base model's.
        StoreError: the store lacks a row or layer, or belongs to another model.
    """
    found_SPD = anchor_states.stored_states(
        resources, batch, cut.row_S, cut.prompt_SP, method.layer, method.backbone.hidden_size
    )
    return found_SPD.to(method.device)


@torch.no_grad()
def moments(
    method: Method, sequences: SequenceSet, samples: Sequence[int], resources: Resources
) -> tuple[Tensor, Tensor]:
    """Return mean_D and std_D of the states that the adapter reads, fp32 on CPU."""

    def parts() -> Iterator[Tensor]:
        for batch in batches_of(sequences, samples):
            cut = segments_of(batch)
            visible_SP = visible_prompts(batch, cut, states=True)
            if bool(visible_SP.any()):
                yield stored_states(method, batch, cut, resources).cpu()[visible_SP].double()

    hidden = method.backbone.hidden_size
    count, sum_D, square_D = 0, torch.zeros(hidden).double(), torch.zeros(hidden).double()
    for states_ND in parts():
        count += len(states_ND)
        sum_D += states_ND.sum(0)
        square_D += states_ND.square().sum(0)
    if count < 2:
        return torch.zeros(hidden), torch.ones(hidden)
    mean_D = sum_D / count
    std_D = (square_D / count - mean_D.square()).clamp(min=0).sqrt()
    return mean_D.float(), std_D.clamp(min=_STD_MIN).float()
