"""`python -m dllm_core`: every kind of row through `main`, on a terminal and off it."""

from __future__ import annotations

import gc
import io
import json
import re
import time
import weakref
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_core import DiffusionGenerationConfig, load_cell
from dllm_core.cli import canvas_view, loading
from dllm_core.cli.compare import Row, _blocks
from dllm_core.cli.main import main
from dllm_core.data.trajectories import NOT_RESPONSE, TrajectoryStore
from dllm_core.samplers.trajectory_thresholds import stored_thresholds
from tests.fake_terminal import FakeTerminal
from tests.tiny_run import LATENT_ROWS, MASK_ROWS, ROWS, write_run

PROMPT = "Fellow citizens, the <mask> of {{2}} is"
FEW = ("--new-tokens", "12", "--seed", "3", "--dtype", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    monkeypatch.setenv("DLLM_RUNS", str(runs))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture
def terminal() -> FakeTerminal:
    return FakeTerminal()


def on(terminal: FakeTerminal, *arguments: str) -> int:
    """Run a command on a terminal."""
    with redirect_stdout(terminal):
        return main(arguments)


def is_forming(frame: str, row: str) -> bool:
    return f"\n\n{row}: writing" in frame or f"\n\n{row}: step " in frame


def cell_dir(runs: Path, row: str) -> Path:
    return runs / "reports" / "latest" / "cells" / row


def expected(runs: Path, row: str, prompt: str = PROMPT, **settings: Any) -> tuple[str, Any]:
    """Return (prompt and continuation, output) from the library alone."""
    method = load_cell(cell_dir(runs, row), dtype=torch.float32)
    fields = {"max_new_tokens": 12, "max_denoising_steps": 4, "temperature": 0.7, "seed": 3, **settings}
    if row == "block_causal":
        fields.setdefault("cache", "exact")
    ids = method.tokenizer(prompt, return_tensors="pt").input_ids
    output = method.generate(ids, DiffusionGenerationConfig(**fields))
    return method.tokenizer.decode(output.sequences[0], skip_special_tokens=True), output


def steps_of(row: str) -> list[str]:
    return [] if row.startswith("ar") else ["--steps", "4"]


@pytest.mark.parametrize("row", ROWS)
def test_off_a_terminal_the_text_alone_is_printed(row: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", row, PROMPT, *FEW, *steps_of(row)]) == 0
    text, output = expected(runs, row)
    out, notes = capsys.readouterr()
    assert out == text + "\n"
    assert out.startswith(PROMPT), "what looks like a mask or a gap in a prompt is data"
    assert f"{output.num_forwards} passes (NFE), {output.tokens_per_forward:.1f} tokens per forward, seed 3" in notes
    assert f"{row}: {output.new_tokens[0]} tokens in " in notes


@pytest.mark.parametrize("row", ROWS)
def test_on_a_terminal_the_text_forms_and_ends_as_what_was_returned(
    row: str, runs: Path, terminal: FakeTerminal
) -> None:
    assert on(terminal, "sample", row, PROMPT, *FEW, *steps_of(row), "--keep-going", "--pace", "0") == 0
    text, output = expected(runs, row, stop_at_eos=False)
    body, _, notes = terminal.shown().partition(f"{row}: 12 tokens in ")
    assert body.replace("\n", "") == text.replace("\n", "").replace("\t", "    ")
    assert "passes (NFE)" in notes.replace("\n", "")
    assert terminal.cursor_shown
    written = text.removeprefix(PROMPT)
    assert terminal.styled("36") == written.replace("\n", ""), "what was written is in one colour when it is done"
    open_places = [frame.count("░") // 3 for frame in terminal.frames if is_forming(frame, row)]
    assert open_places[0] == 12, "before the first step every place is open"
    if row in MASK_ROWS:
        assert len(open_places) == 1 + output.num_forwards
        assert open_places == sorted(open_places, reverse=True)
        assert open_places[-1] == 0
    elif row.startswith("ar"):
        assert open_places == list(range(12, -1, -1)), "token by token"
    elif row == "cola":
        assert open_places[-1] == 0
        assert len(set(open_places)) > 2, "block by block"
    else:
        assert set(open_places) == {12}, "all tokens are final at the same moment"


def test_fresh_tokens_are_highlighted_and_given_ones_are_not(runs: Path, terminal: FakeTerminal, monkeypatch) -> None:
    drawn: list[tuple[str, str, str]] = []
    draw = canvas_view.Region.draw

    def spy(region: Any, lines: Any) -> None:
        draw(region, lines)
        drawn.append((terminal.styled("1;32"), terminal.styled("36"), terminal.styled("2;36")))

    monkeypatch.setattr(canvas_view.Region, "draw", spy)
    assert on(terminal, "sample", "random_mask", PROMPT, *FEW, "--steps", "4", "--keep-going", "--pace", "0") == 0
    text, _ = expected(runs, "random_mask", stop_at_eos=False)
    written = len(text.removeprefix(PROMPT).replace("\n", ""))
    assert drawn[0] == ("", "", " ░░░" * 12)
    for (_, before, _), (fresh, standing, _) in pairwise(drawn[1:]):
        assert len(standing) >= len(before)
        assert fresh
    last_fresh, last_standing, last_open = drawn[-1]
    assert len(last_fresh) + len(last_standing) == written
    assert not last_open


def test_without_colour_nothing_but_the_cursor_is_moved(terminal: FakeTerminal, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert on(terminal, "sample", "random_mask", PROMPT, *FEW, "--steps", "3", "--pace", "0") == 0
    assert not [code for code in terminal.codes if code.endswith("m")]
    assert any("░" in frame for frame in terminal.frames)


def test_a_terminal_without_block_characters_gets_underscores(monkeypatch) -> None:
    terminal = FakeTerminal("ascii")
    assert on(terminal, "sample", "random_mask", PROMPT, *FEW, "--steps", "3", "--pace", "0") == 0
    assert any("___" in frame for frame in terminal.frames)
    assert not any("░" in frame for frame in terminal.frames)


def test_a_text_taller_than_the_terminal_does_not_move_the_cursor_off_it(terminal: FakeTerminal, monkeypatch) -> None:
    monkeypatch.setenv("LINES", "5")
    assert on(terminal, "sample", "random_mask", PROMPT, *FEW, "--steps", "3", "--pace", "0", "--new-tokens", "80") == 0
    forming = [frame for frame in terminal.frames if is_forming(frame, "random_mask")]
    assert forming
    assert all(frame.count("\n") <= 5 for frame in forming)


def test_drafts_are_shown_where_they_are_asked_for(terminal: FakeTerminal) -> None:
    assert on(terminal, "sample", "random_mask", PROMPT, *FEW, "--steps", "3", "--pace", "0", "--drafts") == 0
    forming = [frame for frame in terminal.frames if is_forming(frame, "random_mask")]
    assert "░" in forming[0], "before the first step there is no draft"
    assert len(forming) > 1
    assert not any("░" in frame for frame in forming[1:])


def test_what_takes_its_time_is_named_and_leaves_no_trace(terminal: FakeTerminal) -> None:
    assert on(terminal, "compare", PROMPT, *FEW, "--steps", "4", "--cells", "ldlm,cola", "--pace", "0") == 0
    waits = [frame.splitlines()[-1] for frame in terminal.frames if frame.endswith(" ...")]
    assert waits == ["loading ...", "loading ldlm (1 of 2) ...", "loading cola (2 of 2) ..."]
    assert "loading" not in terminal.shown()
    other = FakeTerminal()
    assert on(other, "sample", "ldlm", PROMPT, *FEW, "--rule", "p2") == 2
    assert other.frames[0] == "loading ldlm ..."
    assert not other.shown(), "an error begins on an empty line"


def test_quick_models_wait_for_the_eye_and_the_wait_is_not_counted(terminal: FakeTerminal) -> None:
    start = time.perf_counter()
    assert on(terminal, "sample", "random_mask", PROMPT, *FEW, "--steps", "4", "--pace", "0.5", "--keep-going") == 0
    elapsed = time.perf_counter() - start
    found = re.search(r"12 tokens in ([\d.]+) s", terminal.shown())
    assert found
    assert elapsed > 2.0
    assert float(found[1]) < elapsed - 1.5


@pytest.mark.parametrize("given", [PROMPT, "-"])
def test_a_prompt_comes_as_an_argument_or_through_standard_input(
    given: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert main(["sample", "--steps", "4", given, *FEW]) == 0
    out, notes = capsys.readouterr()
    assert notes.startswith("block_causal:"), "the first cell that fills in masks"
    assert out == expected(runs, "block_causal")[0] + "\n"


def test_a_prompt_comes_through_a_pipe(runs: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "prompt").write_text(PROMPT + "\n")
    with (tmp_path / "prompt").open() as piped:
        monkeypatch.setattr("sys.stdin", piped)
        assert main(["sample", "random_mask", "--steps", "4", *FEW]) == 0
    assert capsys.readouterr().out == expected(runs, "random_mask")[0] + "\n"


def test_an_empty_pipe_is_no_prompt_and_an_empty_prompt_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "prompt").write_text("")
    with (tmp_path / "prompt").open() as piped:
        monkeypatch.setattr("sys.stdin", piped)
        assert main(["sample", "random_mask", "--steps", "4", *FEW]) == 0
        assert capsys.readouterr().out.startswith("My fellow citizens")
        for words in (["sample", "random_mask", ""], ["sample", "random_mask", "-"], ["compare", "", "--json"]):
            code = main([*words, *FEW])
            out, err = capsys.readouterr()
            assert "The prompt is empty." in (err or out)
            assert code != 0


@pytest.mark.parametrize("text", ["Grüße 日本", "r\xf4le"])
def test_bytes_that_the_locale_cannot_decode_are_utf8_or_refused(text: str, runs: Path, capsys, monkeypatch) -> None:
    is_text = text.startswith("G")
    raw = text.encode() if is_text else text.encode("latin-1")
    typed = raw.decode("ascii", "surrogateescape")
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    for given in (typed, "-"):
        assert main(["sample", "ar", given, *FEW]) == (0 if is_text else 2)
        out, err = capsys.readouterr()
        assert out == (expected(runs, "ar", text)[0] + "\n" if is_text else "")
        assert is_text or err.startswith("error: The text is not UTF-8.\nConvert it first")


def test_a_stream_of_few_characters_gets_something_for_the_others(runs: Path, monkeypatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    assert main(["sample", "ar", "Grüße", *FEW]) == 0
    narrow.flush()
    written = expected(runs, "ar", "Grüße")[0]
    assert narrow.buffer.getvalue() == (written + "\n").encode("ascii", "replace")  # type: ignore[attr-defined]


def test_without_a_prompt_there_is_a_sentence_to_go_on_with(capsys) -> None:
    assert main(["sample", "random_mask", "--steps", "4", *FEW]) == 0
    assert capsys.readouterr().out.startswith("My fellow citizens, the state of our union is")


def test_a_cell_is_found_by_its_path_and_by_its_name_without_the_seed(runs: Path, tmp_path: Path, capsys) -> None:
    cells = tmp_path / "reports" / "latest" / "cells"
    cells.mkdir(parents=True)
    for seed in (10, 2):
        (cells / f"random_mask-seed{seed}").symlink_to(cell_dir(runs, "random_mask").resolve())
    for words in ([str(cell_dir(runs, "random_mask"))], ["random_mask", "--runs-dir", str(tmp_path)]):
        assert main(["sample", *words, PROMPT, "--steps", "4", *FEW]) == 0
    out, notes = capsys.readouterr()
    assert out == 2 * (expected(runs, "random_mask")[0] + "\n")
    assert "random_mask-seed2: " in notes


SETTINGS = {
    "--threshold 0.05": {"sampler_config": {"name": "threshold", "threshold": 0.05}},
    "--rule factor --factor 20": {"sampler_config": {"name": "factor", "factor": 20.0}},
    "--rule p2": {"sampler_config": "p2"},
    "--entropy-bound 3": {"sampler_config": {"name": "entropy_bound", "entropy_bound": 3.0}},
    "--block 4 --cache dual": {"block_size": 4, "cache": "dual"},
    "--guidance 2.5": {"guidance_scale": 2.5},
    "--top-k 3 --temperature 1.5": {"top_k": 3, "temperature": 1.5},
    "--top-p 0.5": {"top_p": 0.5},
    "--stability 1 --temperature 0": {"stability_threshold": 1, "temperature": 0.0},
    "--verify": {"verify": True},
    "--block 4 --multi-block 0.3 --threshold 0.05": {
        "block_size": 4,
        "multi_block": {"block_add_threshold": 0.3},
        "sampler_config": {"name": "threshold", "threshold": 0.05},
    },
    "--block 4 --cache delayed --drift": {"block_size": 4, "cache": "delayed", "measure_drift": True},
}


@pytest.mark.parametrize("flags", SETTINGS)
def test_flags_are_the_librarys_settings(flags: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "random_mask", PROMPT, *FEW, "--steps", "6", *flags.split()]) == 0
    text, output = expected(runs, "random_mask", **{"max_denoising_steps": 6, **SETTINGS[flags]})
    out, notes = capsys.readouterr()
    assert out == text + "\n"
    assert f" {output.num_forwards} passes (NFE)" in notes
    assert ("The reference decoder agreed" in notes) == (flags == "--verify")
    assert "decoder pass: quick (llama on a CPU)" in notes
    assert ("Drift of the cache: " in notes) == ("--drift" in flags)
    if drift := output.drift:
        assert f"{drift.changed_tokens} of {drift.num_tokens} drafts changed" in notes


def test_commit_orders_of_a_run_are_thresholds_by_place(runs: Path, tmp_path: Path, capsys) -> None:
    order = torch.tensor([NOT_RESPONSE, 0, 3, 1, 2])
    TrajectoryStore(tmp_path / "entry", mode="student", identity="x").write("ab", order, order >= 0)
    flags = ["--orders", str(tmp_path), "--block", "4"]
    assert main(["sample", "random_mask", PROMPT, *FEW, "--steps", "12", *flags]) == 0
    rule = {"name": "threshold", "threshold": stored_thresholds(tmp_path, 4)}
    text, _ = expected(runs, "random_mask", max_denoising_steps=12, sampler_config=rule, block_size=4)
    assert capsys.readouterr().out == text + "\n"
    for more, told in (([], "there is no --block"), (["--block", "0"], "--block=0"), (["--block", "5"], "block of 5")):
        assert main(["sample", "random_mask", PROMPT, *FEW, *flags[:2], *more]) == 2
        assert told in capsys.readouterr().err
    assert main(["sample", "random_mask", PROMPT, *FEW, *flags, "--threshold", "0.4"]) == 2
    assert "--threshold and --orders both" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["ldlm", "cola"])
def test_guidance_of_a_latent_cell_is_its_own_argument(row: str, runs: Path, capsys) -> None:
    assert main(["sample", row, PROMPT, *FEW, "--steps", "4", "--guidance", "3"]) == 0
    method = load_cell(cell_dir(runs, row), dtype=torch.float32)
    ids = method.tokenizer(PROMPT, return_tensors="pt").input_ids
    config = DiffusionGenerationConfig(max_new_tokens=12, max_denoising_steps=4, temperature=0.7, seed=3)
    output = method.generate(ids, config, guidance=3.0)
    out, notes = capsys.readouterr()
    assert out == method.tokenizer.decode(output.sequences[0], skip_special_tokens=True) + "\n"
    assert f" {output.num_forwards} passes (NFE)" in notes


# -- filling in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", MASK_ROWS)
def test_gaps_are_filled_and_what_was_given_stays(row: str, runs: Path, terminal: FakeTerminal) -> None:
    text = "The {{6}} of the Senate, {{x}} and{{3}}."
    flags = [*FEW[2:], "--steps", "6", "--pace", "0", *(["--cache", "none"] if row == "block_causal" else [])]
    assert on(terminal, "infill", row, text, *flags) == 0
    method = load_cell(cell_dir(runs, row), dtype=torch.float32)
    pieces = ["The", " of the Senate, {{x}} and", "."]
    a, b, c = (method.tokenizer(piece).input_ids for piece in pieces)
    ids = torch.tensor([[*a, *[0] * 6, *b, *[0] * 3, *c]])
    mask = torch.tensor([[*[False] * len(a), *[True] * 6, *[False] * len(b), *[True] * 3, False]])
    config = DiffusionGenerationConfig(max_denoising_steps=6, temperature=0.7, seed=3)
    out = method.generate(ids, config, infill_mask=mask).sequences[0]
    places = out[len(a) : len(a) + 6], out[-4:-1]
    first, second = (method.tokenizer.decode(place, skip_special_tokens=True) for place in places)
    shown = terminal.shown()
    body = shown[: shown.index("{{6}} ")].replace("\n", "")
    assert body == (pieces[0] + first + pieces[1] + second + pieces[2]).replace("\n", "")
    assert terminal.styled("36") == (first + second).replace("\n", "")
    notes = shown.replace("\n", "")
    assert f"{{{{6}}}} {first!r}".replace("\n", "") in notes
    assert f"{{{{3}}}} {second!r}" in notes
    assert "9 tokens in " in notes


def test_text_to_fill_in_needs_no_cell_and_no_quotes_around_a_word(capsys) -> None:
    assert main(["infill", "Senate{{4}}", *FEW[2:], "--cache", "none"]) == 0
    out, notes = capsys.readouterr()
    assert out.startswith("Senate")
    assert "block_causal: 4 tokens in " in notes


# -- side by side ---------------------------------------------------------------------------------------------------


def test_compare_gives_what_the_cells_give_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", PROMPT, *FEW, "--steps", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt"] == PROMPT
    assert "not a benchmark" in told["note"]
    assert [row["cell"] for row in told["cells"]] == [
        *("ar", "ar_tuned"), *sorted(MASK_ROWS), *sorted(LATENT_ROWS)
    ]  # fmt: skip
    for row in told["cells"]:
        text, output = expected(runs, row["cell"])
        assert PROMPT + row["text"] == text
        assert (row["tokens"], row["passes"]) == (output.new_tokens[0], output.num_forwards)
        assert row["tokens_per_forward"] == pytest.approx(output.tokens_per_forward)
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["left_out"] == (["--steps"] if row["cell"].startswith("ar") else [])
        assert row["error"] is None


@pytest.mark.parametrize(("columns", "at_once"), [(60, 1), (80, 2), (125, 3)])
def test_texts_stand_side_by_side_where_there_is_room(
    columns: int, at_once: int, runs: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ["ar", "random_mask", "cola"]
    assert main(["compare", PROMPT, *FEW, "--steps", "4", "--cells", ",".join(names), "--keep-going"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if "tokens/s" in line and "passes" not in line]
    assert sum(name in heads[0].split() for name in names) == at_once
    assert len(heads) == -(-3 // at_once)
    assert all(len(line) <= columns for line in lines)
    table = [line.split() for line in lines[-4:-1]]
    assert [row[0] for row in table] == names
    assert [row[2] for row in table] == [str(expected(runs, name, stop_at_eos=False)[1].num_forwards) for name in names]


def test_compare_on_a_terminal_shows_each_cell_forming_and_leaves_the_result(terminal: FakeTerminal) -> None:
    assert (
        on(
            terminal,
            "compare",
            PROMPT,
            *FEW,
            "--steps",
            "4",
            "--cells",
            "random_mask,ldlm",
            "--pace",
            "0",
            "--keep-going",
        )
        == 0
    )
    assert any("random_mask (1 of 2): step 4, 12 of 12 tokens" in frame for frame in terminal.frames)
    assert any("ldlm (2 of 2)" in frame for frame in terminal.frames)
    assert " of 2)" not in terminal.shown()
    assert "░" not in terminal.shown()
    assert terminal.cursor_shown


def test_a_cell_that_cannot_write_does_not_stop_the_others(capsys) -> None:
    assert main(["compare", PROMPT, *FEW, "--steps", "1", "--cells", "block_causal,random_mask"]) == 1
    out = capsys.readouterr().out
    assert "--steps=1 is too few for the" in " ".join(out.split())
    assert out.splitlines()[-3].split() == ["block_causal", *"-----"]


def test_a_cell_without_a_chat_template_goes_on_without_and_that_is_said_once(capsys) -> None:
    names = "ar,random_mask,ldlm"
    assert main(["compare", PROMPT, *FEW, "--steps", "4", "--cells", names, "--chat", "--json"]) == 0
    chatted = json.loads(capsys.readouterr().out)["cells"]
    assert main(["compare", PROMPT, *FEW, "--steps", "4", "--cells", names, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["cells"]
    assert [row["text"] for row in chatted] == [row["text"] for row in plain]
    assert [row["left_out"][-1] for row in chatted] == 3 * ["--chat (no chat template)"]
    assert main(["compare", PROMPT, *FEW, "--cells", names, "--chat"]) == 0
    out, notes = capsys.readouterr()
    assert f"Not applied: --chat (no chat template) to {names.replace(',', ', ')}." in notes
    assert (out + notes).count("template") == 1


def test_one_cell_of_two_runs_has_two_names(runs: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "ar").symlink_to(cell_dir(runs, "ar").resolve())
    assert main(["compare", PROMPT, *FEW, "--cells", f"ar,{tmp_path / 'ar'}", "--json"]) == 0
    assert [row["cell"] for row in json.loads(capsys.readouterr().out)["cells"]] == ["ar", "ar 2"]


def test_figures_that_do_not_fit_are_left_out_on_a_terminal(terminal: FakeTerminal, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "34")
    assert on(terminal, "compare", PROMPT, *FEW, "--steps", "4", "--cells", "random_mask,ldlm", "--pace", "0") == 0
    lines = [line.rstrip() for line in terminal.shown().splitlines()]
    assert all(len(line) <= 34 for line in lines)
    assert ["cell", "tok/s", "NFE"] in [line.split() for line in lines]


def test_a_text_of_white_space_says_so() -> None:
    row = Row(cell="a", method="ar", text=" \n\n", tokens=3, seconds=1.0, tokens_per_s=3.0, passes=3)
    shown = ["".join(span.text for span in line).strip() for line in _blocks([row], 60, 1)]
    assert shown == ["a  3 tokens/s", "(white space alone)", ""]


def test_one_model_at_a_time_is_in_memory(capsys, monkeypatch) -> None:
    held: list[weakref.ref[Any]] = []
    load = loading.load_cell

    def watched(*arguments: Any, **named: Any) -> Any:
        gc.collect()
        assert not [ref for ref in held if ref() is not None], "the model before is still there"
        method = load(*arguments, **named)
        held.append(weakref.ref(method))
        return method

    monkeypatch.setattr(loading, "load_cell", watched)
    assert main(["compare", PROMPT, *FEW, "--steps", "4", "--json"]) == 0
    assert len(held) == len(ROWS)


# -- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "sampl": ("Unknown command 'sampl'.", "Did you mean 'sample'?"),
    "sample random_maks": ("Unknown cell 'random_maks'", "Did you mean 'random_mask'? Known: ar, ar_tuned,"),
    "sample random_mask --temprature 1": ("Unknown setting '--temprature' of sample.", "Did you mean '--temperature'?"),
    "infill random_mask --new-tokens 3": ("Unknown setting '--new-tokens' of infill.", "Known: "),
    "sample random_mask --steps many": ("--steps: invalid int value: 'many'", "--help"),
    "sample random_mask --steps 0": ("--steps=0 is not a positive integer.", "Give --steps a value of at least 1."),
    "sample random_mask --rule confidense": ("Unknown sampler 'confidense'.", "Did you mean 'confidence'?"),
    "sample random_mask --rule p2 --threshold 1": ("--threshold belongs to the rule 'threshold', not to 'p2'.", "one"),
    "sample random_mask --threshold 2": ("--threshold=2.0 is not a probability.", "Give a number in (0, 1]"),
    "sample random_mask --cache exact": ("exact", ""),
    "sample random_mask a b": ("One argument too many: 'b'.", "Quote a text of several words"),
    "sample random_mask --chat": ("The cell's tokenizer has no chat template.", "Leave --chat out"),
    "sample random_mask --orders nowhere --block 4": ("There are no commit orders in 'nowhere'.", "runs/cache"),
    "sample random_mask --pace -1": ("--pace=-1.0 is no time to wait.", "at least 0"),
    "compare --pace nan": ("--pace=nan is no time to wait.", "at least 0"),
    "sample random_mask --drift": ("--drift needs an approximate cache", "--cache='prefix'"),
    "sample random_mask --multi-block 0.1 --threshold 0.5": ("--multi-block lets blocks overlap", "Give --block too."),
    "sample random_mask --block 4 --multi-block 2 --threshold 0.5": ("--multi-block=2.0 is not a share.", "(0, 1]"),
    "compare --drift": ("Unknown setting '--drift' of compare.", ""),
    "sample random_mask --new-tokens 1000": ("", ""),
    "sample ar --steps 4": ("'ar' writes token by token and has no --steps.", "Leave --steps out"),
    "sample ldlm --rule p2": ("'ldlm' writes from latents and has no --rule.", "take a cell that fills in masks"),
    "sample vfm --guidance 2": ("'vfm' writes from latents and has no --guidance.", "Leave --guidance out"),
    "infill ar {{2}}": ("'ar' writes token by token and cannot fill in gaps.", "random_mask"),
    "infill ldlm a{{2}}": ("'ldlm' writes from latents and cannot fill in gaps.", "random_mask"),
    "infill random_mask gapless": ("The text has no gap to fill.", "Write {{8}} where 8 tokens are missing"),
    "infill random_mask a{{0}}": ("The gap {{0}} has 0 tokens.", "Give 1 to"),
    "infill random_mask {{3}}a": ("Row 0 has no token at position 0", "Begin every row"),
    "compare --cells ar,random": ("Unknown cell 'random'", "Did you mean 'random_mask'?"),
    "sample random_mask --device cuda": ("--device=cuda, but torch sees no usable GPU.", "Use --device=auto or cpu"),
    "sample --runs-dir nowhere": ("There is no finished run in 'nowhere'.", "--runs-dir DIRECTORY"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_is_two_lines_that_say_what_to_do(line: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    problem, remedy = err.splitlines()
    assert problem.startswith("error: ")
    assert REFUSED[line][0] in problem
    assert REFUSED[line][1] in remedy
    assert not out


def test_cells_that_the_step_cache_has_dropped_are_named(tmp_path: Path, capsys) -> None:
    cells = tmp_path / "reports" / "latest" / "cells"
    cells.mkdir(parents=True)
    (cells / "random_mask").symlink_to(tmp_path / "gone")
    assert main(["sample", "random_mask", "--runs-dir", str(tmp_path)]) == 2
    assert "removed from the step cache" in capsys.readouterr().err


def test_an_interrupt_leaves_the_terminal_as_it_was(terminal: FakeTerminal, capsys, monkeypatch) -> None:
    def interrupted(view: Any, canvas: Any, committed: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(canvas_view.CanvasView, "on_draft", interrupted)
    assert on(terminal, "sample", "random_mask", PROMPT, *FEW, "--steps", "4") == 130
    assert "?25l" in terminal.codes
    assert terminal.cursor_shown
    assert terminal.getvalue().endswith("\x1b[?25h")
    assert capsys.readouterr().err == "interrupted\n"


def test_help_names_the_commands_and_every_setting(capsys) -> None:
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in ("sample", "infill", "compare"))
    with pytest.raises(SystemExit) as left:
        main(["sample", "--help"])
    assert left.value.code == 0
    usage = capsys.readouterr().out
    assert all(flag in usage for flag in ("--steps", "--rule", "--verify", "--runs-dir"))
