"""A causal language model that scores text others wrote. Prompt tokens are read, never scored.

A judge is not a likelihood: its perplexity may be lowered by dull text, so it is shown beside entropy and repetition,
never in one column with a bound (arXiv:2604.02718).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_core.backbone.backbone import Backbone
from dllm_core.errors import DllmError
from dllm_core.evals.estimates import SequenceSums

Ids = Sequence[int]


class Judge(ABC):
    """Scores continuations.

    Attributes:
        label: shown beside its figures, e.g. "base (self-judged)".
        batch_size: texts a forward pass.
    """

    label: str
    batch_size: int

    @abstractmethod
    def _pieces(self, prompt: Ids, continuation: Ids) -> tuple[list[int], list[bool]]:
        """Return the judge's own ids of the whole text and which of them belong to the continuation."""

    @abstractmethod
    def _logits(self, ids_BL: Tensor, row: int, states: Any) -> Tensor:
        """Return the fp32 logits of one row, [L, V]."""

    @abstractmethod
    def _states(self, ids_BL: Tensor) -> Any:
        """Run the network once for a batch of equally long texts."""

    @torch.no_grad()
    def score(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> SequenceSums:
        """Return the nats of each continuation given its prompt, and how many of the judge's tokens it has."""
        texts = [self._pieces(p, c) for p, c in zip(prompts, continuations, strict=True)]
        sums, tokens = [0.0] * len(texts), [0.0] * len(texts)
        by_length: dict[int, list[int]] = {}
        for i, (ids, _) in enumerate(texts):
            by_length.setdefault(len(ids), []).append(i)
        for members in by_length.values():
            for start in range(0, len(members), self.batch_size):
                chunk = members[start : start + self.batch_size]
                ids_BL = torch.tensor([texts[i][0] for i in chunk])
                states = self._states(ids_BL)
                for row, i in enumerate(chunk):
                    scored_L = torch.tensor(texts[i][1])[1:]  # a text's first token has no context
                    logits_LV = self._logits(ids_BL, row, states)[:-1].cpu()[scored_L]
                    nll = F.cross_entropy(logits_LV.float(), ids_BL[row, 1:][scored_L], reduction="sum")
                    sums[i], tokens[i] = float(nll), float(scored_L.sum())
        return SequenceSums(tuple(sums), tuple(tokens))


class BaseJudge(Judge):
    """The unconverted base model, run causally on the same token ids. It taught the aligned cells: self-judged."""

    def __init__(self, backbone: Backbone, *, batch_size: int = 8, label: str = "base (self-judged)") -> None:
        self.backbone, self.batch_size, self.label = backbone, batch_size, label

    def _pieces(self, prompt: Ids, continuation: Ids) -> tuple[list[int], list[bool]]:
        return [*prompt, *continuation], [False] * len(prompt) + [True] * len(continuation)

    def _states(self, ids_BL: Tensor) -> Tensor:
        return self.backbone.hidden(ids_BL.to(self.backbone.device), causal=True)

    def _logits(self, ids_BL: Tensor, row: int, states: Any) -> Tensor:
        return self.backbone.logits(states[row])


class TextJudge(Judge):
    """Another model with a tokenizer of its own: reads the decoded text, scores what lies after the prompt.

    Its perplexity is per token of its own vocabulary: comparable between rows, not between judges.
    """

    def __init__(self, model: Any, tokenizer: Any, writer_tokenizer: Any, *, label: str, batch_size: int = 8) -> None:
        if not tokenizer.is_fast:
            raise DllmError(f"The judge '{label}' has no fast tokenizer.", "Choose a judge that ships tokenizer.json.")
        self.model, self.tokenizer, self.writer = model, tokenizer, writer_tokenizer
        self.label, self.batch_size = label, batch_size

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        writer_tokenizer: Any,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        batch_size: int = 8,
        label: str | None = None,
    ) -> TextJudge:
        """Load a judge from a local directory."""
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype, trust_remote_code=False)
        return cls(
            model.eval().to(device), tokenizer, writer_tokenizer, label=label or str(source), batch_size=batch_size
        )

    def _pieces(self, prompt: Ids, continuation: Ids) -> tuple[list[int], list[bool]]:
        start = len(self.writer.decode(list(prompt)))
        text = self.writer.decode([*prompt, *continuation])
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        # a token that straddles the border shows the judge part of the continuation for free: it is not scored
        return encoded["input_ids"], [begin >= start for begin, _ in encoded["offset_mapping"]]

    def _states(self, ids_BL: Tensor) -> Any:
        return self.model(ids_BL.to(self.model.device), use_cache=False).logits

    def _logits(self, ids_BL: Tensor, row: int, states: Any) -> Tensor:
        logits: Tensor = states[row]
        return logits
