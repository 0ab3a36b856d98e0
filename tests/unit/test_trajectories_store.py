from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dllm_core.data.trajectories import NOT_RESPONSE, TrajectoryStore, trajectory_identity
from dllm_core.errors import StoreError
from tests.sequences import packed_sequences, random_sequences


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


def test_a_store_is_found_by_its_directory_alone(tmp_path: Path) -> None:
    data = packed_sequences(3, (5, 3), 2, 40)
    with pytest.raises(StoreError, match="no commit orders in"):
        TrajectoryStore.found(tmp_path)
    for entry in ("a", "b"):
        store = TrajectoryStore(tmp_path / entry / "payload", mode="student", identity=entry)
        for key, response_L in zip(data.keys, data.response_NL, strict=True):
            store.write(key, torch.where(response_L, 1, NOT_RESPONSE), response_L)
    with pytest.raises(StoreError, match="of 2 extractions"):
        TrajectoryStore.found(tmp_path)
    found = TrajectoryStore.found(tmp_path / "b")
    assert (found.root, found.mode, found.identity) == (store.root, "student", "b")
    assert found.stored_keys() == sorted(data.keys)
    assert torch.equal(found.read(data.keys), store.read(data.keys))


def test_commit_steps_must_cover_the_response(tmp_path: Path) -> None:
    data = random_sequences(1, 8, 3, 40)
    store = TrajectoryStore(tmp_path, mode="student", identity="x")
    with pytest.raises(AssertionError, match="exactly the response"):
        store.write(data.keys[0], torch.zeros(8, dtype=torch.int32), data.response_NL[0])
    assert not list(tmp_path.rglob("*.safetensors"))
