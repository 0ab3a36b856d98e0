from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_core.data import anchor_files
from dllm_core.data.anchor_codec import STORED_DTYPE, standardised_error
from dllm_core.data.anchor_extraction import extract
from dllm_core.data.anchors import AnchorStore, needed_rows
from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DllmError, ResourceError, StoreError
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import tiny_backbone

KEYS = ["aa" + "0" * 62, "ab" + "1" * 62]


def states(seed: int, layers: tuple[str, ...] = ("1", "final"), length: int = 10, width: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(length, width, generator=generator) * 10 for layer in layers}


def live(backbone: torch.nn.Module, batch: Batch, layer: str) -> Tensor:
    """An oracle of its own: transformers' hidden_states, one document at a time, without any mask."""
    found = torch.full((*batch.input_ids_BL.shape, backbone.config.hidden_size), torch.nan)
    for b, (ids, documents) in enumerate(zip(batch.input_ids_BL, batch.document_BL, strict=True)):
        for d in documents.unique():
            if d < 0:
                continue
            where = (documents == d).nonzero().flatten()
            with torch.no_grad():
                out = backbone.model.model(
                    inputs_embeds=backbone.embedding_weight_VD[ids[where]][None], output_hidden_states=True
                )
            index = {"embed": 0, "final": -1}.get(layer) if not layer.isdecimal() else int(layer)
            found[b, where] = out.hidden_states[index][0]
    return found


# -- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "int8"])
def test_read_gives_what_was_written_within_the_precision(dtype: str, tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher", dtype)
    written = [states(i) for i in range(2)]
    for key, of_key in zip(KEYS, written, strict=True):
        store.write(key, of_key)
    read = AnchorStore(tmp_path, "teacher", dtype).read(KEYS, ["1", "final"])
    assert read["1"].shape == (2, 10, 6)
    assert read["1"].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    for layer in ("1", "final"):
        expected = torch.stack([w[layer] for w in written])
        largest = expected.abs().amax(dim=-1, keepdim=True)
        # half a unit in the last place: exact, 8 bits of mantissa, 4 bits, or 1/127 of the row's largest
        allowed = {
            "fp32": 0.0 * expected,
            "bf16": expected.abs() * 2.0**-8,
            "fp8": torch.maximum(expected.abs() * 2.0**-4, largest / 448 * 2.0**-10),
            "int8": largest / 127 * 0.501,
        }[dtype]
        assert ((read[layer].float() - expected).abs() <= allowed + 1e-7 * largest * (dtype != "fp32")).all()
    if dtype in ("fp8", "int8"):
        cosine = torch.cosine_similarity(read["1"], torch.stack([w["1"] for w in written]), dim=-1)
        assert (1 - cosine).max() < 2e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "int8"])
def test_gather_equals_indexing_what_read_gives(dtype: str, tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher", dtype)
    store.write(KEYS[0], states(0), ((1, 4), (6, 9)))
    store.write(KEYS[1], states(1), ((0, 10),))
    rows = [torch.tensor([8, 1, 1, 6]), torch.tensor([], dtype=torch.long), torch.tensor([0, 9])]
    keys = [KEYS[0], KEYS[0], KEYS[1]]
    gathered = store.gather(keys, ["final", "1"], rows)
    for layer in ("1", "final"):
        full = store.read(keys, [layer])[layer]
        expected = torch.cat([full[i, index] for i, index in enumerate(rows)])
        assert torch.equal(gathered[layer], expected)
        assert not expected.isnan().any()


def test_rows_that_are_not_stored_cannot_pass_for_states(tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher")
    store.write(KEYS[0], states(0), ((2, 5),))
    full = store.read(KEYS[:1], ["1"])["1"][0]
    assert full.isnan().all(dim=-1).tolist() == [True] * 2 + [False] * 3 + [True] * 5
    for absent in (1, 5):
        with pytest.raises(StoreError, match=rf"rows 2\.\.4, but row {absent} is read"):
            store.gather(KEYS[:1], ["1"], [torch.tensor([3, absent])])


def test_missing_names_what_has_to_be_computed(tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher")
    assert store.missing(KEYS, ["1"]) == KEYS
    store.write(KEYS[0], states(0), ((2, 8),))
    assert store.missing(KEYS, ["1"]) == KEYS[1:]
    assert store.missing(KEYS[:1], ["1", "final"], {KEYS[0]: ((3, 7),)}) == []
    assert store.missing(KEYS[:1], ["1"], {KEYS[0]: ((3, 9),)}) == KEYS[:1]
    assert store.missing(KEYS[:1], ["1", "2"]) == KEYS[:1]


def test_layers_are_added_to_an_existing_chunk(tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher", "int8")
    store.write(KEYS[0], states(0), ((2, 8),), seconds=2.0)
    before = store.read(KEYS[:1], ["1", "final"])
    store.write(KEYS[0], states(5, ("2",)), ((3, 7),), seconds=1.5)
    after = store.read(KEYS[:1], ["1", "2", "final"])
    for layer in before:
        assert torch.equal(before[layer].nan_to_num(-1e9), after[layer].nan_to_num(-1e9))
    assert torch.allclose(after["2"][0, 2:8], states(5, ("2",))["2"][2:8], atol=0.2)
    assert store.files.header(KEYS[0]).rows == ((2, 8),)
    # one forward gives every layer, so two of them do not add up
    assert store.files.seconds(KEYS) == 2.0


def test_a_chunk_grows_by_rows(tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher", "fp32")
    store.write(KEYS[0], states(0), ((2, 4),))
    store.write(KEYS[0], states(0, ("1",)), ((3, 6), (8, 9)))
    header = store.files.header(KEYS[0])
    assert header.rows == ((2, 6), (8, 9))
    assert header.layers == ("1",), "rows of 'final' at 4..8 were not given: keeping it would be wrong"
    assert torch.equal(store.gather(KEYS[:1], ["1"], [torch.tensor([5, 2, 8])])["1"], states(0)["1"][[5, 2, 8]])


def test_other_teacher_attention_precision_or_sequence_is_an_error(tmp_path: Path) -> None:
    AnchorStore(tmp_path, "teacher").write(KEYS[0], states(0))
    for other, name in (
        (AnchorStore(tmp_path, "another"), "teacher 'teacher', but 'another'"),
        (AnchorStore(tmp_path, "teacher", "fp32"), "dtype 'bf16', but 'fp32'"),
        (AnchorStore(tmp_path, "teacher", attention="bidirectional"), "attention 'causal', but 'bidirectional'"),
    ):
        for use in (
            lambda s: s.read(KEYS[:1], ["1"]),
            lambda s: s.missing(KEYS[:1], ["1"]),
            lambda s: s.write(KEYS[0], states(0)),
        ):
            with pytest.raises(StoreError, match=name):
                use(other)
    store = AnchorStore(tmp_path, "teacher")
    target = store.files.path(KEYS[1])
    target.parent.mkdir()
    target.write_bytes(store.files.path(KEYS[0]).read_bytes())
    with pytest.raises(StoreError, match="have key"):
        store.read(KEYS[1:], ["1"])


@pytest.mark.parametrize("damage", ["cut", "header", "bit", "empty", "format"])
def test_damage_is_detected_and_rebuilt(damage: str, tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher")
    store.write(KEYS[0], states(0))
    store.write(KEYS[1], states(1))
    path = store.files.path(KEYS[0])
    good = path.read_bytes()
    path.write_bytes(
        {
            "cut": good[:-3],
            "header": b"\xff" * 40 + good[40:],
            "bit": good[:-5] + bytes([good[-5] ^ 4]) + good[-4:],
            "empty": b"",
            "format": good.replace(b'format_version\\": 1', b'format_version\\": 0'),
        }[damage]
    )
    fresh = AnchorStore(tmp_path, "teacher")
    assert fresh.missing(KEYS, ["1"]) == ([] if damage == "bit" else KEYS[:1])
    with pytest.raises(StoreError, match="damaged"):
        fresh.gather(KEYS[:1], ["1", "final"], [torch.arange(10)])
    assert fresh.missing(KEYS, ["1"]) == KEYS[:1], "a damaged chunk is taken out, so that the next run computes it"
    fresh.write(KEYS[0], states(0))
    assert path.read_bytes() == good


def test_adding_a_layer_to_a_chunk_with_a_flipped_bit_does_not_bless_it(tmp_path: Path) -> None:
    store = AnchorStore(tmp_path, "teacher")
    store.write(KEYS[0], states(0))
    path = store.files.path(KEYS[0])
    good = path.read_bytes()
    path.write_bytes(good[:-5] + bytes([good[-5] ^ 4]) + good[-4:])
    fresh = AnchorStore(tmp_path, "teacher")
    fresh.write(KEYS[0], states(3, ("2",)))
    assert fresh.files.header(KEYS[0]).layers == ("2",)
    assert fresh.missing(KEYS[:1], ["1"]) == KEYS[:1]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnchorStore(tmp_path, "teacher")
    store.write(KEYS[0], states(0))
    good = store.files.path(KEYS[0]).read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    for key in KEYS:
        with pytest.raises(KeyboardInterrupt):
            store.write(key, states(3))
    assert store.files.path(KEYS[0]).read_bytes() == good
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock", f"{KEYS[0]}.safetensors"]


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_estimate_matches_the_files_and_the_published_example(tmp_path: Path) -> None:
    layers = [str(k) for k in range(1, 64)] + ["final"]
    assert AnchorStore.estimate(100_000, 1024, 5120, layers) == pytest.approx(67e12, rel=0.01)
    for dtype in STORED_DTYPE:
        store = AnchorStore(tmp_path / dtype, "t" * 64, dtype)
        for i, key in enumerate(KEYS):
            store.write(key, states(i, ("embed", "1", "2", "final"), length=200, width=64))
        size = sum(p.stat().st_size for p in (tmp_path / dtype).rglob("*.safetensors"))
        assert AnchorStore.estimate(2, 200, 64, ["embed", "1", "2", "final"], dtype) == pytest.approx(size, rel=0.02)


def test_too_little_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_files, "free_bytes", lambda _: 5_000_000_000)
    anchor_files.require_disk(tmp_path / "not" / "there", 3_000_000_000)
    with pytest.raises(ResourceError, match=r"need 67\.1 TB and 1\.1 GB that stay free, .* has 5\.0 GB free") as caught:
        anchor_files.require_disk(tmp_path, AnchorStore.estimate(100_000, 1024, 5120, ["1"] * 64))
    assert len(str(caught.value).splitlines()) == 2
    monkeypatch.undo()
    assert anchor_files.free_bytes(tmp_path / "not" / "there") > 0


def test_eight_bits_do_not_serve_reconstruction() -> None:
    for dtype in ("fp8", "int8"):
        anchor_files.require_dtype_serves(dtype, "response_predictors")
        with pytest.raises(StoreError, match=f"{dtype} keep a state's direction only"):
            anchor_files.require_dtype_serves(dtype, "all")
    for dtype in ("bf16", "fp32"):
        anchor_files.require_dtype_serves(dtype, "all")


def test_ranges() -> None:
    assert anchor_files.normalise_ranges([(5, 7), (0, 2), (2, 3), (6, 9), (4, 4)]) == ((0, 3), (5, 9))
    assert anchor_files.covers(((0, 3), (5, 9)), ((1, 3), (5, 6)))
    assert not anchor_files.covers(((0, 3), (5, 9)), ((2, 6),))
    assert anchor_files.num_rows(((0, 3), (5, 9))) == 7


def test_asking_imports_no_torch() -> None:
    code = "import sys, dllm_core.data.anchor_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- extraction -----------------------------------------------------------------------------------------------------


def batches(data: SequenceSet, size: int) -> list[Batch]:
    return [data.batch_of(range(i, min(i + size, len(data)))) for i in range(0, len(data), size)]


PACKED = packed_sequences(5, (7, 4, 1), 3, 90, seed=1)
PLAIN = random_sequences(5, 15, 4, 90, seed=2)


@pytest.mark.parametrize("data", [PLAIN, PACKED], ids=["plain", "packed"])
def test_cached_states_equal_live_ones(data: SequenceSet, tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    layers = ["embed", *(str(k) for k in range(1, backbone.num_layers)), "final"]
    store = AnchorStore(tmp_path, "t", "fp32")
    done = extract(backbone, batches(data, 2), store, layers)
    assert (done.num_computed, done.num_found) == (5, 0)
    assert done.flops > 0
    batch = data.batch_of(range(5))
    real_BL = batch.document_BL >= 0
    read = store.read(data.keys, layers)
    for layer in layers:
        expected = live(backbone, batch, layer)
        assert read[layer].isnan().all(dim=-1).equal(~real_BL), "padding is not kept"
        torch.testing.assert_close(read[layer][real_BL], expected[real_BL], atol=2e-5, rtol=1e-5)


def test_bf16_error_is_small_in_every_standardised_dimension(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    data = random_sequences(16, 15, 4, 90)
    store = AnchorStore(tmp_path, "t", "bf16")
    extract(backbone, batches(data, 8), store, ["1", "final"])
    batch = data.batch_of(range(16))
    inner_BL = batch.position_BL > 0
    for layer in ("1", "final"):
        cached = store.read(data.keys, [layer])[layer][inner_BL]
        exact = live(backbone, batch, layer)[inner_BL]
        assert standardised_error(cached, exact).max() < 2.0**-8
        # the measure does see an error that a few large dimensions would hide
        large = exact.clone()
        large[:, 0] += 1e4
        assert standardised_error(large.bfloat16(), large)[0] > 1
        assert (large.bfloat16().float() - large).norm() / large.norm() < 2.0**-8


@pytest.mark.parametrize("data", [PLAIN, PACKED], ids=["plain", "packed"])
def test_response_predictors_are_the_rows_before_response_tokens(data: SequenceSet, tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    batch = data.batch_of(range(5))
    rows = needed_rows(batch, "response_predictors")
    expected = [i for i in range(14) if bool(batch.response_BL[0, i + 1])]
    assert [i for a, b in rows[data.keys[0]] for i in range(a, b)] == expected
    part = AnchorStore(tmp_path / "part", "t", "fp32")
    extract(backbone, [batch], part, ["1"], positions="response_predictors")
    index = [(row_L.roll(-1) & (torch.arange(15) < 14)).nonzero().flatten() for row_L in batch.response_BL]
    full = live(backbone, batch, "1")
    expected_MD = torch.cat([full[b, i] for b, i in enumerate(index)])
    torch.testing.assert_close(part.gather(data.keys, ["1"], index)["1"], expected_MD, atol=2e-5, rtol=1e-5)


def test_a_second_extraction_computes_only_what_is_missing(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    store = AnchorStore(tmp_path, "t", "fp32")
    seen: list[tuple[int, int]] = []
    extract(backbone, batches(PLAIN.head(2), 2), store, ["1"])
    inodes = {p: p.stat().st_ino for p in tmp_path.rglob("*.safetensors")}
    done = extract(backbone, batches(PLAIN, 2), store, ["1"], lambda *counts: seen.append(counts))
    assert (done.num_computed, done.num_found) == (3, 2)
    assert seen == [(0, 2), (2, 2), (3, 2)]
    assert all(p.stat().st_ino == inode for p, inode in inodes.items())
    again = extract(backbone, batches(PLAIN, 2), store, ["1"])
    assert (again.num_computed, again.flops, again.seconds) == (0, 0.0, 0.0)
    assert extract(backbone, batches(PLAIN, 2), store, ["1", "final"]).num_computed == 5
    assert extract(backbone, batches(PLAIN, 2), store, ["1"], overwrite=True).num_computed == 5


def test_growing_by_rows_keeps_layers_that_others_read(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    store = AnchorStore(tmp_path, "t", "fp32")
    extract(backbone, [PLAIN.batch_of(range(5))], store, ["1", "final"], positions="response_predictors")
    extract(backbone, [PLAIN.batch_of(range(5))], store, ["embed"], positions="all")
    full = needed_rows(PLAIN.batch_of(range(5)), "all")
    assert store.missing(PLAIN.keys, ["embed", "1", "final"], full) == []
    expected = live(backbone, PLAIN.batch_of(range(5)), "final")
    torch.testing.assert_close(store.read(PLAIN.keys, ["final"])["final"], expected, atol=2e-5, rtol=1e-5)


def test_the_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama").train()
    before = [p.clone() for p in backbone.parameters()]
    extract(backbone, [PLAIN.batch_of([0])], AnchorStore(tmp_path, "t"), ["1"])
    assert backbone.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(backbone.parameters(), before, strict=True))
    with pytest.raises(DllmError, match="Unknown layer '99'"):
        extract(backbone, [PLAIN.batch_of([0])], AnchorStore(tmp_path, "t"), ["99"])
    assert backbone.training
