"""Keeping a block-causal cell: resuming bit for bit, saving and loading, the contract, and what is measured of it."""

import pytest
import torch

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import read_contract
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.anchor_extraction import extract
from dllm_core.data.anchors import AnchorStore
from dllm_core.data.order import SampleOrder
from dllm_core.errors import ContractError
from dllm_core.methods.block_causal.method import Method
from dllm_core.methods.block_causal.options import Options
from dllm_core.methods.protocol import Resources
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings
from tests.block_causal_tools import block_causal
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

STEPS = 8


def _trainer(workdir, data, *, seed: int = 0, settings: dict | None = None, **options) -> Trainer:
    method = block_causal(tiny_backbone(seed=seed), **options)
    resources = Resources()
    need = method.options.requirements(method.backbone.num_layers).anchors
    if need is not None:
        resources.anchors = AnchorStore(workdir.parent / "anchors", "teacher", "fp32")
        everything = data.batch_of(range(len(data)))
        extract(tiny_backbone(), [everything], resources.anchors, need.layers, positions=need.positions)
    given = {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2, **(settings or {})}
    order = SampleOrder(len(data), 0)
    kept = TrainSettings(checkpoint_every_s=None, **given)
    return Trainer(method, data, order, kept, resources, NoiseSource(0), workdir, peak_flops=1e9)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("fp32", {}),
        ("bf16", {"complementary": True}),
        ("fp32", {"weight": 1.0, "token_fraction": 0.5, "layers": [0, 2]}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path, dtype, options, packed):
    data = packed_sequences(12, (9, 8), 3, NUM_TOKENS) if packed else random_sequences(12, 18, 3, NUM_TOKENS)
    options = {"settings": {"dtype": dtype}, **options}
    whole = _trainer(tmp_path / "whole", data, **options)
    result = whole.run()
    _trainer(tmp_path / "stopped", data, **options).run(stop_at=3)
    # another start: all that it is comes from the checkpoint
    resumed = _trainer(tmp_path / "stopped", data, seed=1, **options)
    again = resumed.run()
    assert (again.flops, again.positions) == (result.flops, result.positions)
    for (name, a), (_, b) in zip(whole.method.state_dict().items(), resumed.method.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_micro_batches_train_the_same_weights(tmp_path):
    data, states = packed_sequences(12, (9, 8), 3, NUM_TOKENS), []
    for size in (None, 1):
        settings = {"micro_batch_size": size, "lr": 1e-3}
        trainer = _trainer(tmp_path / str(size), data, settings=settings, complementary=True, weight=1.0)
        trainer.run()
        states.append(trainer.method.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=2e-5), name


def test_a_checkpoint_says_what_it_is_and_loads_as_nothing_else(tmp_path):
    method = block_causal(tiny_backbone(), complementary=True)
    method.save_pretrained(tmp_path)
    contract = read_contract(tmp_path)
    assert (contract.attention, contract.block_size, contract.weighting) == ("block_causal", 4, "block_bound")
    loaded = Method.from_pretrained(tmp_path, method.options, dtype=torch.float32, device="cpu")
    batch = random_sequences(3, 14, 3, NUM_TOKENS).batch_of(range(3))
    found, wanted = (m.masked_nll(batch, batch.response_BL).nll_BL for m in (loaded, method))
    assert torch.equal(found, wanted)
    with pytest.raises(ContractError, match="block_size=4, but block_size=8"):
        Method.from_pretrained(tmp_path, Options(block_size=8), dtype=torch.float32, device="cpu")
    tiny_backbone().save_pretrained(tmp_path / "other")
    with pytest.raises(ContractError, match="block_size=4 was asked for"):
        Method.from_pretrained(tmp_path / "other", method.options, dtype=torch.float32, device="cpu")
    with pytest.raises(ContractError, match="attention='block_causal', but attention='bidirectional'"):
        Backbone.from_pretrained(tmp_path, expect={"attention": "bidirectional"})
