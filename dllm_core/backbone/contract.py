"""What a converted checkpoint promises. Written into its config and checked at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from dllm_core.errors import ContractError

Alignment = Literal["shifted", "same_position"]
Attention = Literal["bidirectional", "block_causal"]


class Contract(BaseModel):
    """Seven points on which peers silently disagree, made explicit.

    Attributes:
        alignment: `shifted` - the hidden state at i-1 predicts token i (as in the AR model); `same_position` - at i.
        mask_token_id: id of the mask token; never an id the tokenizer already uses.
        num_tokens: ids 0..num_tokens-1 are real tokens; mask and padding rows above get logit -inf.
        block_size: training block in tokens for block-trained models, else None.
        attention: `bidirectional` - every token sees the whole sequence; `block_causal` - its own block and earlier
            ones, blocks of `block_size` tokens counted from the beginning of the document.
        weighting: how token losses are weighted ("mean_masked": mean CE over masked tokens of a sequence;
            "block_bound": n / k times the CE of a block of n tokens with k masked).
        normaliser: what the loss is averaged over ("sequence_then_batch").
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alignment: Alignment = "shifted"
    mask_token_id: int
    num_tokens: int
    block_size: PositiveInt | None = None
    attention: Attention = "bidirectional"
    weighting: str = "mean_masked"
    normaliser: str = "sequence_then_batch"

    @model_validator(mode="after")
    def _blocks_have_a_size(self) -> Self:
        if self.attention == "block_causal" and self.block_size is None:
            raise ValueError("attention: block_causal needs a block_size")
        return self

    def require(self, **expected: Any) -> None:
        """Raise if a field differs from what the caller relies on.

        Raises:
            ContractError: naming the field and both values.
        """
        for name, value in expected.items():
            found = getattr(self, name)
            if found != value:
                raise ContractError(
                    f"The checkpoint was made with {name}={found!r}, but {name}={value!r} was asked for.",
                    "Load it with its own settings, or convert the base model again.",
                )

    def require_rows(self, rows: int) -> None:
        """Raise unless the mask token has a row of its own in an embedding of `rows` rows.

        Raises:
            ContractError: the mask token is a real token, or beyond the last row.
        """
        if not self.num_tokens <= self.mask_token_id < rows:
            raise ContractError(
                f"The contract's mask token id {self.mask_token_id} is not among the rows "
                f"{self.num_tokens}..{rows - 1} above the real tokens.",
                "Convert the base model again.",
            )


def read_contract(directory: Path | str) -> Contract:
    """Read the contract of a converted checkpoint without loading its weights.

    Raises:
        ContractError: there is none, or it is not understood.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContractError(
            f"'{directory}' holds no readable config.json.", "Give the directory of a converted checkpoint."
        ) from error
    if "dllm" not in config:
        raise ContractError(
            f"'{directory}' is a plain causal model: its config.json has no 'dllm' contract.",
            "Convert it first (dllm_core.backbone.conversion.convert).",
        )
    try:
        return Contract(**config["dllm"])
    except (TypeError, ValueError) as error:
        raise ContractError(
            f"The contract in '{path}' is not understood: {config['dllm']!r}.",
            "It was written by another version; convert the base model again.",
        ) from error
