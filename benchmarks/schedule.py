"""Tokens per step and network passes (NFE) of any decoding setting, as the engine makes them.

    python benchmarks/schedule.py --new-tokens 128 --steps 32
    python benchmarks/schedule.py --steps 32 --block-size 32 --cache dual --prompt-tokens 32,20
    python benchmarks/schedule.py --steps 64 --rule threshold=0.8 --model DIR --prompt "My fellow citizens,"
    python benchmarks/schedule.py --config '{"sampler_config": "p2", "guidance_scale": 2}'

Without a model it shows rules whose counts are known beforehand, for a text that does not end early. Rules that go by
scores (threshold, factor, entropy_bound, entropy_threshold), stability stops and early ends need `--model`; what is
shown then happened on that prompt. Passes that do the same one after the other share a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dllm_core import hardware
from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.samplers import inspection
from dllm_core.samplers.checks import require_positive
from dllm_core.samplers.config import DiffusionGenerationConfig


def rule_of(text: str) -> str | dict[str, Any]:
    """Return the rule that `confidence` or `threshold=0.8` names: a rule's own figure bears its name."""
    name, _, value = text.partition("=")
    if not value:
        return name
    try:
        return {"name": name, name: float(value)}
    except ValueError:
        raise DllmError(f"'{value}' in '{text}' is not a number.", f"Write for example {name}=0.8.") from None


def integers(text: str) -> list[int]:
    """Return the numbers of a list such as `4,8,16`."""
    return [int(part) for part in text.split(",")]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rule", default="confidence", help="a word, or with its figure: threshold=0.8")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--multi-block", help="thresholds of the pipeline, BLOCK_ADD,DECODED_TOKEN: 0.1,0.95")
    parser.add_argument("--cache", default="none", help="none, prefix, dual, delayed or exact")
    parser.add_argument("--refresh-every", type=int, help="of an approximate cache")
    parser.add_argument("--config", default="{}", help="further settings of DiffusionGenerationConfig, as JSON")
    parser.add_argument("--prompt-tokens", type=integers, default=[32], help="one length a row of the batch")
    parser.add_argument("--alignment", choices=["shifted", "same_position"], default="shifted", help="without a model")
    parser.add_argument("--model-block", type=int, help="block size of a block-causal model; without a model")
    parser.add_argument("--model", help="converted checkpoint to decode with")
    parser.add_argument("--prompt", action="append", help="text for the model, once a row; default: random tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every-pass", action="store_true", help="a line for every pass")
    return parser.parse_args(argv)


def config_of(args: argparse.Namespace) -> DiffusionGenerationConfig:
    """Return the settings that the command line describes.

    Raises:
        DllmError: an unknown setting, or one that is out of range.
    """
    settings: dict[str, Any] = {
        "max_new_tokens": args.new_tokens,
        "max_denoising_steps": args.steps,
        "sampler_config": rule_of(args.rule),
        "block_size": args.block_size,
        "cache": {"kind": args.cache, "refresh_every": args.refresh_every},
    }
    try:
        if args.multi_block:
            added, decoded = map(float, args.multi_block.split(","))
            settings["multi_block"] = {"block_add_threshold": added, "decoded_token_threshold": decoded}
        more = json.loads(args.config)
    except ValueError as error:
        raise DllmError(f"--multi-block or --config cannot be read: {error}.", "Write 0.1,0.95 and JSON.") from error
    if not isinstance(more, dict):
        raise DllmError(f"--config {args.config} names no settings.", 'Write JSON such as {"temperature": 0.7}.')
    return DiffusionGenerationConfig.from_dict({**settings, **more})


def inspect(args: argparse.Namespace) -> inspection.Inspection:
    """Return what the settings do: on the model where there is one, else what is known without.

    Raises:
        DllmError: settings that cannot be decoded, or whose passes depend on a model that is not there.
    """
    config = config_of(args)
    if args.model is None:
        if args.prompt:
            raise DllmError("A prompt says nothing without a model.", "Give --model DIR, or --prompt-tokens N.")
        if args.model_block is not None:
            require_positive("--model-block", args.model_block)
        return inspection.planned(config, args.prompt_tokens, alignment=args.alignment, model_block=args.model_block)
    from dllm_core.backbone.backbone import Backbone

    backbone = Backbone.from_pretrained(args.model, device=hardware.device(args.device))
    if args.prompt:
        prompts = tokenised(args.model, args.prompt)
    else:
        high, noise = backbone.contract.num_tokens, NoiseSource(config.seed)
        draws = [(n, noise.generator(row, 0, "benchmark prompt")) for row, n in enumerate(args.prompt_tokens)]
        prompts = [torch.randint(high, (n,), generator=g) for n, g in draws]
    return inspection.watched(backbone, prompts, config)


def tokenised(directory: str, texts: Sequence[str]) -> list[Tensor]:
    """Return the ids of prompts, by the checkpoint's own tokenizer."""
    from dllm_core.methods.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(directory))
    return [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    args = arguments(argv)
    try:
        print(inspect(args).table(every_pass=args.every_pass))
    except DllmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
