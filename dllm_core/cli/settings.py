"""What was asked for on the command line, as each kind of cell takes it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dllm_core.cli.cells import Cell, Kind
from dllm_core.errors import DllmError
from dllm_core.samplers.checks import require_positive
from dllm_core.samplers.config import DiffusionGenerationConfig

_ALL: frozenset[Kind] = frozenset({"ar", "unmasking", "latent"})
_PARALLEL: frozenset[Kind] = frozenset({"unmasking", "latent"})
_MASKS: frozenset[Kind] = frozenset({"unmasking"})
_KIND_WRITES: dict[Kind, str] = {
    "ar": "writes token by token",
    "unmasking": "fills in masks",
    "latent": "writes from latents",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A flag of the command line.

    Attributes:
        flag: as it is typed.
        field: of `DiffusionGenerationConfig`; where it sets the acceptance rule, "sampler_config".
        kinds: of the cells that have it.
        type: turns what was typed into a value; None for a flag that stands alone.
        help: one line.
    """

    flag: str
    field: str
    kinds: frozenset[Kind]
    type: type | None
    help: str

    @property
    def name(self) -> str:
        """What the parsed arguments call it."""
        return self.flag.removeprefix("--").replace("-", "_")


SETTINGS = (
    Setting(flag="--new-tokens", field="max_new_tokens", kinds=_ALL, type=int, help="tokens to write (64)"),
    Setting(flag="--steps", field="max_denoising_steps", kinds=_PARALLEL, type=int, help="denoising steps (16)"),
    Setting(flag="--temperature", field="temperature", kinds=_ALL, type=float, help="0 is greedy (0.7)"),
    Setting(
        flag="--top-p", field="top_p", kinds=_PARALLEL, type=float, help="draw from the likeliest tokens of this mass"
    ),
    Setting(flag="--top-k", field="top_k", kinds=_PARALLEL, type=int, help="draw from so many tokens"),
    Setting(flag="--seed", field="seed", kinds=_ALL, type=int, help="keys the noise (0)"),
    Setting(flag="--keep-going", field="stop_at_eos", kinds=_ALL, type=None, help="do not stop at the end of the text"),
    Setting(
        flag="--guidance",
        field="guidance_scale",
        kinds=_PARALLEL,
        type=float,
        help="scale of classifier-free guidance (1; a latent cell's own)",
    ),
    Setting(
        flag="--rule",
        field="sampler_config",
        kinds=_MASKS,
        type=str,
        help="which drafts stand: confidence (default), margin, entropy, random, p2, threshold, factor, entropy_bound, "
        "entropy_threshold",
    ),
    Setting(
        flag="--threshold",
        field="sampler_config",
        kinds=_MASKS,
        type=float,
        help="of the rule threshold, which it implies",
    ),
    Setting(
        flag="--orders",
        field="sampler_config",
        kinds=_MASKS,
        type=str,
        help="of the rule threshold: one for each place of a --block, from the commit orders in this directory "
        "(runs/cache/trajectories)",
    ),
    Setting(flag="--factor", field="sampler_config", kinds=_MASKS, type=float, help="of the rule factor"),
    Setting(flag="--entropy-bound", field="sampler_config", kinds=_MASKS, type=float, help="of that rule, in nats"),
    Setting(flag="--entropy-threshold", field="sampler_config", kinds=_MASKS, type=float, help="of that rule, in nats"),
    Setting(
        flag="--block", field="block_size", kinds=_MASKS, type=int, help="tokens per block, left to right (one block)"
    ),
    Setting(
        flag="--multi-block",
        field="multi_block",
        kinds=_MASKS,
        type=float,
        help="begin a block once this share of the one before stands; with --block, and a rule that goes by scores",
    ),
    Setting(
        flag="--cache",
        field="cache",
        kinds=_MASKS,
        type=str,
        help="keys and values kept: none, prefix, dual, delayed; exact is what block-causal cells have of themselves",
    ),
    Setting(
        flag="--stability",
        field="stability_threshold",
        kinds=_MASKS,
        type=int,
        help="accept all drafts that stay the same for so many passes",
    ),
    Setting(
        flag="--verify",
        field="verify",
        kinds=_MASKS,
        type=None,
        help="run the reference decoder beside and compare every pass",
    ),
    Setting(
        flag="--drift",
        field="measure_drift",
        kinds=_MASKS,
        type=None,
        help="make a full pass beside every one with an approximate cache, and tell how far they are apart",
    ),
)
"""All flags that say how text is generated."""

_RULES_WITH_A_NUMBER = ("threshold", "factor", "entropy_bound", "entropy_threshold")
_DEFAULTS = {"new_tokens": 64, "steps": 16, "temperature": 0.7, "seed": 0}


@dataclass(frozen=True)
class Request:
    """How one cell is asked to generate.

    Attributes:
        config: for its `generate`.
        arguments: more arguments of that.
        left_out: flags that were given and that this cell does not have.
    """

    config: DiffusionGenerationConfig
    arguments: dict[str, Any]
    left_out: tuple[str, ...] = ()


class Settings:
    """The flags that were given.

    Args:
        given: `Setting.name` -> value; None and False are flags that were not given.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = {s.name: v for s in SETTINGS if (v := given.get(s.name)) is not None and v is not False}

    def request(self, cell: Cell, accepted: Iterable[str], *, leave_out: bool = False) -> Request:
        """Return the request to a cell.

        Args:
            cell: which is asked.
            accepted: names of the arguments that its `generate` takes.
            leave_out: go without the flags that the cell does not have, instead of refusing them.

        Raises:
            DllmError: a flag that the cell does not have, or a value out of range.
        """
        foreign = [s for s in SETTINGS if s.name in self.given and not _has(cell, s, set(accepted))]
        if foreign and not leave_out:
            raise DllmError(
                f"'{cell.name}' {_KIND_WRITES[cell.kind]} and has no {foreign[0].flag}.",
                f"Leave {foreign[0].flag} out, or take a cell that {_KIND_WRITES['unmasking']}.",
            )
        values = _DEFAULTS | {n: v for n, v in self.given.items() if n not in {s.name for s in foreign}}
        arguments = {}
        if cell.kind == "latent" and "guidance" in values:
            arguments["guidance"] = values.pop("guidance")
        try:
            config = DiffusionGenerationConfig(**_fields(cell, values))
        except DllmError as error:
            raise in_flags(error) from error
        return Request(config, arguments, tuple(s.flag for s in foreign))


def in_flags(error: DllmError) -> DllmError:
    """Return an error of the library in the words of the command line: `--steps` for `max_denoising_steps`."""
    words = {s.field: s.flag for s in SETTINGS if s.field != "sampler_config"}
    words |= {name: f"--{name.replace('_', '-')}" for name in _RULES_WITH_A_NUMBER}
    words |= {"block_add_threshold": words["multi_block"], "runtime.device": "--device"}
    # names that are words of their own, or of a rule too, are meant only where a value follows
    plain = [name for name in words if "_" not in name or name in _RULES_WITH_A_NUMBER]
    unmistakable = [name for name in words if name not in plain]
    pattern = re.compile(rf"\b(?:({'|'.join(unmistakable)})\b|({'|'.join(plain)})(?==))")

    def told(line: str) -> str:
        return pattern.sub(lambda found: words[found[0]], line)

    return DllmError(told(error.problem), told(error.remedy))


def _has(cell: Cell, setting: Setting, accepted: set[str]) -> bool:
    if setting.name == "guidance" and cell.kind == "latent":
        return "guidance" in accepted
    return cell.kind in setting.kinds


def _fields(cell: Cell, values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config."""
    fields = {s.field: values[s.name] for s in SETTINGS if s.name in values and s.field != "sampler_config"}
    if "keep_going" in values:
        fields["stop_at_eos"] = False
    if "multi_block" in values:
        if "block" not in values and not cell.capabilities.exact_cache:
            raise DllmError("--multi-block lets blocks overlap, and there is one alone.", "Give --block too.")
        fields["multi_block"] = {"block_add_threshold": values["multi_block"]}
    if cell.kind == "unmasking":
        fields["sampler_config"] = _rule(values)
        if cell.capabilities.exact_cache:
            fields.setdefault("cache", "exact")
    return fields


def _rule(values: dict[str, Any]) -> dict[str, Any]:
    """Return the acceptance rule: by name, or by the number that belongs to one rule alone."""
    numbers = {name: values[name] for name in _RULES_WITH_A_NUMBER if name in values}
    if "orders" in values:
        numbers["threshold"] = _thresholds_by_place(values)
    rule = values.get("rule") or next(iter(numbers), "confidence")
    for name in numbers:
        if name != rule:
            raise DllmError(
                f"--{name.replace('_', '-')} belongs to the rule '{name}', not to '{rule}'.", "Give one of them."
            )
    return {"name": rule, **numbers}


def _thresholds_by_place(values: dict[str, Any]) -> tuple[float, ...]:
    from dllm_core.samplers.trajectory_thresholds import stored_thresholds

    if "threshold" in values:
        raise DllmError("--threshold and --orders both say how sure a token has to be.", "Give one of them.")
    if "block" not in values:
        raise DllmError("--orders gives a threshold for each place of a block, and there is no --block.", "Give both.")
    require_positive("block_size", values["block"])
    return stored_thresholds(values["orders"], values["block"])
