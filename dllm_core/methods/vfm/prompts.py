"""What the adapter reads of prompts: unit-RMS embeddings, or the frozen model's states. S segments, P prompt tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DllmError
from dllm_core.methods.ldlm.segments import Segments, segments_of
from dllm_core.methods.protocol import Resources
from dllm_core.methods.vfm.flow_map import unit_embeddings

if TYPE_CHECKING:
    from dllm_core.methods.vfm.method import Method

_SEQUENCES_AT_ONCE = 16
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
        DllmError: no anchor store, or states of another width.
        StoreError: the store lacks a row or layer, or belongs to another model.
    """
    if resources.anchors is None:
        raise DllmError(
            "vfm with prompt_encoder: states reads the frozen model's states of prompts; no anchor store was given.",
            f"Pass Resources(anchors=...) with all rows of layer {method.layer}, or take prompt_encoder: embedding.",
        )
    keys = [batch.sequence_keys[row] for row in cut.row_S.tolist()]
    wanted = [position_P.cpu() for position_P in cut.prompt_SP]
    states_MD = resources.anchors.gather(keys, [method.layer], wanted)[method.layer]
    if states_MD.shape[-1] != method.backbone.hidden_size:
        raise DllmError(
            f"The anchors of layer {method.layer} are {states_MD.shape[-1]} wide, the base model is "
            f"{method.backbone.hidden_size}.",
            "Use the anchors of the model that this cell starts from.",
        )
    return states_MD.view(*cut.prompt_SP.shape, -1).to(method.device)


@torch.no_grad()
def moments(
    method: Method, sequences: SequenceSet, samples: Sequence[int], resources: Resources
) -> tuple[Tensor, Tensor]:
    """Return mean_D and std_D of the states that the adapter reads, fp32 on CPU."""

    def parts() -> Iterator[Tensor]:
        for first in range(0, len(samples), _SEQUENCES_AT_ONCE):
            batch = sequences.batch_of(samples[first : first + _SEQUENCES_AT_ONCE])
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
