"""Fixtures for every test: no network, fixed seeds, tiny models."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# `tests.tiny` and the packages of the repository, however pytest was started
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# tiny tensors: a second thread gains nothing, and on a busy machine every parallel region waits for it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

FAMILY_NAMES = ("llama", "qwen2", "qwen3", "gpt2")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed torch before each test that runs with torch loaded (never load it for tests that do without)."""
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported model family in turn."""
    return str(request.param)


@pytest.fixture
def build_tiny() -> Callable[..., Backbone]:
    """Return `tests.tiny.tiny_backbone`, the builder of tiny random models."""
    from tests.tiny import tiny_backbone

    return tiny_backbone


@pytest.fixture
def tiny_backbone(build_tiny: Callable[..., Backbone]) -> Backbone:
    """Return a 2-layer llama of hidden size 32 with 97 real tokens (mask id 97, 128 rows)."""
    return build_tiny("llama")


@pytest.fixture(scope="session")
def tiny_source_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a plain (unconverted) tiny llama and its tokenizer."""
    from tests.tiny import write_source

    return write_source(tmp_path_factory.mktemp("tiny") / "source", "llama")
