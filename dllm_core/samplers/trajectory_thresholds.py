"""Thresholds by place in a block, from a trained denoiser's commit orders. B batch, L length, K block size.

thresholds = stored_thresholds("runs/cache/trajectories/ENTRY", block_size=16)
config = DiffusionGenerationConfig(sampler_config=ThresholdSamplerConfig(threshold=thresholds), block_size=16)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dllm_core.errors import DllmError


def mean_ranks(commit_step_BL: Tensor | Sequence[Tensor], block_size: int) -> Tensor:
    """Return, for each place of a block, when it is committed on average: 0 is first, 1 last; float64 [K].

    Args:
        commit_step_BL: integer; the forward that committed a response token, negative elsewhere (what
            `TrajectoryStore.read` returns); or rows of any lengths.
        block_size: K; blocks are counted over the response tokens of a row, and only full ones are looked at.

    Raises:
        DllmError: no response is as long as a block.
    """
    ranks = []
    for commit_step_L in commit_step_BL:
        steps_R = commit_step_L[commit_step_L >= 0]
        blocks_NK = steps_R[: len(steps_R) // block_size * block_size].view(-1, block_size)
        ranks.append(blocks_NK.argsort(dim=1, stable=True).argsort(dim=1))
    ranks_NK = torch.cat(ranks)
    if not len(ranks_NK):
        raise DllmError(
            f"No commit order holds a full block of {block_size} response tokens.", "Give a smaller block size."
        )
    return ranks_NK.double().mean(0) / max(1, block_size - 1)


def trajectory_thresholds(
    commit_step_BL: Tensor | Sequence[Tensor], block_size: int, lowest: float = 0.7, highest: float = 0.95
) -> tuple[float, ...]:
    """Return one threshold per place of a block, for `ThresholdSamplerConfig(threshold=...)`.

    A place that the teacher commits early is trusted early, one that it leaves for last has to be surer: thresholds are
    linear in `mean_ranks`, from `lowest` for a place that is always first to `highest` for one that is always last. A
    heuristic (what it gains is not measured).

    Args:
        commit_step_BL: as for `mean_ranks`.
        block_size: K.
        lowest: in (0, 1].
        highest: in [lowest, 1].

    Raises:
        DllmError: no response is as long as a block, or limits that are none.
    """
    if not 0 < lowest <= highest <= 1:
        raise DllmError(f"lowest={lowest!r} and highest={highest!r} are no limits.", "Give 0 < lowest <= highest <= 1.")
    rank_K = mean_ranks(commit_step_BL, block_size)
    return tuple((lowest + (highest - lowest) * rank_K).tolist())


def stored_thresholds(
    directory: Path | str, block_size: int, lowest: float = 0.7, highest: float = 0.95
) -> tuple[float, ...]:
    """Return `trajectory_thresholds` of all orders that lie below a directory, such as those a run extracted.

    Raises:
        DllmError: no order is there, none is as long as a block, or limits that are none.
    """
    from dllm_core.data.trajectories import TrajectoryStore

    store = TrajectoryStore.found(Path(directory))
    return trajectory_thresholds([store.read([key])[0] for key in store.stored_keys()], block_size, lowest, highest)
