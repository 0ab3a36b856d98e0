"""The autoregressive competitors that need shapes and addresses to stay: on a CPU as far as they go without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import StaticCache

from benchmarks import ar_graph, ar_loops, decode_parts
from dllm_core.backbone.ar_decode import decode
from dllm_core.backbone.backbone import Backbone
from dllm_core.methods.protocol import SamplingRequest
from tests.tiny import NUM_TOKENS, tiny_backbone, tiny_model


def prompts(seed: int, batch: int = 2, length: int = 5) -> list[torch.Tensor]:
    return list(torch.randint(NUM_TOKENS, (batch, length), generator=torch.Generator().manual_seed(seed)))


def expected(backbone: Backbone, given: list[torch.Tensor], new: int) -> list[list[int]]:
    output = decode(backbone, given, SamplingRequest(max_new_tokens=new, num_steps=new))
    return [row.tolist() for row in output.sequences]


# -- one graph for a token --------------------------------------------------------------------------------------------


def test_a_step_of_fixed_shapes_gives_the_tokens_of_the_growing_one(family: str) -> None:
    """Without a graph; again with other prompts, lengths and batches, over what the last decode left behind."""
    backbone = tiny_backbone(family)
    loop = ar_graph.GraphLoop(17, capture=False)
    for seed, (batch, length, new) in enumerate([(2, 5, 12), (2, 5, 12), (1, 3, 14), (2, 9, 1), (2, 2, 7)]):
        given = prompts(seed, batch, length)
        found = loop(backbone, given, new)
        assert [row.tolist() for row in found.sequences] == expected(backbone, given, new)
        assert (found.new_tokens, found.num_forwards) == ([new] * batch, new)
        assert found.first_token_s > 0


def test_a_step_keeps_its_addresses() -> None:
    backbone = tiny_backbone("llama")
    step = ar_graph.StaticStep(backbone, 2, 12)
    places = []
    with torch.no_grad():
        for seed in range(2):
            step.begin(torch.stack(prompts(seed)))
            for _ in range(3):
                step()
                buffers = [layer.keys for layer in step.cache.layers] + [layer.values for layer in step.cache.layers]
                buffers += [step.at_1, step.ids_B1, step.tokens_BM]
                places.append([(b.data_ptr(), b.shape) for b in buffers])
    assert all(place == places[0] for place in places)
    assert step.at_1.item() == 8


def test_a_step_asks_the_host_for_nothing(family: str) -> None:
    """A value read back would be an error while a graph is captured: tensors without values show it here too."""
    backbone = tiny_backbone(family)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        step = ar_graph.StaticStep(backbone, 2, 12)
        step.begin(torch.zeros(2, 5, dtype=torch.long))
        step()
        with pytest.raises(DataDependentOutputException):
            step.at_1.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_gives_what_its_step_gives(family: str, dtype: torch.dtype) -> None:
    backbone = tiny_backbone(family).to("cuda", dtype)
    loops = [ar_graph.GraphLoop(17, capture=capture) for capture in (True, False)]
    for seed in range(3):
        given = prompts(seed)
        graph, plain = ([row.tolist() for row in loop(backbone, given, 12).sequences] for loop in loops)
        assert graph == plain


# -- a cache that compiled passes keep --------------------------------------------------------------------------------


def test_a_kept_cache_starts_anew_with_every_call() -> None:
    model = tiny_model("llama")
    addresses = set()

    def forward(**given: Any) -> Any:
        addresses.add(given["past_key_values"].layers[0].keys.data_ptr())
        return model(**given)

    cache = StaticCache(config=model.config, max_cache_len=17)
    for seed, new in enumerate((4, 12, 12)):
        found = ar_loops.static_cache(model, prompts(seed), new, forward, cache)
        growing = ar_loops.dynamic_cache(model, prompts(seed), new)
        assert all(torch.equal(a, b) for a, b in zip(found.sequences, growing.sequences, strict=True))
    assert len(addresses) == 1


def test_rows_for_gpus_are_timed_on_gpus_only() -> None:
    setting = decode_parts.Setting(5, 12, 1, 8)
    names = {
        (device, compiled): set(decode_parts._ar_rows(SimpleNamespace(device=device), setting, compiled=compiled))  # type: ignore[arg-type]
        for device in ("cpu", "cuda")
        for compiled in (False, True)
    }
    anywhere = {"ar", "ar_hf_generate", "ar_dynamic", "ar_static", "ar_slots"}
    assert names["cpu", False] == anywhere
    assert names["cpu", True] == anywhere | {"ar_static_compiled"}
    assert names["cuda", False] == anywhere | {"ar_graph"}
    assert names["cuda", True] == anywhere | {"ar_graph", "ar_static_compiled", "ar_static_reduce_overhead"}
