"""The plan: rows, shared work, bad input refused before anything is computed, and the text of `--dry-run`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import params
from params import GridSpec
from steps.benchmark_rounds import groups_of, rounds_by_group
from steps.estimates import ar_seconds, decode_seconds
from steps.plan import render, validate
from steps.plan_text import settings_yaml
from steps.row_costs import base_shape, own_network
from tests.plan_tools import LLAMA, TWO_CORES, model_dir, plan, refused
from tests.reader_room import install, reader_cell, with_cells

# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_needs_and_shared_work() -> None:
    made = plan("laptop")
    rows = {row.row_id: row for row in made.rows}
    assert [r.row_id for r in made.rows] == [c.name for c in made.spec.cells]
    assert not rows["ar"].trains
    assert rows["ar_tuned"].trains
    assert rows["random_mask"].requirements.anchors is None
    four = rows["repr_align_4"].requirements.anchors
    assert four is not None
    assert four.layers == ("8", "15", "23", "final")
    every = ("embed", *(str(i) for i in range(1, 30)), "final")
    assert [(row, need.layers) for row, need in made.shared.anchors] == [
        ("repr_align_4", four.layers),
        ("repr_align_all", every),
        ("repr_align_trajectory", every),
        ("ldlm", ("28",)),
        ("cola", ("28",)),
    ]
    assert [(cost.rows, cost.need.positions) for cost in made.cost.anchors] == [
        (("repr_align_4",), "response_predictors"),
        (("repr_align_all", "repr_align_trajectory"), "response_predictors"),
        (("ldlm",), "response"),
        (("cola",), "all"),
    ]
    assert [(row, need.cell, need.share) for row, need in made.shared.prefixes] == [
        ("repr_align_trajectory", "repr_align_all", 0.4)
    ]
    assert [(row, need.responses, need.commit_steps) for row, need in made.shared.trajectories] == [
        ("repr_align_trajectory", 64, 8)
    ]


def test_several_seeds_make_several_rows() -> None:
    made = plan(seeds="0,1", cells="ar,repr_align_trajectory")
    assert [r.row_id for r in made.rows] == [
        "ar-seed0",
        "ar-seed1",
        "repr_align_trajectory-seed0",
        "repr_align_trajectory-seed1",
    ]
    assert list(made.donors) == ["repr_align_all"]
    assert [row for row, _ in made.shared.prefixes] == ["repr_align_trajectory-seed0", "repr_align_trajectory-seed1"]
    assert "train shared prefixes" in made.cost.shared_s


def test_no_needs_no_shared_work() -> None:
    made = plan(cells="ar,random_mask")
    assert made.shared.anchors == made.cost.anchors == made.shared.prefixes == made.shared.trajectories == ()
    assert "anchors" not in made.cost.disk
    assert "cache anchors" not in made.cost.shared_s


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ("budget.kind=tokens,budget.value=65", 2),  # 64 response tokens a step, the last batch is whole
        ("budget.kind=tokens,budget.value=64", 1),
        ("budget.kind=epochs,budget.value=2", 32),  # 64 sequences in batches of 4
        ("train.steps=7", 7),
    ],
)
def test_steps_of_a_budget(budget: str, steps: int) -> None:
    made = plan(cells="ar,random_mask", overrides=budget)
    assert made.cost.rows["random_mask"].steps == steps
    assert made.cost.rows["ar"].steps == 0
    assert made.cost.rows["ar"].train_s == 0


def test_more_costly_methods_get_fewer_steps_of_a_flop_budget() -> None:
    made = plan("laptop", overrides="budget.kind=flops,budget.value=1e14")
    assert made.cost.rows["repr_align_trajectory"].steps < made.cost.rows["random_mask"].steps
    costs = {r.row_id: made.cost.rows[r.row_id] for r in made.rows if r.trains}
    assert costs["random_mask"].teacher_flops == 0 < costs["repr_align_4"].teacher_flops
    for name, cost in costs.items():
        assert cost.train_flops + cost.teacher_flops == pytest.approx(1e14, rel=0.02), name


def test_anchors_cover_what_is_trained_on_and_no_more() -> None:
    cells = "random_mask,repr_align_4,repr_align_all"
    made = plan("laptop", cells=cells, overrides="budget.kind=tokens,budget.value=26000")
    steps = made.cost.rows["random_mask"].steps
    assert [cost.sequences for cost in made.cost.anchors] == [4 * steps, 4 * steps]
    # the 128 response tokens and the row before them; what both needs read is there once
    assert made.cost.disk["anchors"] == 4 * steps * 31 * 129 * 576 * 2
    fewer = plan("laptop", cells=cells, overrides="budget.kind=tokens,budget.value=26000,data.train_sequences=70")
    assert [cost.sequences for cost in fewer.cost.anchors] == [70, 70]


# -- the text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", params.preset_names())
def test_dry_run_of_every_preset(preset: str) -> None:
    made = plan(preset, dry_run=True)
    text = render(made)
    for heading in ("Settings", "Contracts", "Rows", "Prepared once for all rows", "Estimates"):
        assert f"\n\n{heading}" in text
    for row in made.rows:
        assert f"\n  {row.row_id} " in text
    for word in ("alignment", "mask token", "weighting", "normaliser", "smallest GPU", "bytes a parameter"):
        assert word in text
    assert text.endswith("\n")
    assert text.isascii()


@pytest.mark.parametrize("preset", params.preset_names())
def test_the_printed_settings_are_a_preset_that_gives_the_same_grid(preset: str, tmp_path: Path) -> None:
    made = plan(preset, dry_run=True, overrides="train.lr=3e-4,cells.ldlm.train.lr=5e-5", seeds="0,5")
    copy = tmp_path / f"{preset}.yaml"
    copy.write_text(settings_yaml(made))
    again = plan(str(copy), dry_run=True)
    assert again.rows == made.rows
    same = {"cells", "donors"}
    assert again.spec.model_dump(exclude=same) == made.spec.model_dump(exclude=same)


def test_the_published_grid_states_its_memory() -> None:
    text = render(plan("qwen3_1_7b", dry_run=True))
    assert "parameters    1,720,574,976 (qwen3, 28 layers, hidden 2048)" in text
    assert "Adam 36.6 GB (18 bytes a parameter)" in text
    assert "smallest GPU  48 GB" in text
    assert "anchors of 29 layers" in text


def test_the_published_code_path_on_a_tiny_qwen3(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 28}
    data = tmp_path / "web.jsonl"
    data.write_text('{"text": "%s"}\n' % ("word " * 400) * 60)
    made = plan(
        "qwen3_1_7b",
        model=str(model_dir(tmp_path / "m", config)),
        data=str(data),
        overrides="runtime.device=cpu",
    )
    assert made.data.documents == 50
    quarters = next(r for r in made.rows if r.cell == "repr_align_4").requirements.anchors
    assert quarters is not None
    assert quarters.layers == ("7", "14", "21", "final")
    assert made.cost.rows["random_mask"].steps == -(-10 * (made.cost.train_sequences or 0) // 4)


def test_a_spec_from_json_plans_alike() -> None:
    spec = params.load("test")
    again = GridSpec.model_validate_json(spec.model_dump_json())
    assert validate(again, machine=TWO_CORES) == validate(spec, machine=TWO_CORES)


@pytest.mark.parametrize("preset", ["laptop", "test", "qwen3_1_7b"])
def test_planning_imports_no_torch(preset: str) -> None:
    code = (
        "import sys, params; from steps.plan import render, validate; "
        f"render(validate(params.load({preset!r}), runs_dir='.', dry_run=True)); "
        "heavy = {'torch', 'transformers', 'datasets', 'metaflow', 'mlflow', 'pandas', 'matplotlib', 'pyarrow'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    root = Path(params.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# -- rooms with networks of their own -------------------------------------------------------------------------------


def test_a_room_with_a_network_of_its_own_is_planned_by_its_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    budget = {"budget.kind": "flops", "budget.value": "1e10", "train.dtype": "bf16"}
    spec = params.load("test", cells=["random_mask", "repr_align_4"], overrides=budget)
    made = validate(with_cells(spec, reader_cell(sequences=10)), machine=TWO_CORES)
    hidden, vocab, batch = 64, 576, spec.train.batch_size  # 512 tokens, the mask's row, padded to a multiple of 64
    probe = hidden * vocab
    row, cost = next(r for r in made.rows if r.cell == "reader"), made.cost.rows["reader"]
    per_step, teacher = (
        6.0 * probe * batch * spec.data.response_tokens,
        made.model.shape.teacher_flops(spec.data.length),
    )
    assert cost.steps == round((1e10 - 10 * teacher) / per_step)
    assert (cost.distinct, cost.teacher_flops) == (10, 10 * teacher)
    assert cost.train_s == TWO_CORES.seconds(cost.steps * per_step, cost.steps, "bf16")
    assert made.cost.memories["reader"].weights == 18 * (probe + vocab) + 6 * 7
    assert made.cost.memories["reader"].total < made.cost.memories["random_mask"].total
    assert row.requirements.anchors is not None

    # one layer of 10 sequences and all held-out ones for the one, two layers of more sequences for the other
    (align, reader) = made.cost.anchors
    stored = (spec.data.response_tokens + 1) * hidden * 2
    assert (reader.sequences, reader.heldout) == (10, spec.data.heldout_sequences)
    assert reader.num_bytes == (10 + spec.data.heldout_sequences) * stored
    assert align.num_bytes == align.sequences * stored * 2
    union = align.num_bytes + spec.data.heldout_sequences * stored  # layer 1 is among those of the other
    assert made.cost.disk["anchors"] == union

    text = render(made)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Networks of their own" in lines
    assert f"reader probe {probe:,}" in lines
    assert f"reader all trained {probe + vocab:,} 674.0 kB with gradients and Adam (18 bytes each)" in lines
    assert "reader frozen 7 kept in memory, included" in lines
    assert f"reader work {6.0 * probe:.2e} FLOPs of training a response token" in lines
    assert any(line.startswith(f"reader reader {probe + vocab:,} {cost.steps:,} ") for line in lines)
    assert any(
        line.startswith("- reader: layer 1, rows of response tokens, 10 and ") and "held-out sequences" in line
        for line in lines
    )
    assert any(line.startswith("- repr_align_4: layers 1, final, rows that predict response tokens") for line in lines)
    assert "Networks of their own" not in render(plan("test", cells="random_mask"))


@pytest.mark.parametrize(("prompt", "response"), [(32, 128), (96, 64)])
def test_rooms_that_run_prompts_are_charged_for_those_of_the_data(prompt: int, response: int) -> None:
    window = {"data.prompt_tokens": prompt, "data.response_tokens": response}
    made = plan("laptop", cells="vfm,cola", overrides=window)
    for row in made.rows:
        length = prompt + response
        shape = made.model.shape
        base = shape.base(converted=False, positions_per_response_token=length / response, length=length)
        network, cost = row.options.network(base), made.cost.rows[row.row_id]
        assert network is not None
        tokens = cost.steps * row.train.batch_size * response
        assert cost.train_flops == pytest.approx(tokens * network.flops_per_response_token)


def test_decoding_costs_what_a_room_says_of_a_step_and_otherwise_a_third_of_training() -> None:
    """One pass of vfm and one of iterative unmasking run the same network; rollouts are training's alone."""
    costs = {k: plan("laptop", overrides=f"cells.vfm.options.rollout_steps={k}").cost.rows for k in (4, 16)}
    speeds = {k: rows["vfm"].benchmark_s for k, rows in costs.items()}
    assert speeds[4] == speeds[16]
    assert 1.0 < speeds[4] / costs[4]["random_mask"].benchmark_s < 1.5  # softmax . E is one more product
    made = plan("laptop", cells="ldlm", overrides="bench.steps=8,bench.rounds=3,bench.warmup_rounds=1")
    (row,) = made.rows
    network = own_network(made.spec, row, made.model.shape)
    assert network is not None
    assert network.flops_per_denoised_token is None
    per_decode = TWO_CORES.seconds(8 * 128 * network.flops_per_response_token / 3.0, 8, "bf16")
    assert made.cost.rows["ldlm"].benchmark_s == pytest.approx(4 * per_decode)


@pytest.mark.parametrize(
    "settings", ["bench.steps=[8,32],bench.rounds=16", "bench.steps=[4,64],bench.rounds=9,bench.batch_sizes=[1,4]"]
)
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_the_benchmark_is_charged_for_the_decodes_that_it_makes(settings: str, warmup: int) -> None:
    """Counted in the benchmark's own loop: longer decodes get fewer rounds, and only the first seed is timed."""
    from dllm_core.evals.throughput import interleave
    from dllm_core.methods.protocol import GenerationOutput

    made = plan(
        "laptop",
        cells="random_mask,ar",
        seeds="0,1",
        overrides=f"{settings},bench.warmup_rounds={warmup}",
        dry_run=True,
    )
    bench, shape = made.spec.bench, made.model.shape
    seconds = {"random_mask": 0.0, "ar": 0.0}

    def decode(row: str, steps: int | None, batch: int) -> Callable[[int], GenerationOutput]:
        def run(index: int) -> GenerationOutput:
            common = {"new": bench.new_tokens, "batch": batch, "dtype": "bf16"}
            if steps is None:
                seconds[row] += ar_seconds(shape, TWO_CORES, **common)
            else:
                seconds[row] += decode_seconds(shape, TWO_CORES, length=160, steps=steps, **common)
            return GenerationOutput([], [bench.new_tokens], 1, 0.0)

        return run

    rounds = rounds_by_group(bench)
    groups: dict[str, dict[str, Callable[[int], GenerationOutput]]] = {group: {} for group in rounds}
    for row in seconds:
        turns = {group: decode(row, *of) for group, *of in groups_of(bench, causal=row == "ar")}
        next(iter(turns.values()))(-1)  # on which memory is measured
        for group, run in turns.items():
            groups[group][row] = run
    interleave(groups, rounds=rounds, warmup_rounds=max(0, warmup - 1))
    for row, expected in seconds.items():
        assert made.cost.rows[f"{row}-seed0"].benchmark_s == pytest.approx(expected)
        assert made.cost.rows[f"{row}-seed1"].benchmark_s == 0.0
    if warmup == 1 and len(bench.batch_sizes) == 1:
        eight, long = (
            decode_seconds(shape, TWO_CORES, length=160, new=128, steps=n, batch=1, dtype="bf16") for n in (8, 32)
        )
        assert seconds["random_mask"] == pytest.approx(17 * eight + 4 * long)


@pytest.mark.parametrize("preset", [name for name in params.preset_names() if name != "ldlm_hour"])
def test_vfm_and_cola_are_sized_for_the_model_of_every_preset(preset: str) -> None:
    made = plan(preset, dry_run=True)
    base = base_shape(made.spec, made.model.shape)
    rows = {row.cell: row for row in made.rows}
    networks = {name: own_network(made.spec, rows[name], made.model.shape) for name in ("vfm", "cola")}
    vfm, cola = networks["vfm"], networks["cola"]
    assert vfm is not None
    assert cola is not None
    assert vfm.num_trainable < 2 * base.parameters, "an adapter beside the model"
    if made.spec.model.scratch is None:
        assert 0.03 < vfm.trainable["adapter"] / base.parameters < 0.1
        assert 0.1 < cola.num_trainable / base.parameters < 0.3
    for name in networks:
        row_id = rows[name].row_id
        assert made.cost.rows[row_id].steps >= 10
        largest = made.cost.memories[row_id].smallest_gpu_gb()
        assert largest is not None
        assert largest <= 80


def test_parts_of_the_base_model_cannot_be_frozen_in_a_room_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    spec = params.load("test", cells=["random_mask"], overrides={"train.freeze": "[mlp]"})
    problem, remedy = refused(lambda: validate(with_cells(spec, reader_cell()), machine=TWO_CORES))
    assert problem.startswith("train.freeze = ['mlp'], but cell 'reader' trains networks of its own")
    assert "cells.reader.train.freeze=[]" in remedy
    exempt = reader_cell().model_copy(update={"train": {"freeze": []}})
    assert validate(with_cells(spec, exempt), machine=TWO_CORES).rows
