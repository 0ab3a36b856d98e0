from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dllm_core.data.trajectories import NOT_RESPONSE, TrajectoryStore, ranks_in_block, trajectory_identity
from dllm_core.errors import StoreError
from tests.sequences import packed_sequences, random_sequences


def naive_ranks(commit: list[int], start: int, stop: int) -> list[int]:
    block = list(enumerate(commit))[start:stop]
    scored = sorted((step, position) for position, step in block if step >= 0)
    return [scored.index((step, position)) if step >= 0 else NOT_RESPONSE for position, step in block]


@pytest.mark.parametrize("size", [1, 5, 16, 24, 32])
def test_ranks_equal_a_sort_by_step_then_position(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for length in (32, 75):
        commit_BL = torch.randint(-2, 8, (6, length), generator=generator).clamp_min(-1)
        for start in range(0, length, size):
            batched = ranks_in_block(commit_BL, start, start + size)
            for commit_L, row in zip(commit_BL, batched, strict=True):
                expected = naive_ranks(commit_L.tolist(), start, min(start + size, length))
                assert ranks_in_block(commit_L, start, start + size).tolist() == expected == row.tolist()


def test_reranking_masks_the_last_committed_first() -> None:
    # forwards of 2 tokens each, in blocks of 4; re-ranked in one block of 8 the order is kept and ties go by position
    commit_L = torch.tensor([1, 0, 0, 1, 3, 2, 3, 2])
    assert ranks_in_block(commit_L, 0, 8).tolist() == [2, 0, 1, 3, 6, 4, 7, 5]
    assert ranks_in_block(commit_L, 2, 6).tolist() == [0, 1, 3, 2]
    rank_K = ranks_in_block(commit_L, 0, 8)
    assert (rank_K >= int((1 - 0.5) * 8)).nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert not (rank_K >= int((1 - 0.0) * 8)).any()


def test_roundtrip_and_missing(tmp_path: Path) -> None:
    data = packed_sequences(4, (5, 3), 2, 40)
    store = TrajectoryStore(tmp_path, mode="student", identity="x")
    assert store.missing([*data.keys, data.keys[0]]) == list(data.keys)
    orders = [torch.where(row, torch.arange(10) * (i + 1) % 4, NOT_RESPONSE) for i, row in enumerate(data.response_NL)]
    for i in (0, 2):
        store.write(data.keys[i], orders[i], data.response_NL[i])
    fresh = TrajectoryStore(tmp_path, mode="student", identity="x")
    assert fresh.missing(data.keys) == [data.keys[1], data.keys[3]]
    read = fresh.read([data.keys[2], data.keys[0]], data.response_NL[[2, 0]])
    assert read.dtype == torch.int32
    assert read.tolist() == [orders[2].tolist(), orders[0].tolist()]
    store.write(data.keys[0], orders[2], data.response_NL[0])  # a rewrite is seen, not the copy kept in memory
    assert store.read([data.keys[0]]).tolist() == [orders[2].tolist()]
    size = store.path(data.keys[0]).stat().st_size
    assert size < 1000, "one int per token and a header"


def test_everything_that_does_not_match_is_an_error(tmp_path: Path) -> None:
    data = random_sequences(2, 8, 3, 40)
    key = data.keys[0]
    commit_L = torch.where(data.response_NL[0], 2, NOT_RESPONSE)
    store = TrajectoryStore(tmp_path, mode="student", identity=trajectory_identity(student="a", block=32))
    store.write(key, commit_L, data.response_NL[0])
    with pytest.raises(StoreError, match="no commit order"):
        store.read([data.keys[1]])
    with pytest.raises(StoreError, match="mode 'student', but 'random'"):
        TrajectoryStore(tmp_path, mode="random", identity=store.identity).read([key])
    other = trajectory_identity(student="b", block=32)
    assert other != store.identity
    with pytest.raises(StoreError, match="identity"):
        TrajectoryStore(tmp_path, mode="student", identity=other).read([key])
    with pytest.raises(StoreError, match="identity"):
        TrajectoryStore(tmp_path, mode="student", identity=other).missing([key])
    with pytest.raises(StoreError, match="other response tokens"):
        store.read([key], data.response_NL[:1].roll(-1, 1))
    # a file under another sequence's name
    wrong = store.path(data.keys[1])
    wrong.parent.mkdir(exist_ok=True)
    wrong.write_bytes(store.path(key).read_bytes())
    with pytest.raises(StoreError, match="has key"):
        store.read([data.keys[1]])
    wrong.write_bytes(store.path(key).read_bytes()[:50])
    with pytest.raises(StoreError, match="damaged"):
        store.read([data.keys[1]])


def test_commit_steps_must_cover_the_response(tmp_path: Path) -> None:
    data = random_sequences(1, 8, 3, 40)
    store = TrajectoryStore(tmp_path, mode="student", identity="x")
    with pytest.raises(AssertionError, match="exactly the response"):
        store.write(data.keys[0], torch.zeros(8, dtype=torch.int32), data.response_NL[0])
    assert not list(tmp_path.rglob("*.safetensors"))
