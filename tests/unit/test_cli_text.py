"""Text on a terminal: widths, line breaks, stretches of tokens, gaps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm_core.cli.canvas_view import canvas_spans
from dllm_core.cli.detokenizer import Detokenizer
from dllm_core.cli.gaps import encode, split
from dllm_core.cli.settings import in_flags
from dllm_core.cli.spans import Span, Style, beside, paint, shown, width, wrap
from dllm_core.errors import DllmError

TEXT = "Ärger, 中文 und 👍🏽 – fin."


def byte_level() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, so that characters lie in several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words whose decoder drops the space before the first word, as SentencePiece's do."""
    words = ["a", "union", "the", "strong", "▁a", "▁union", "▁the", "▁strong"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_joined_are_the_text_wherever_it_is_cut() -> None:
    tokenizer = byte_level()
    ids, detokenizer = tokenizer(TEXT).input_ids, Detokenizer(tokenizer)
    assert len(ids) > len(TEXT), "characters of several tokens"
    for seed in range(50):
        cuts = sorted(random.Random(seed).sample(range(len(ids) + 1), 6))
        pieces = detokenizer.pieces(ids, cuts)
        assert len(pieces) == 7
        assert "".join(pieces) == TEXT
    assert detokenizer.pieces([*ids, 0], [len(ids)]) == [TEXT, ""], "special tokens are left out"


def test_a_stretch_keeps_the_space_that_it_begins_with() -> None:
    tokenizer = metaspace()
    ids = tokenizer("the union the strong", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[1:]) == "union the strong", "the decoder alone drops it"
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.text(ids[1:]) == " union the strong"
    assert detokenizer.pieces(ids[1:], [1, 2]) == [" union", " the", " strong"]


def test_a_canvas_is_its_tokens_with_open_places_between_them() -> None:
    tokenizer = byte_level()
    ids = tokenizer("so strong", add_special_tokens=False).input_ids
    kinds = [Style.PLAIN] * 2 + [Style.OPEN] * 2 + [Style.FRESH, Style.WRITTEN, Style.WRITTEN, Style.OPEN, Style.FRESH]
    spans = list(canvas_spans(ids, kinds, Detokenizer(tokenizer), "#"))
    assert spans == [
        Span("so", Style.PLAIN),
        Span("##", Style.OPEN),
        Span("t", Style.FRESH),
        Span("ro", Style.WRITTEN),
        Span("#", Style.OPEN),
        Span("g", Style.FRESH),
    ]


def test_widths() -> None:
    assert width("abc") == 3
    assert width("中文") == 4
    assert width("e\u0301") == 1
    assert width("") == 0


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abcé中 \n", max_size=120), st.integers(5, 40), st.integers(0, 120))
def test_lines_are_narrow_enough_and_joined_they_are_the_text(text: str, columns: int, cut: int) -> None:
    lines = wrap([Span(text[:cut], Style.PLAIN), Span(text[cut:], Style.WRITTEN)], columns)
    plain = [paint(line, colour=False) for line in lines]
    assert "".join(plain) == text.replace("\n", "")
    assert all(width(line) <= columns for line in plain)
    assert len(lines) >= text.count("\n") + 1
    styles = [span.style for line in lines for span in line for _ in span.text]
    given_styles = [Style.PLAIN if i < cut else Style.WRITTEN for i, c in enumerate(text) if c != "\n"]
    assert styles == given_styles


def test_words_are_not_cut_where_there_is_a_space_to_break_at() -> None:
    lines = wrap([Span("one two threefour fiveandsix")], 11)
    assert [paint(line, colour=False) for line in lines] == ["one two ", "threefour ", "fiveandsix"]


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    assert shown("a\x1b[2Jb\rc\td\x07") == "a\ufffd[2Jb\ufffdc    d\ufffd"


def test_blocks_beside_each_other_are_filled_up() -> None:
    left, right = [[Span("ab")], [Span("c")]], [[Span("中")]]
    lines = [paint(line, colour=False) for line in beside([left, right], 4, gap=2)]
    assert lines == ["ab    中  ", "c         "]


def test_gaps_are_places_and_the_space_before_one_is_left_to_it() -> None:
    tokenizer = byte_level()
    row = encode(split("The {{2}} of {{x}}{{1}}\n{{3}}"), tokenizer)
    text = [*tokenizer("The").input_ids, *tokenizer(" of {{x}}").input_ids, *tokenizer("\n").input_ids]
    assert row.ids_L[~row.to_fill_L].tolist() == text
    assert [stop - start for start, stop in row.gaps] == [2, 1, 3]
    assert row.gaps[0] == (3, 5)
    assert all(bool(row.to_fill_L[start:stop].all()) for start, stop in row.gaps)
    assert int(row.to_fill_L.sum()) == 6


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("max_denoising_steps=0 is not.", "--steps=0 is not."),
        ("Give max_new_tokens a value.", "Give --new-tokens a value."),
        ("threshold=2 is no probability.", "--threshold=2 is no probability."),
        ("Known: threshold, entropy_threshold, p2.", "Known: threshold, entropy_threshold, p2."),
        ("a temperature, or a seed in the cache", "a temperature, or a seed in the cache"),
        ("seed=0.5 and cache='dual'", "--seed=0.5 and --cache='dual'"),
        ("confidence_threshold=1 without stability_threshold", "confidence_threshold=1 without --stability"),
    ],
)
def test_errors_speak_of_flags(said: str, told: str) -> None:
    error = in_flags(DllmError(said, said))
    assert (error.problem, error.remedy) == (told, told)
