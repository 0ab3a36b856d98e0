"""The plain loop of benchmarks/ gives the tokens that ours gives, and the decode benchmark runs on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode, plain_loop
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.tiny import NUM_TOKENS, tiny_backbone, write_source


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("steps", [1, 4, 7, 40])
def test_same_tokens_in_fp32(family: str, steps: int, alignment: str) -> None:
    backbone = tiny_backbone(family, alignment=alignment)
    prompts = list(torch.randint(1, NUM_TOKENS, (3, 6)))
    config = DiffusionGenerationConfig(max_new_tokens=25, max_denoising_steps=steps, stop_at_eos=False)
    ours = generate(backbone, prompts, config)
    plain = plain_loop.generate(
        backbone.model,
        prompts,
        max_new_tokens=25,
        steps=steps,
        mask_token_id=backbone.contract.mask_token_id,
        num_tokens=NUM_TOKENS,
        shifted=alignment == "shifted",
    )
    assert ours.num_forwards == plain.num_forwards == min(steps, 25)
    for a, b in zip(ours.sequences, plain.sequences, strict=True):
        assert torch.equal(a, b)


def test_decode_benchmark_writes_a_complete_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "plain")
    arguments = ["--model", str(tmp_path / "plain"), "--workdir", str(tmp_path / "work"), "--device", "cpu"]
    arguments += ["--dtype", "fp32", "--new-tokens", "8", "--prompt-tokens", "4", "--steps", "2,4"]
    arguments += ["--batch-sizes", "1,2", "--rounds", "2", "--warmup", "0", "--out", str(tmp_path / "out.json")]
    assert decode.main(arguments) == 0
    assert "x plain" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "seed", "hardware", "date", "versions", "settings", "command"} <= set(record)
    assert record["gpu"] == "not measured"
    assert record["weights"] == "converted, untrained: speed only"
    assert str(tmp_path) not in json.dumps(record["settings"])
    assert [(r["batch_size"], r["steps"]) for r in record["cpu"]] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    for result in record["cpu"]:
        assert set(result["rows"]) == {"ours", "plain", "ar"}
        assert result["same_tokens_as_plain"] == {"ours": 1.0}
        assert result["rows"]["ours"]["num_forwards"] == result["steps"]
        assert result["rows"]["ar"]["num_forwards"] == 8
        assert {"rows", "ratio", "ci95", "verdict"} <= set(result["ratios"][0])


def test_a_missing_model_is_told_in_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["--model", str(tmp_path / "none"), "--workdir", str(tmp_path)]) == 2
    assert "no model directory" in capsys.readouterr().err
