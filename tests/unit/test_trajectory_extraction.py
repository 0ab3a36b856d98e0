import pytest
import torch

from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.methods.random_mask.method import Method
from dllm_core.methods.random_mask.options import Options
from dllm_core.methods.requirements import TrajectoryNeed
from dllm_core.methods.trajectory.extraction import extract_orders, num_forwards
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone


def _need(mode: str = "student", commit_steps: int = 0, block_size: int = 5) -> TrajectoryNeed:
    return TrajectoryNeed(mode=mode, responses=4, commit_steps=commit_steps, block_size=block_size)  # type: ignore[arg-type]


def _naive_order(backbone: Backbone, ids: list[int], first: int, forwards: int, block: int) -> list[int]:
    """One sequence, one forward at a time, plain Python: commit the reference token where the model is surest."""
    shift = 1 if backbone.contract.alignment == "shifted" else 0
    canvas = ids[:first] + [backbone.contract.mask_token_id] * (len(ids) - first)
    steps, total = [-1] * len(ids), len(ids) - first
    for forward in range(forwards):
        with torch.no_grad():
            logits_LV = backbone.logits(backbone.hidden(torch.tensor([canvas]), causal=False))[0]
        surest = logits_LV.softmax(-1).amax(-1)
        quota = total * (forward + 1) // forwards - total * forward // forwards
        for _ in range(quota):
            masked = [j for j in range(first, len(ids)) if steps[j] < 0]
            current = (masked[0] - first) // block
            inside = [j for j in masked if (j - first) // block == current]
            best = max(inside, key=lambda j: (float(surest[j - shift]), -j))
            steps[best] = forward
        canvas = [ids[j] if j < first or steps[j] >= 0 else canvas[j] for j in range(len(ids))]
    return steps


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize(("commit_steps", "block_size"), [(0, 5), (0, 100), (4, 5), (3, 4), (1, 5), (2, 3)])
def test_student_orders_equal_a_naive_loop(alignment, commit_steps, block_size):
    backbone = tiny_backbone(alignment=alignment)
    batch = random_sequences(3, 16, 3, NUM_TOKENS).batch_of(range(3))
    need = _need("student", commit_steps, block_size)
    found = extract_orders(backbone, batch, need, NoiseSource(0))
    assert found.dtype == torch.int32
    for row in range(3):
        expected = _naive_order(backbone, batch.input_ids_BL[row].tolist(), 3, commit_steps or 13, block_size)
        assert found[row].tolist() == expected
    assert int(found.max()) + 1 == num_forwards(need, 13)


def test_a_batch_gives_the_orders_of_its_rows_alone_and_packed_documents_those_of_their_own():
    backbone = tiny_backbone("qwen3")
    for data in (random_sequences(4, 14, 2, NUM_TOKENS), packed_sequences(4, (9, 5), 2, NUM_TOKENS)):
        batch = data.batch_of(range(4))
        whole = extract_orders(backbone, batch, _need("student", 4, 4), NoiseSource(0))
        assert torch.equal(whole >= 0, batch.response_BL)
        for row in range(4):
            alone = extract_orders(backbone, batch.rows(row, row + 1), _need("student", 4, 4), NoiseSource(0))
            assert torch.equal(alone[0], whole[row])
    for row in range(4):
        document = batch.input_ids_BL[row, :9].tolist()
        assert whole[row, :9].tolist() == _naive_order(backbone, document, 1, 4, 4)


def test_a_method_can_be_given_and_keeps_its_mode():
    method = Method(tiny_backbone(), Options()).train()
    batch = random_sequences(2, 12, 3, NUM_TOKENS).batch_of(range(2))
    found = extract_orders(method, batch, _need(), NoiseSource(0))
    assert torch.equal(found, extract_orders(method.backbone, batch, _need(), NoiseSource(0)))
    assert method.training
    assert method.backbone.training


def test_ar_difficulty_is_the_ascending_entropy_of_the_causal_model():
    backbone = tiny_backbone(alignment="same_position")
    batch = random_sequences(3, 12, 3, NUM_TOKENS).batch_of(range(3))
    found = extract_orders(backbone, batch, _need("ar_difficulty"), NoiseSource(0))
    logits_BLV = backbone.model(batch.input_ids_BL, is_causal=True).logits[..., :NUM_TOKENS].detach().double()
    entropy_BL = -(logits_BLV.softmax(-1) * logits_BLV.log_softmax(-1)).sum(-1)
    for row in range(3):
        order = sorted(range(3, 12), key=lambda j: float(entropy_BL[row, j - 1]))
        assert [int(found[row, j]) for j in order] == list(range(9))
        assert found[row, :3].tolist() == [-1] * 3


def test_controls_left_to_right_and_random():
    backbone = tiny_backbone()
    batch = packed_sequences(2, (5, 4), 1, NUM_TOKENS).batch_of(range(2))
    found = extract_orders(backbone, batch, _need("left_to_right"), NoiseSource(0))
    assert found[0].tolist() == [-1, 0, 1, 2, 3, -1, 0, 1, 2, -1]
    data = random_sequences(40, 12, 3, NUM_TOKENS)
    batch = data.batch_of(range(40))
    random = extract_orders(backbone, batch, _need("random"), NoiseSource(0))
    assert all(sorted(row[3:].tolist()) == list(range(9)) for row in random)
    assert torch.equal(random, extract_orders(backbone, batch, _need("random"), NoiseSource(0)))
    assert not torch.equal(random, extract_orders(backbone, batch, _need("random"), NoiseSource(1)))
    assert len({tuple(row.tolist()) for row in random}) == 40
    assert [num_forwards(_need(mode), 9) for mode in ("student", "ar_difficulty", "left_to_right")] == [9, 1, 0]
