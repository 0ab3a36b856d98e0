"""Memory of training each row at several model sizes, as the dry run estimates it; nothing is run or downloaded.

Below the table: what decoding on a CPU adds to a row's weights.

    python benchmarks/memory_estimates.py                     # print the table of docs/hardware.md
    python benchmarks/memory_estimates.py --write             # put it there

The numbers are those of `python flows/compare_grid.py run --dry-run`: 18 bytes a trained parameter in bf16, activations
of one micro-batch, the chunked logits and the process. SmolLM2-135M as in the laptop preset, the others as in
qwen3_1_7b (micro-batches of one sequence, activations recomputed).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from steps.estimates import MemoryEstimate, ModelShape

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hardware.md"
START, END = "<!-- memory estimates -->", "<!-- /memory estimates -->"
LARGE_SHAPES = ("cells.ldlm.options.shape=qwen3_1_7b", "cells.cola.options.shape=qwen3_1_7b")


def models() -> dict[str, tuple[ModelShape, str]]:
    """Return name -> (sizes, preset); those of Qwen3-8B are of its published config.json."""
    from params.schema import ModelSpec
    from steps.check_model import check_model

    def known(source: str) -> ModelShape:
        return check_model(ModelSpec(source=source), dry_run=True).shape

    large = known("Qwen/Qwen3-1.7B")
    return {
        "SmolLM2-135M": (known("HuggingFaceTB/SmolLM2-135M"), "laptop"),
        "Qwen3-0.6B": (known("Qwen/Qwen3-0.6B"), "qwen3_1_7b"),
        "Qwen3-1.7B": (large, "qwen3_1_7b"),
        "Qwen3-8B": (replace(large, layers=36, hidden=4_096, heads=32, ffn=12_288, tied=False), "qwen3_1_7b"),
    }


def estimates(shape: ModelShape, preset: str) -> dict[str, MemoryEstimate]:
    """Return cell -> memory at the peak of training it (of measuring it, where it is not trained)."""
    import params
    from steps.machine import Machine
    from steps.plan_rows import plan_rows
    from steps.row_costs import row_memory

    machine = Machine(
        device="cuda",
        name="any with bf16",
        cores=1,
        native_bf16=True,
        memory_total=0.0,
        memory_free=0.0,
        flops_bf16=1.0,
        flops_fp32=1.0,
        bytes_per_s=1.0,
        overhead_s=0.0,
    )
    overrides = [] if preset == "laptop" else [",".join(LARGE_SHAPES)]
    usual = [cell.name for cell in params.load("laptop").cells]
    cells = [*usual, *(name for name in params.cell_names() if name not in usual)]
    spec = params.load(preset, cells=cells, overrides=overrides)
    rows, _ = plan_rows(spec, shape.layers)
    return {row.cell: row_memory(spec, row, shape, machine) for row in rows}


def table() -> str:
    """Return the table: one line a cell, one column a model, GB and the smallest common GPU."""
    columns = {name: estimates(*of) for name, of in models().items()}
    names = [f"{name} ({shape.parameters / 1e9:.2f} B)" for name, (shape, _) in models().items()]
    lines = ["| cell | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for cell in next(iter(columns.values())):
        found = [column[cell] for column in columns.values()]
        sizes = [f"{m.smallest_gpu_gb()} GB" if m.smallest_gpu_gb() else "none" for m in found]
        cells = (f"{m.total / 1e9:.1f} ({size})" for m, size in zip(found, sizes, strict=True))
        lines.append(f"| `{cell}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def copies() -> str:
    """Return a sentence on the matrices that decoding on a CPU keeps a second time, in bf16."""
    from dllm_core.backbone.families import FAMILIES
    from steps.estimates import LARGEST_COPY, laid_out_bytes

    sizes = {name: laid_out_bytes(shape, "cpu", "bf16") for name, (shape, _) in models().items()}
    told = ", ".join(f"{size / 1e9:.2f} GB ({name})" for name, size in sizes.items() if size)
    none = ", ".join(name for name, size in sizes.items() if not size)
    families = ", ".join(name for name, family in FAMILIES.items() if family.is_gated)
    return (
        f"Rows that write token by token or unmask on a CPU ({families}) keep the matrices of the model a second time "
        f"from\nthe first decode on, up to {LARGEST_COPY / 2**30:g} GiB: in bf16 {told}; {none}: none."
    )


def text() -> str:
    """Return what stands between the markers of the page."""
    return f"{table()}\n\n{copies()}"


def rewritten(page: str, new: str) -> str:
    """Return the page with the table between its markers replaced."""
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}\n\n{new}\n\n{END}", page, flags=re.DOTALL)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite docs/hardware.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print table and sentence, or put them on the page; return the exit status."""
    found = text()
    if arguments(argv).write:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
