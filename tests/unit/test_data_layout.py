from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dllm_core.data.encoding import Document, bos_of, byte_lengths, encode
from dllm_core.data.layout import cut_windows, pack_documents, pad_pairs
from dllm_core.data.preparation import LayoutSettings, PreparedData, prepare_sequences, take_enough, unigram_nats
from dllm_core.data.records import Record
from dllm_core.errors import DataError
from dllm_core.evals.unigram import unigram_nll
from tests.tiny import NUM_TOKENS, byte_tokenizer, tiny_backbone

WORDS = (
    "fellow",
    "citizens",
    "of",
    "the",
    "senate",
    "state",
    "union",
    "is",
    "strong",
    "was",
    "it",
    "long",
    "in",
    "war",
)
BYTES = torch.ones(1000, dtype=torch.int64)


def text(seed: int, characters: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(characters))[:characters]


def documents(lengths: Sequence[int], start: int = 0) -> list[Document]:
    """Documents whose ids tell where they came from: 100 * document + place."""
    return [Document(f"d{i}", torch.arange(n, dtype=torch.int32) + 100 * i) for i, n in enumerate(lengths, start)]


# -- windows --------------------------------------------------------------------------------------------------------


def test_windows_lie_next_to_each_other_inside_documents() -> None:
    rows = cut_windows(documents([25, 7, 8, 16]), prompt_tokens=3, response_tokens=5, bos_id=None)
    data = rows.sequence_set(BYTES)
    assert [row[0] for row in data.input_ids_NL.tolist()] == [0, 8, 16, 200, 300, 308]
    for row in data.input_ids_NL.tolist():
        assert row == list(range(row[0], row[0] + 8)), "consecutive tokens of one document"
    assert data.response_NL.tolist() == [[False] * 3 + [True] * 5] * 6
    assert data.position_NL.tolist() == [list(range(8))] * 6
    assert data.batch_of(range(6)).is_plain
    assert data.documents == ("d0", "d2", "d3")
    assert data.groups(range(6)) == (0, 0, 0, 1, 2, 2), "names by index, the short document has none"


def test_windows_begin_with_bos_where_there_is_one() -> None:
    rows = cut_windows(documents([15]), prompt_tokens=3, response_tokens=5, bos_id=999)
    data = rows.sequence_set(BYTES)
    assert data.input_ids_NL.tolist() == [[999, *range(7)], [999, *range(7, 14)]]
    assert data.num_response_N.tolist() == [5, 5]


@pytest.mark.parametrize("bos_id", [None, 999])
def test_the_first_token_is_clean_even_with_a_prompt_of_one(bos_id: int | None) -> None:
    data = cut_windows(documents([12]), prompt_tokens=1, response_tokens=4, bos_id=bos_id).sequence_set(BYTES)
    assert not data.response_NL[:, 0].any()
    assert (data.num_response_N == 4).all()


def test_documents_shorter_than_a_window_are_an_error() -> None:
    with pytest.raises(DataError, match=r"the longest has 7 tokens, a window 8 \(data.prompt_tokens 3 \+") as error:
        cut_windows(documents([5, 7]), prompt_tokens=3, response_tokens=5, bos_id=None)
    assert len(str(error.value).splitlines()) == 2


# -- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_packing_keeps_documents_whole_and_apart(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(2, 20) for _ in range(40)]
    data = pack_documents(documents(lengths), length=20, bos_id=None, pad_id=7).sequence_set(BYTES.repeat(100))
    found = {}
    for ids, response, document, position in zip(
        data.input_ids_NL.tolist(),
        data.response_NL.tolist(),
        data.document_NL.tolist(),
        data.position_NL.tolist(),
        strict=True,
    ):
        assert document == sorted(document, key=lambda d: (d < 0, d)), "padding comes last"
        for index in set(document) - {-1}:
            places = [i for i, d in enumerate(document) if d == index]
            assert [position[i] for i in places] == list(range(len(places)))
            assert [response[i] for i in places] == [False] + [True] * (len(places) - 1)
            found[ids[places[0]] // 100] = [ids[i] % 100 for i in places]
        assert all(
            (i, r, p) == (7, False, 0) for i, r, p, d in zip(ids, response, position, document, strict=True) if d == -1
        )
    assert found == {i: list(range(n)) for i, n in enumerate(lengths)}
    least = -(-sum(lengths) // 20)
    assert len(data) <= 11 / 9 * least + 1


def test_long_documents_are_divided_and_single_tokens_dropped() -> None:
    data = pack_documents(documents([21, 1, 10]), length=10, bos_id=None, pad_id=0).sequence_set(BYTES)
    assert sorted(data.input_ids_NL.tolist()) == [list(range(10)), list(range(10, 20)), list(range(200, 210))]
    with pytest.raises(DataError, match="No document has two tokens"):
        pack_documents(documents([1, 0]), length=10, bos_id=None, pad_id=0)


def test_packed_rows_belong_to_the_document_with_most_tokens() -> None:
    data = pack_documents(documents([14, 3, 1, 5]), length=10, bos_id=None, pad_id=0).sequence_set(BYTES)
    assert data.documents == ("d0", "d1", "d3")
    assert data.input_ids_NL[1].tolist() == [300, 301, 302, 303, 304, 10, 11, 12, 13, 0]
    assert [data.documents[i] for i in data.groups(range(3)) or ()] == ["d0", "d3", "d1"]


def test_packed_documents_do_not_see_each_other() -> None:
    """A document's states are the same alone and packed behind another one; no oracle but the model itself."""
    backbone = tiny_backbone("llama")
    lengths = [5, 4, 6]
    parts = [Document(f"d{i}", torch.randint(0, 90, (n,), dtype=torch.int32)) for i, n in enumerate(lengths)]
    data = pack_documents(parts, length=16, bos_id=None, pad_id=0).sequence_set(BYTES)
    assert len(data) == 1
    batch = data.batch_of([0])
    for causal in (True, False):
        with torch.no_grad():
            packed = backbone.hidden(
                batch.input_ids_BL, causal=causal, document_BL=batch.document_BL, position_BL=batch.position_BL
            )
            for index in range(3):
                where = (batch.document_BL[0] == index).nonzero().flatten()
                alone = backbone.hidden(batch.input_ids_BL[:, where], causal=causal)
                torch.testing.assert_close(packed[:, where], alone, atol=1e-5, rtol=1e-5)


# -- prompt and response --------------------------------------------------------------------------------------------


def pair(prompt: int, response: int) -> Document:
    return Document("p", torch.arange(1, 1 + prompt + response, dtype=torch.int32), prompt)


@pytest.mark.parametrize(
    ("prompt", "response", "bos_id", "ids", "scored"),
    [
        (3, 2, None, [1, 2, 3, 4, 5, 0, 0, 0], [3, 4]),
        (9, 2, None, [4, 5, 6, 7, 8, 9, 10, 11], [6, 7]),  # a long prompt takes what the response leaves
        (9, 9, None, [6, 7, 8, 9, 10, 11, 12, 13], [4, 5, 6, 7]),
        (2, 9, None, [1, 2, 3, 4, 5, 6, 0, 0], [2, 3, 4, 5]),
        (0, 3, None, [1, 2, 3, 0, 0, 0, 0, 0], [1, 2]),  # no prompt, no BOS: the first token stays clean
        (0, 3, 99, [99, 1, 2, 3, 0, 0, 0, 0], [1, 2, 3]),
        (9, 2, 99, [99, 5, 6, 7, 8, 9, 10, 11], [6, 7]),
    ],
)
def test_pairs(prompt: int, response: int, bos_id: int | None, ids: list[int], scored: list[int]) -> None:
    rows = pad_pairs([pair(prompt, response)], prompt_tokens=4, response_tokens=4, bos_id=bos_id, pad_id=0)
    data = rows.sequence_set(BYTES)
    assert data.input_ids_NL[0].tolist() == ids
    assert data.response_NL[0].nonzero().flatten().tolist() == scored
    assert data.document_NL[0].tolist() == [0 if i else -1 for i in ids]
    assert rows.num_truncated == (sum(i not in (0, 99) for i in ids) < prompt + response)


def test_pairs_without_a_response_are_dropped() -> None:
    rows = pad_pairs([pair(3, 0), pair(3, 1)], prompt_tokens=4, response_tokens=4, bos_id=None, pad_id=0)
    assert len(rows.ids) == 1
    with pytest.raises(DataError, match="Every response is empty"):
        pad_pairs([pair(3, 0)], prompt_tokens=4, response_tokens=4, bos_id=None, pad_id=0)


# -- tokens ---------------------------------------------------------------------------------------------------------


def sentencepiece_like() -> Any:
    """A tokenizer with word marks, byte pieces and a BOS of its own, as Llama 2 has."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=None))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_like])
def test_bytes_add_up(make: Any) -> None:
    tokenizer = make()
    lengths_V = byte_lengths(tokenizer, len(tokenizer))
    content = text(0, 300) + ("" if make is byte_tokenizer else " naïve — 國情咨文 🎉")
    (document,) = encode([Record("a", text=content)], tokenizer)
    assert int(lengths_V[document.ids_T.long()].sum()) == len(content.encode())
    assert lengths_V[tokenizer.eos_token_id] == 0
    # windows share the bytes of their document out among them, a divided character included
    stride = 4
    data = cut_windows([document], prompt_tokens=1, response_tokens=3, bos_id=None).sequence_set(lengths_V)
    whole = document.ids_T[: len(data) * stride]
    prompts = data.input_ids_NL[:, 0].long()
    assert int(data.num_bytes_N.sum() + lengths_V[prompts].sum()) == int(lengths_V[whole.long()].sum())


def test_bos_is_found_only_where_the_tokenizer_adds_it() -> None:
    assert bos_of(byte_tokenizer()) is None
    assert bos_of(sentencepiece_like()) == 0


def decoded(document: Document, tokenizer: Any) -> tuple[str, str]:
    ids = document.ids_T.tolist()
    return tokenizer.decode(ids[: document.response_start]), tokenizer.decode(ids[document.response_start :])


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("How many?", "7 pens.", ("How many?\n", "7 pens.<|end|>")),
        ("Q: ", "7", ("Q: ", "7<|end|>")),
        ("Q:", " 7", ("Q:", " 7<|end|>")),
        ("", "7", ("", "7<|end|>")),
    ],
)
def test_prompt_and_response_are_joined_and_closed(prompt: str, response: str, expected: tuple[str, str]) -> None:
    tokenizer = byte_tokenizer()
    (document,) = encode([Record("a", prompt=prompt, response=response)], tokenizer)
    assert decoded(document, tokenizer) == expected


MESSAGES = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why"},
    {"role": "assistant", "content": "So."},
)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_conversations_use_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (document,) = encode([Record("a", messages=MESSAGES)], tokenizer)
    before = "[user]Hi<|end|>\n[assistant]Yes?<|end|>\n[user]Why<|end|>\n[assistant]"
    assert decoded(document, tokenizer) == (before, "So.<|end|>")
    assert document.ids_T[-1] == tokenizer.eos_token_id
    assert document.ids_T.tolist().count(tokenizer.eos_token_id) == 4, "template markers are special tokens, not text"


def test_a_template_that_rewrites_the_past_still_gives_the_answer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}:{{ messages[-1].content }}"
    (document,) = encode([Record("a", messages=MESSAGES)], tokenizer)
    assert decoded(document, tokenizer)[1] == "So.<|end|>"


def test_conversations_without_a_template_are_written_plainly() -> None:
    tokenizer = byte_tokenizer()
    (document,) = encode([Record("a", messages=MESSAGES)], tokenizer)
    expected = "user: Hi\n\nassistant: Yes?\n\nuser: Why\n\nassistant: "
    assert decoded(document, tokenizer) == (expected, "So.<|end|>")


# -- all of it ------------------------------------------------------------------------------------------------------

PROSE = [Record(f"d{i}", text=text(i, 90 + 13 * i)) for i in range(20)]


def prepare(records: list[Record] = PROSE, **settings: Any) -> PreparedData:
    defaults = {"prompt_tokens": 8, "response_tokens": 16, "heldout_sequences": 6, "heldout_fraction": 0.2}
    return prepare_sequences(
        records, byte_tokenizer(), LayoutSettings(**{**defaults, **settings}), num_tokens=NUM_TOKENS
    )


def test_no_heldout_document_is_trained_on() -> None:
    prepared = prepare()
    tokenizer = byte_tokenizer()
    train, heldout = set(prepared.train.documents), set(prepared.heldout.documents)
    assert not train & heldout
    assert len(heldout) == 4
    by_name = {r.document_id: r.text for r in PROSE}
    for data, names in ((prepared.train, train), (prepared.heldout, heldout)):
        for row in data.input_ids_NL.tolist():
            assert any(tokenizer.decode(row) in by_name[name] for name in names), "a window lies inside one document"
    assert (prepared.num_documents, prepared.num_tokens) == (20, sum(len(r.text) for r in PROSE))


def test_caps_draw_from_all_documents_and_nest() -> None:
    everything = prepare(heldout_sequences=1000)
    few = prepare(train_sequences=12, heldout_sequences=5)
    assert (len(few.train), len(few.heldout)) == (12, 5)
    assert few.train_available == len(everything.train) > 100
    assert few.heldout.keys == everything.heldout.keys[:5]
    assert set(few.train.keys) < set(everything.train.keys)
    names = {
        next(r.document_id for r in PROSE if byte_tokenizer().decode(w) in r.text)
        for w in few.train.input_ids_NL.tolist()
    }
    assert len(names) > 5


def test_the_floor_counts_all_training_text_whatever_the_cap() -> None:
    few, everything = prepare(train_sequences=3), prepare()
    assert torch.equal(few.train.token_counts, everything.train.token_counts)
    assert int(few.train.token_counts.sum()) == 16 * everything.train_available
    batch = few.heldout.batch_of(range(len(few.heldout)))
    expected = unigram_nll(batch, few.train.token_counts, NUM_TOKENS).per_token().value
    assert unigram_nats(few.train.token_counts, few.heldout.token_counts) == pytest.approx(expected, rel=1e-12)


def test_unigram_floor_in_closed_form() -> None:
    # counts 3, 1, 0: probabilities 4/7, 2/7, 1/7
    value = unigram_nats(torch.tensor([3, 1, 0]), torch.tensor([1, 0, 1]))
    assert value == pytest.approx(float(torch.tensor([7 / 4, 7.0], dtype=torch.float64).log().mean()))


def test_same_settings_same_sets() -> None:
    assert prepare().train.fingerprint == prepare().train.fingerprint
    assert prepare(split_seed=1).train.fingerprint != prepare().train.fingerprint
    assert prepare().train.fingerprint == prepare(heldout_sequences=3).train.fingerprint


def test_arithmetic_pairs() -> None:
    def joined(record: Record) -> str:
        return record.prompt + ("" if record.prompt.endswith(" ") else "\n")

    pairs = [Record(f"q{i}", prompt=text(i, 10 + i), response=f"{i}+{i} = {2 * i}") for i in range(30)]
    prepared = prepare(pairs, prompt_tokens=16, response_tokens=16)
    assert prepared.kind == "prompt+response"
    assert (len(prepared.train), len(prepared.heldout)) == (24, 6)
    tokenizer = byte_tokenizer()
    by_answer = {r.response: r for r in pairs}
    for data in (prepared.train, prepared.heldout):
        for ids, response, num_bytes in zip(data.input_ids_NL, data.response_NL, data.num_bytes_N, strict=True):
            answer = tokenizer.decode(ids[response].tolist())
            record = by_answer[answer.removesuffix("<|end|>")]
            assert int(num_bytes) == len(record.response), "the end token is no text"
            start = int(response.int().argmax())
            assert joined(record).endswith(tokenizer.decode(ids[:start].tolist()))
    assert prepared.num_truncated == sum(len(joined(r) + r.response) + 1 > 32 for r in pairs) > 0


def test_packed_text_is_closed() -> None:
    prepared = prepare(layout="pack", sequence_length=400)
    ends = (prepared.train.input_ids_NL == 0) & prepared.train.response_NL
    assert int(ends.sum()) == 16
    assert prepared.train.length == 400


def test_what_cannot_be_prepared() -> None:
    with pytest.raises(DataError, match=r"mixes prompt\+response \(q\) and text \(d0\)"):
        prepare([*PROSE, Record("q", prompt="p", response="r")])
    with pytest.raises(DataError, match="gives id 96, but the model has 90"):
        prepare_sequences(
            [Record(f"d{i}", text="~" * 60) for i in range(2)] + PROSE,
            byte_tokenizer(),
            LayoutSettings(prompt_tokens=8, response_tokens=16),
            num_tokens=90,
        )
    short = [Record(f"d{i}", text=text(i, 10)) for i in range(5)]
    with pytest.raises(DataError, match="the longest has 10 tokens, a window 24"):
        prepare(short)


def test_a_stream_is_read_as_far_as_the_caps_need() -> None:
    def endless() -> Any:
        index = 0
        while True:
            yield Record(f"d{index}", text=text(index, 400))
            index += 1

    settings = LayoutSettings(
        prompt_tokens=8, response_tokens=16, train_sequences=20, heldout_sequences=4, heldout_fraction=0.25
    )
    taken = take_enough(endless(), settings)
    prepared = prepare_sequences(taken, byte_tokenizer(), settings, num_tokens=NUM_TOKENS)
    assert (len(prepared.train), len(prepared.heldout)) == (20, 4)
    assert len(taken) < 30
    finite = [Record(f"d{i}", text="x") for i in range(7)]
    assert take_enough(iter(finite), LayoutSettings()) == finite
