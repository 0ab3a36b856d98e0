"""Convert autoregressive language models into diffusion language models.

Importing this package is cheap: torch and transformers are loaded by the modules that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.methods.cell import load_cell
    from dllm_core.samplers.config import DiffusionGenerationConfig

__all__ = ["Backbone", "DiffusionGenerationConfig", "__version__", "load_cell"]

_LAZY = {
    "Backbone": "dllm_core.backbone.backbone",
    "DiffusionGenerationConfig": "dllm_core.samplers.config",
    "load_cell": "dllm_core.methods.cell",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dllm_core' has no attribute {name!r}")
