"""Every room through the trainer, with the real stores."""

from pathlib import Path

import pytest
import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.anchor_extraction import extract
from dllm_core.data.anchors import AnchorStore
from dllm_core.data.order import SampleOrder
from dllm_core.data.trajectories import TrajectoryStore
from dllm_core.errors import StoreError
from dllm_core.methods.protocol import Method, Resources, SamplingRequest
from dllm_core.methods.registry import room_method, room_options
from dllm_core.methods.trajectory.extraction import extract_orders, subset
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings
from tests.method_tools import corrupt, split_losses, step_info
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

NUM, LENGTH, PROMPT = 12, 20, 4
OPTIONS = {
    "ar": {"tuned": True},
    "random_mask": {},
    "repr_align": {"token_fraction": 0.5},
    "trajectory": {"responses": 8, "block_sizes": [4, 7], "prefix_share": 0.5, "commit_steps": 4},
    "block_causal": {"block_size": 4, "weight": 1.0, "token_fraction": 0.5},
}


def _method(room: str, **options: object) -> Method:
    return room_method(room)(tiny_backbone(), room_options(room)(**{**OPTIONS[room], **options}))


def _resources(method: Method, data, root: Path, dtype: str = "fp32") -> Resources:
    resources, need = Resources(), method.options.requirements(method.backbone.num_layers)
    if need.anchors:
        resources.anchors = AnchorStore(root / "anchors", "teacher", dtype)
        everything = data.batch_of(range(len(data)))
        teacher = tiny_backbone()
        extract(teacher, [everything], resources.anchors, need.anchors.layers, positions=need.anchors.positions)
    if need.trajectories:
        store = TrajectoryStore(root / "orders", mode="student", identity="x")
        for sample_id, _ in subset(SampleOrder(len(data), 0), 0, len(data)):
            batch = data.batch_of([sample_id])
            orders_BL = extract_orders(method, batch, need.trajectories, NoiseSource(0))
            store.write(batch.sequence_keys[0], orders_BL[0], batch.response_BL[0])
        resources.trajectories = store
    return resources


def _train(method: Method, data, resources: Resources, workdir: Path, **settings: object) -> list[dict]:
    rows: list[dict] = []
    given = {"steps": 16, "batch_size": 4, "lr": 0.02, "checkpoint_every_s": None, **settings}
    Trainer(
        method, data, SampleOrder(len(data), 0), TrainSettings(**given), resources, NoiseSource(0), workdir,
        rows.append, peak_flops=1e9,
    ).run()  # fmt: skip
    return rows


@pytest.mark.parametrize("room", list(OPTIONS))
@pytest.mark.parametrize("packed", [False, True])
def test_every_room_learns_and_decodes(room, packed, tmp_path):
    # three of the 97 tokens occur: soon learned
    data = packed_sequences(NUM, (9, 8), 3, 3) if packed else random_sequences(NUM, LENGTH, PROMPT, 3)
    method = _method(room)
    resources = _resources(method, data, tmp_path)
    held = data.batch([(i, 99) for i in range(NUM)])

    def losses() -> list[float]:
        phases = [step_info(phase.name, 5) for phase in method.phases()]
        return [split_losses(method, *corrupt(method, held, info), [NUM], resources, info)[0] for info in phases]

    before = losses()
    rows = _train(method, data, resources, tmp_path / "work", micro_batch_size=3, steps=24)
    assert all(b < a - 1.0 for a, b in zip(before, losses(), strict=True)), (before, losses())
    if room == "trajectory":
        assert [row["phase"] for row in rows] == ["student"] * 12 + ["trajectory"] * 12
    prompts = [data.batch_of([0]).input_ids_BL[0, :4], data.batch_of([1]).input_ids_BL[0, :6]]
    out = method.sample(prompts, SamplingRequest(max_new_tokens=6, num_steps=3))
    assert out.new_tokens == [6, 6]
    assert all(int(s.max()) < NUM_TOKENS for s in out.sequences)
    assert torch.equal(method.sample(prompts[1:], SamplingRequest(max_new_tokens=6, num_steps=3)).sequences[0],
                       out.sequences[1])  # fmt: skip


def test_micro_batches_train_the_same_weights(tmp_path):
    data = random_sequences(NUM, LENGTH, PROMPT, NUM_TOKENS)
    states = []
    for size in (None, 1):
        method = _method("trajectory")
        _train(method, data, _resources(method, data, tmp_path / "stores"), tmp_path / f"work {size}",
               micro_batch_size=size, steps=6, lr=1e-3)  # fmt: skip
        states.append(method.state_dict())
    for (name, a), (_, b) in zip(states[0].items(), states[1].items(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name


def test_bf16_trains(tmp_path):
    data = random_sequences(NUM, LENGTH, PROMPT, NUM_TOKENS)
    method = _method("trajectory", layers="all")
    rows = _train(method, data, _resources(method, data, tmp_path, "bf16"), tmp_path / "work", dtype="bf16")
    assert rows[6]["train/loss"] < rows[0]["train/loss"]
    live = _method("repr_align", teacher="live")
    assert _train(live, data, Resources(), tmp_path / "live", dtype="bf16")[-1]["train/flops"] > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3), ("fp8", 5e-3)])
@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
def test_cached_anchors_agree_with_a_live_teacher(dtype, tolerance, alignment, tmp_path):
    data = packed_sequences(4, (9, 8), 3, NUM_TOKENS)
    batch = data.batch_of(range(4))
    options = room_options("repr_align")
    cached = room_method("repr_align")(tiny_backbone(alignment=alignment), options())
    live = room_method("repr_align")(tiny_backbone(alignment=alignment), options(teacher="live"))
    resources = _resources(cached, data, tmp_path, dtype)
    corrupted, totals = corrupt(cached, batch)
    found = split_losses(cached, corrupted, totals, [1, 3], resources)[1]["align"]
    expected = split_losses(live, corrupted, totals, [4])[1]["align"]
    assert expected > 0.01
    assert found == pytest.approx(expected, abs=tolerance)


def test_orders_for_other_sequences_are_refused(tmp_path):
    data = random_sequences(NUM, LENGTH, PROMPT, NUM_TOKENS)
    method = _method("trajectory", random_mask_fraction=0.0)
    resources = _resources(method, data.head(4), tmp_path)
    resources.anchors = _resources(method, data, tmp_path / "all").anchors
    with pytest.raises(StoreError, match="no commit order"):
        _train(method, data, resources, tmp_path / "work")
