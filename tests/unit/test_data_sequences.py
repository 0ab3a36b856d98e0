from __future__ import annotations

import dataclasses
import hashlib
import struct
from pathlib import Path

import pytest
import torch

from dllm_core.data.sequences import SequenceSet, sequence_key
from dllm_core.errors import DataError
from tests.sequences import packed_sequences, random_sequences


def test_batch_holds_the_named_rows_in_order() -> None:
    data = random_sequences(6, 10, 3, 50)
    batch = data.batch([(4, 0), (1, 2), (4, 7)])
    assert batch.sample_ids == (4, 1, 4)
    assert batch.epochs == (0, 2, 7)
    assert batch.input_ids_BL.dtype == torch.int64
    assert batch.input_ids_BL.tolist() == [data.input_ids_NL[i].tolist() for i in (4, 1, 4)]
    assert batch.response_BL[0].tolist() == [False] * 3 + [True] * 7
    assert batch.sequence_keys == (data.keys[4], data.keys[1], data.keys[4])
    assert batch.is_plain
    assert data.batch_of([2]).epochs == (0,)


def test_key_is_the_documented_hash() -> None:
    data = packed_sequences(1, (3, 2), 1, 50)
    parts = [data.input_ids_NL[0].tolist(), [0, 0, 0, 1, 1, -1], [0, 1, 2, 0, 1, 0]]
    raw = struct.pack("<q", 6) + b"".join(struct.pack("<6i", *part) for part in parts)
    assert data.keys[0] == hashlib.sha256(raw).hexdigest()
    assert not data.batch_of([0]).is_plain


def test_same_ids_with_other_boundaries_or_positions_get_another_key() -> None:
    ids = torch.arange(6)
    keys = {
        sequence_key(ids, torch.zeros(6), torch.arange(6)),
        sequence_key(ids, torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])),
        sequence_key(ids, torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2, 3])),
        sequence_key(ids, torch.zeros(6), torch.arange(6) + 1),
        sequence_key(ids[:5], torch.zeros(5), torch.arange(5)),
    }
    assert len(keys) == 5


def test_counts_are_of_response_tokens_only() -> None:
    data = packed_sequences(5, (4, 3), 2, 11)
    expected = [0] * 11
    for ids, response in zip(data.input_ids_NL.tolist(), data.response_NL.tolist(), strict=True):
        for token, scored in zip(ids, response, strict=True):
            expected[token] += scored
    assert data.token_counts.tolist() == expected
    assert data.num_response_tokens == 5 * 5 == sum(expected)
    assert data.mean_response_tokens == 5


@pytest.mark.parametrize("data", [random_sequences(5, 9, 2, 30), packed_sequences(4, (3, 4), 2, 30)])
def test_save_and_load_give_the_same_set(data: SequenceSet, tmp_path: Path) -> None:
    data.save(tmp_path / "set")
    back = SequenceSet.load(tmp_path / "set")
    assert back.fingerprint == data.fingerprint
    assert back.keys == data.keys
    assert back.num_tokens == data.num_tokens
    for name in ("input_ids_NL", "response_NL", "document_NL", "position_NL", "num_bytes_N"):
        assert torch.equal(getattr(back, name), getattr(data, name))


def test_fingerprint_sees_every_field() -> None:
    data = random_sequences(3, 6, 2, 30)
    other_response = data.response_NL.clone()
    other_response[0, 2] = False
    changed = [
        dataclasses.replace(data, input_ids_NL=data.input_ids_NL.roll(1)),
        dataclasses.replace(data, response_NL=other_response),
        dataclasses.replace(data, num_bytes_N=data.num_bytes_N + 1),
        dataclasses.replace(data, num_tokens=31),
        data.head(2),
        dataclasses.replace(data, source_N=torch.tensor([0, 0, 1])),
        dataclasses.replace(data, source_N=torch.tensor([0, 1, 1])),
    ]
    assert len({d.fingerprint for d in [data, *changed]}) == 8


def test_rows_keep_their_document_when_picked_and_stored(tmp_path: Path) -> None:
    data = dataclasses.replace(random_sequences(4, 6, 2, 30), source_N=torch.tensor([5, 5, 2, 7]))
    data.save(tmp_path)
    back = SequenceSet.load(tmp_path)
    assert back.fingerprint == data.fingerprint
    assert back.groups([3, 0, 1]) == (7, 5, 5)
    assert back.select([2, 0]).groups(range(2)) == (2, 5)
    assert random_sequences(4, 6, 2, 30).groups(range(4)) is None


def test_damage_is_detected(tmp_path: Path) -> None:
    data = random_sequences(3, 6, 2, 30)
    data.save(tmp_path)
    file = tmp_path / "sequences.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match="damaged"):
        SequenceSet.load(tmp_path)
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="Cannot read"):
        SequenceSet.load(tmp_path)
    with pytest.raises(DataError, match="Cannot read"):
        SequenceSet.load(tmp_path / "nowhere")


def test_first_tokens_and_padding_cannot_be_response() -> None:
    data = packed_sequences(2, (3, 3), 1, 30)
    for column in (0, 3, 6):
        response_NL = data.response_NL.clone()
        response_NL[1, column] = True
        with pytest.raises(AssertionError, match="first token"):
            dataclasses.replace(data, response_NL=response_NL)
