"""What latent rooms keep of the language model: embedding table, a few facts, contract. V vocabulary, D hidden."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.backbone.contract import Contract, read_contract
from dllm_core.backbone.embedding_table import read_embedding
from dllm_core.methods.requirements import BaseShape

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


@dataclass(frozen=True)
class Base:
    """The converted checkpoint as a room without a backbone sees it.

    Attributes:
        contract: of the checkpoint.
        num_layers: of the language model.
        eos_token_ids: ids that end a text.
        embedding_VD: rows of the real tokens, fp32 or as stored; None where the weights are loaded afterwards.
        hidden: D.
        directory: where the language model lies; None if it is not needed or not known.
    """

    contract: Contract
    num_layers: int
    eos_token_ids: tuple[int, ...]
    hidden: int
    embedding_VD: Tensor | None = None
    directory: Path | None = None

    @property
    def shape(self) -> BaseShape:
        """Return the numbers that sizes follow from; here the vocabulary counts real tokens alone."""
        return BaseShape(hidden=self.hidden, layers=self.num_layers, vocab=self.contract.num_tokens, parameters=0)

    def unit_embeddings(self) -> nn.Parameter:
        """Return the embeddings at unit length as a frozen parameter [V, D]; zeros where none were read."""
        if self.embedding_VD is None:
            return nn.Parameter(torch.zeros(self.contract.num_tokens, self.hidden), requires_grad=False)
        return nn.Parameter(F.normalize(self.embedding_VD, dim=1), requires_grad=False)

    @classmethod
    def read(cls, directory: Path | str) -> Base:
        """Read a converted checkpoint without building the model.

        Raises:
            ContractError: not a converted checkpoint.
            UnsupportedModelError: no readable embeddings.
        """
        contract = read_contract(directory)
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        table_VD = read_embedding(directory)[: contract.num_tokens].float()
        return cls(
            contract=contract,
            num_layers=int(config.get("num_hidden_layers") or config["n_layer"]),
            eos_token_ids=_ids(config.get("eos_token_id")),
            hidden=table_VD.shape[1],
            embedding_VD=table_VD,
            directory=Path(directory),
        )

    @classmethod
    def of(cls, backbone: Backbone) -> Base:
        """Take the same from a model in memory."""
        table_VD = backbone.embedding_weight_VD.detach()[: backbone.contract.num_tokens].float().clone()
        return cls(
            contract=backbone.contract,
            num_layers=backbone.num_layers,
            eos_token_ids=backbone.eos_token_ids,
            hidden=backbone.hidden_size,
            embedding_VD=table_VD,
        )


def _ids(eos: Any) -> tuple[int, ...]:
    return () if eos is None else tuple(int(i) for i in eos) if isinstance(eos, list) else (int(eos),)
