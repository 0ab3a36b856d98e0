"""Commit orders of training responses. B batch, L length, M masked.

The order is teacher-forced: the student says *where* it would commit next, the reference token is what is committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import Method
from dllm_core.methods.requirements import TrajectoryNeed
from dllm_core.methods.single_network import gather_rows
from dllm_core.methods.trajectory.subset import subset

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

__all__ = ["extract_orders", "num_forwards", "subset"]


@dataclass
class _Response:
    """The response of one document of one row, while its order is being found."""

    row: int
    positions: Tensor
    committed: int = 0


def num_forwards(need: TrajectoryNeed, response_tokens: int) -> int:
    """Return the network passes the extraction makes for a response of `response_tokens` tokens."""
    if need.mode == "student":
        return min(need.commit_steps or response_tokens, response_tokens)
    return 1 if need.mode == "ar_difficulty" else 0


def extract_orders(model: Backbone | Method, batch: Batch, need: TrajectoryNeed, noise: NoiseSource) -> Tensor:
    """Return commit_step_BL, int32 on CPU: the step, from 0, at which each response token is fixed, -1 elsewhere.

    Args:
        model: for `student` a trained denoiser; for `ar_difficulty` the unconverted model, which is run causally. A
            backbone, or a method that has one. Not used by the other modes.
        batch: training sequences on the model's device.
        need: mode, forwards per response and decoding block.
        noise: keys the order of mode `random`.

    `student` decodes block by block from left to right, all documents of the batch side by side. The first f of F
    forwards commit floor(n f / F) of n tokens, the most confident of the current block first and, when the block is
    done, those of the next. Confidence is the largest probability at temperature 1; ties go to the earlier position.
    `ar_difficulty` ranks by the entropy of the causal prediction, ascending, which is a difficulty rather than a commit
    order. A sequence gets the same order alone as in a batch (up to near-ties in the confidences).
    """
    backbone = model.backbone if isinstance(model, Method) else model
    assert backbone is not None, "commit orders come from a backbone"
    responses = _responses(batch)
    steps_BL = torch.full(batch.response_BL.shape, -1, dtype=torch.int32)
    if need.mode == "student":
        was_training = backbone.training
        backbone.eval()
        try:
            _student_orders(backbone, batch, need, responses, steps_BL)
        finally:
            backbone.train(was_training)
        return steps_BL
    score_BL = _scores(backbone, batch, need.mode, noise)
    for response in responses:
        order = torch.argsort(score_BL[response.row, response.positions], stable=True)
        steps_BL[response.row, response.positions[order]] = torch.arange(len(order), dtype=torch.int32)
    return steps_BL


def _responses(batch: Batch) -> list[_Response]:
    response_BL, document_BL = batch.response_BL.cpu(), batch.document_BL.cpu()
    found = []
    for row in range(len(batch)):
        for document in torch.unique(document_BL[row][response_BL[row]]).tolist():
            inside_L = response_BL[row] & (document_BL[row] == document)
            found.append(_Response(row, inside_L.nonzero(as_tuple=True)[0]))
    return found


@torch.no_grad()
def _student_orders(
    backbone: Backbone, batch: Batch, need: TrajectoryNeed, responses: list[_Response], steps_BL: Tensor
) -> None:
    """Fill `steps_BL` by decoding with the reference tokens."""
    forward = -1
    while active := [r for r in responses if r.committed < len(r.positions)]:
        forward += 1
        rows = sorted({response.row for response in active})
        index = torch.tensor(rows)
        masked_RL = batch.response_BL.cpu()[index] & (steps_BL[index] < 0)
        confidence_BL = torch.full(steps_BL.shape, -torch.inf)
        confidence_BL[index] = _confidence(backbone, batch, index, masked_RL)
        for response in active:
            _commit(response, need, forward, confidence_BL[response.row], steps_BL[response.row])


def _commit(response: _Response, need: TrajectoryNeed, forward: int, confidence_L: Tensor, steps_L: Tensor) -> None:
    """Commit this forward's quota of one response: confidence order inside blocks, blocks from left to right."""
    total = len(response.positions)
    forwards = num_forwards(need, total)
    quota = total * (forward + 1) // forwards - response.committed
    for start in range(0, total, need.block_size):
        block = response.positions[start : start + need.block_size]
        open_ = block[steps_L[block] < 0]
        order = torch.argsort(confidence_L[open_], descending=True, stable=True)
        taken = open_[order[:quota]]
        steps_L[taken] = forward
        response.committed += len(taken)
        quota -= len(taken)
        if quota == 0:
            return


def _confidence(backbone: Backbone, batch: Batch, index_R: Tensor, masked_RL: Tensor) -> Tensor:
    """Return the largest log-probability at each masked token, fp32 on CPU; -inf elsewhere. One forward."""
    from dllm_core.kernels.token_stats import stats

    device = batch.input_ids_BL.device
    rows = batch.select(index_R.tolist())
    masked_on_device = masked_RL.to(device)
    noisy_RL = rows.input_ids_BL.masked_fill(masked_on_device, backbone.contract.mask_token_id)
    hidden_RLD = _run(backbone, rows, noisy_RL, causal=False)
    row_M, token_M = masked_on_device.nonzero(as_tuple=True)
    if backbone.contract.alignment == "shifted":
        token_M = token_M - 1
    hidden_MD = gather_rows(hidden_RLD, (row_M, token_M))
    found = stats(hidden_MD, backbone.head_weight_VD, backbone.blocked_V, second=False)
    confidence_RL = torch.full(masked_RL.shape, -torch.inf)
    confidence_RL[masked_RL] = found.top_logprob_M.float().cpu()
    return confidence_RL


@torch.no_grad()
def _scores(backbone: Backbone, batch: Batch, mode: str, noise: NoiseSource) -> Tensor:
    """Return score_BL on CPU, ascending in the order wanted."""
    shape = batch.response_BL.shape
    if mode == "left_to_right":
        return torch.arange(shape[1], dtype=torch.float32).expand(shape)
    if mode == "random":
        return noise.uniform(batch, "commit order", (batch.length,))
    from dllm_core.kernels.token_stats import stats

    hidden_BLD = _run(backbone, batch, batch.input_ids_BL, causal=True)
    row_M, token_M = batch.response_BL.nonzero(as_tuple=True)
    hidden_MD = gather_rows(hidden_BLD, (row_M, token_M - 1))
    found = stats(hidden_MD, backbone.head_weight_VD, backbone.blocked_V, second=False, entropy=True)
    score_BL = torch.zeros(shape)
    assert found.entropy_M is not None
    score_BL[batch.response_BL.cpu()] = found.entropy_M.float().cpu()
    return score_BL


def _run(backbone: Backbone, batch: Batch, input_ids_BL: Tensor, *, causal: bool) -> Tensor:
    document_BL = None if batch.is_plain else batch.document_BL
    return backbone.hidden(input_ids_BL, causal=causal, document_BL=document_BL, position_BL=batch.position_BL)
