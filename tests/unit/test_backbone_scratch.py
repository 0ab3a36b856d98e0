"""Models made from nothing: tokenizer, weights, a short pretraining."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_core.backbone.conversion import convert
from dllm_core.backbone.identity import model_identity, tokenizer_identity
from dllm_core.backbone.scratch import ARCHITECTURES, build_scratch, pretrain_scratch, train_tokenizer
from dllm_core.errors import DataError
from tests.tiny import TEXT

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48}


def batches(directory: Path, steps: int) -> list[torch.Tensor]:
    ids = AutoTokenizer.from_pretrained(directory)(TEXT * 3, return_tensors="pt").input_ids[0]
    gen = torch.Generator().manual_seed(0)
    return [
        torch.stack([ids[s : s + 24] for s in torch.randint(0, len(ids) - 24, (4,), generator=gen).tolist()])
        for _ in range(steps)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_made_trained_and_converted(architecture: str, tmp_path: Path) -> None:
    source = tmp_path / "plain"
    num_tokens = train_tokenizer([TEXT] * 4, 300, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert num_tokens == len(tokenizer) == 300
    assert tokenizer.eos_token_id == 0
    for text in (TEXT, "naïve — 東京 <mask>\t\x00", "<|endoftext|"):
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text
    build_scratch({**SHAPE, "architecture": architecture}, num_tokens, source, seed=0)
    first: list[float] = []
    final = pretrain_scratch(source, batches(source, 40), 40, 1e-2, on_step=lambda i, n, loss: first.append(loss))
    assert len(first) == 40
    assert first[0] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.5)
    assert final < first[0] - 1.5
    ids = batches(source, 1)[0]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(source)(ids, labels=ids).loss
    assert theirs < first[0] - 1.5, "what was saved is what was trained"
    assert convert(source, tmp_path / "out", alignment="shifted").mask_token_id == 300


def test_same_seed_same_model(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        num_tokens = train_tokenizer([TEXT] * 4, 300, tmp_path / name)
        build_scratch({**SHAPE, "architecture": "llama"}, num_tokens, tmp_path / name, seed=seed)
        pretrain_scratch(tmp_path / name, batches(tmp_path / name, 3), 3, 1e-2)
    assert model_identity(tmp_path / "a") == model_identity(tmp_path / "b") != model_identity(tmp_path / "c")
    assert tokenizer_identity(tmp_path / "a") == tokenizer_identity(tmp_path / "b")


def test_little_text_gives_fewer_tokens(tmp_path: Path) -> None:
    assert 257 <= train_tokenizer(["ab ab"], 4096, tmp_path) < 300


def test_too_few_batches(tmp_path: Path) -> None:
    num_tokens = train_tokenizer([TEXT], 300, tmp_path)
    build_scratch({**SHAPE, "architecture": "llama"}, num_tokens, tmp_path, seed=0)
    before = model_identity(tmp_path)
    with pytest.raises(DataError, match="2 batches"):
        pretrain_scratch(tmp_path, batches(tmp_path, 2), 5, 1e-2)
    assert model_identity(tmp_path) == before
