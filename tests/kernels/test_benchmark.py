"""The kernel benchmark runs on a CPU, without pydantic, and says what it did not measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_runs_without_pydantic_and_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    options = ["--quick", "--device", "cpu", "--rounds", "2", "--implementations", "reference", "triton"]
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from benchmarks import kernels\n"
        f"sys.exit(kernels.main([*{options!r}, '--out', {str(out)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bf16: token_stats runs reference (DLLM_KERNELS=auto: the tensors are on cpu)" in done.stdout
    record = json.loads(out.read_text())
    assert record["gpu"] == "not measured"
    assert len(record["cpu"]) == 6
    for row in record["cpu"]:
        found = row["implementations"]
        assert found["triton"] == "not measured: the tensors are on cpu"
        ours = found["reference"]
        assert ours["difference"] == 0
        assert ours["gb_per_s"] * ours["ms"] == pytest.approx(row["bytes"] / 1e6)
        assert ours["tflop_per_s"] * ours["ms"] == pytest.approx(row["flops"] / 1e9)
        assert ours["share_of_roofline"] * ours["ms"] == pytest.approx(row["floor_ms"])
    stats = next(r for r in record["cpu"] if r["operation"] == "token_stats" and r["dtype"] == "bf16")
    assert stats["flops"] == 2 * 3 * 16 * 301
    assert stats["bytes"] == 2 * (3 + 301) * 16 + 3 * (8 + 3 * 4)


def test_plain_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile is timed on is the operation itself; a stray implementation is noticed."""
    from benchmarks import kernels

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    for name, build in kernels.CASES.items():
        torch.manual_seed(0)
        case = build(torch.randn(7, 16), torch.randn(101, 16))
        outputs = []
        for implementation in ("reference", "compiled"):
            case.prepare()
            outputs.append([x.detach().clone() for x in case.calls[implementation]()])
        assert kernels.difference(outputs[1], outputs[0]) < 1e-5, name
        assert kernels.difference([x + 1 for x in outputs[1]], outputs[0]) > 1e-3
    assert kernels.difference([torch.tensor(torch.nan)], [torch.ones(())]) == float("inf")


def test_ratios_are_paired_and_absent_where_nothing_was_measured() -> None:
    from benchmarks import kernels

    class Turns(kernels.Clock):
        """The machine slows down from call to call; one implementation takes half as long whenever it comes."""

        def __init__(self) -> None:
            super().__init__(torch.device("cpu"))
            self.now = 1.0

        def seconds(self, case: kernels.Case, name: str) -> float:
            self.now *= 1.1
            return self.now * (0.5 if name == "compiled" else 1.0)

    def call() -> list[torch.Tensor]:
        return [torch.ones(2)]

    case = kernels.Case(1e9, 1e12, dict.fromkeys(kernels.IMPLEMENTATIONS, call))
    args = kernels.arguments(["--device", "cpu", "--rounds", "8"])
    result = kernels.measure(case, args, "fp32", Turns(), {"gb_per_s": 10.0, "tflop_per_s": 1.0})
    (found,) = result["ratios"]
    assert found["rows"] == ["compiled", "reference"]
    assert found["ratio"] == pytest.approx(2.0, rel=0.02), "turns change places every round"
    assert found["ci95"][0] < 2.0 < found["ci95"][1]
    assert found["verdict"] == "faster"
    line = kernels.table([{"operation": "o", "shape": "s", "rows": 1, "dtype": "fp32", **result}]).splitlines()[2]
    assert line.endswith(f"2.00x ({found['ci95'][0]:.2f} to {found['ci95'][1]:.2f})")
    alone = kernels.arguments(["--device", "cpu", "--rounds", "8", "--implementations", "reference", "triton"])
    assert kernels.measure(case, alone, "fp32", Turns(), {"gb_per_s": 10.0, "tflop_per_s": 1.0})["ratios"] == []
