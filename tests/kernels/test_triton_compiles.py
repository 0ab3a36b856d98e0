"""Every Triton kernel compiles for GPUs that are not here: the interpreter accepts what the compiler does not."""

from __future__ import annotations

import itertools

import pytest

from dllm_core.kernels.dispatch import interpreted

triton = pytest.importorskip("triton", reason="triton is not installed (make triton)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: nothing is compiled in this process"),
]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes that a block may use: A100, H100 and H200, RTX 5090."""


def build(
    kernel, target: int, types: dict[str, str], constants: dict, *, warps: int, stages: int = 3, even=(), ones=()
):  # type: ignore[no-untyped-def]
    """Compile a kernel as a launch would.

    Arguments named in `even` and all pointers are divisible by 16, as those of real heads are; those in `ones` are 1,
    which Triton compiles in.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert set(kernel.arg_names) == set(types) | set(constants)
    names = kernel.arg_names
    whole = [i for i, n in enumerate(names) if n in even or types.get(n, "").startswith("*")]
    constants = constants | dict.fromkeys(ones, 1)
    source = ASTSource(
        kernel,
        {n: "constexpr" if n in constants else types[n] for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in whole},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


@pytest.mark.parametrize("rows", [1, 32, 64, 512])
@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_partial_stats(target: int, dtype: str, size: int, rows: int) -> None:
    from dllm_core.kernels.token_stats import triton as kernels

    tile = kernels.tiling(rows, size, SHARED_MEMORY[target])
    types = dict.fromkeys(("hidden", "weight"), f"*{dtype}")
    types |= {"blocked": "*u8", "partial": "*fp32", "partial_at": "*i32"}
    whole_numbers = ("num_rows", "num_columns", "depth", "hidden_stride", "weight_stride", "tiles_per_split")
    types |= dict.fromkeys(whole_numbers, "i32")
    constants = {"HAS_BLOCKED": True, "SECOND": True, "ENTROPY": True, "PRECISION": "ieee", "WIDEN": False}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_V": tile.ids, "BLOCK_D": tile.depth}
    even = ("depth", "hidden_stride", "weight_stride")
    made = build(kernels._partial_stats, target, types, constants, warps=tile.warps, stages=tile.stages, even=even)
    assert made.metadata.shared <= SHARED_MEMORY[target]
    instruction = "mma.sync" if target != 90 or rows < 64 else "wgmma"
    assert (instruction in made.asm["ptx"]) == (dtype == "bf16")
    assert "cp.async.cg.shared.global" in made.asm["ptx"], "16 bytes a copy"


def test_partial_stats_of_one_row_and_of_one_of_everything() -> None:
    from dllm_core.kernels.token_stats import triton as kernels

    types = {"hidden": "*fp32", "weight": "*fp32", "blocked": "*u8", "partial": "*fp32", "partial_at": "*i32"}
    whole_numbers = ("num_rows", "num_columns", "depth", "hidden_stride", "weight_stride", "tiles_per_split")
    types |= dict.fromkeys(whole_numbers, "i32")
    constants = {"HAS_BLOCKED": False, "SECOND": False, "ENTROPY": False, "PRECISION": "tf32", "WIDEN": False}
    constants |= {"BLOCK_M": 16, "BLOCK_V": 64, "BLOCK_D": 64}
    for ones in (("num_rows", "tiles_per_split"), whole_numbers):
        assert build(kernels._partial_stats, 90, types, constants, warps=4, ones=ones).asm["ptx"]


@pytest.mark.parametrize("asked", itertools.product([False, True], repeat=2), ids=str)
def test_merged_stats(asked: tuple[bool, bool]) -> None:
    from dllm_core.kernels.token_stats import triton as kernels

    types = {"partial": "*fp32", "partial_at": "*i32", "argmax": "*i64", "out": "*fp32"}
    types |= {"num_rows": "i32", "num_splits": "i32"}
    constants = {"SECOND": asked[0], "ENTROPY": asked[1]}
    for splits, ones in ((2048, ()), (512, ("num_rows",)), (1, ("num_rows", "num_splits"))):
        made = build(kernels._merged_stats, 90, types, constants | {"BLOCK_S": splits}, warps=4, ones=ones)
        assert made.asm["ptx"]


@pytest.mark.parametrize("options", itertools.product([False, True], repeat=3), ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_row_losses(dtype: str, options: tuple[bool, bool, bool]) -> None:
    from dllm_core.kernels.masked_ce import triton as kernels

    types = {"logits": f"*{dtype}", "blocked": "*u8", "targets": "*i64", "weights": "*fp32", "parts": "*fp32"}
    types |= dict.fromkeys(("num_columns", "weights_stride", "parts_stride"), "i32") | {"inverse_temperature": "fp32"}
    constants = dict(zip(("HAS_BLOCKED", "ENTROPY", "GRADIENT"), options, strict=True)) | {"BLOCK": kernels._BLOCK}
    made = build(kernels._row_losses, 90, types, constants, warps=kernels._WARPS, even=("num_columns",))
    wide = "ld.global.v4"
    assert wide in made.asm["ptx"], "16 bytes a load"
    whole_numbers = ("num_columns", "weights_stride", "parts_stride")
    assert build(kernels._row_losses, 90, types, constants, warps=kernels._WARPS, ones=whole_numbers).asm["ptx"]
