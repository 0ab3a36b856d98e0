"""What a Cola DLM consists of, and how it starts: networks, frozen states, statistics.

B batch, S spans (documents), T slots (one latent a token), K latent dimension, D width of the frozen states, V
vocabulary, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import ContractError, DllmError
from dllm_core.methods.cola import start
from dllm_core.methods.cola.networks import ColaNetworks
from dllm_core.methods.cola.options import Options
from dllm_core.methods.cola.spans import Spans, spans_of
from dllm_core.methods.ldlm.base import Base
from dllm_core.methods.protocol import Method, Resources
from dllm_core.methods.requirements import RoomOptions
from dllm_core.training.ema import Ema

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

_SEQUENCES_AT_ONCE = 16


class Model(Method):
    """Everything but training and measuring.

    Args:
        backbone: a converted model in memory; its embedding table is kept, and it reads prompts when generating. Or
            None.
        options: see `Options`.
        base: what is known of the language model, where no backbone is given.

    Attributes:
        networks: all that is trained.
        head_VD: frozen token embeddings at unit length, along which tokens are read out; not trained.
        mean_D, std_D: of the frozen states.
        latent_mean_K, latent_std_K: of sampled latents when the first phase ended; frozen from then on.
        average: of the prior's weights, which generates.
        reference: the encoder as the first phase left it (joint training alone).
    """

    options: Options
    mean_D: Tensor
    std_D: Tensor
    latent_mean_K: Tensor
    latent_std_K: Tensor
    gathered_count: Tensor
    gathered_K: Tensor
    gathered_square_K: Tensor

    def __init__(self, backbone: Backbone | None, options: Options, *, base: Base | None = None) -> None:
        super().__init__(None, options)
        if base is None:
            assert backbone is not None, "give a backbone or what is known of one"
            base = Base.of(backbone)
        self.base = base
        hidden, vocab, latent = base.hidden, base.contract.num_tokens, options.sizes.latent_dim
        self.layer = options.layer_name(base.num_layers)
        self.networks = ColaNetworks(
            options.sizes,
            hidden,
            options.block_size,
            options.start_log_variance,
            linear=options.start == "linear",
        )
        table_VD = torch.zeros(vocab, hidden) if base.embedding_VD is None else F.normalize(base.embedding_VD, dim=1)
        self.head_VD = nn.Parameter(table_VD, requires_grad=False)
        for name, value in (("mean_D", torch.zeros(hidden)), ("std_D", torch.ones(hidden))):
            self.register_buffer(name, value)
        for name, value in (("latent_mean_K", torch.zeros(latent)), ("latent_std_K", torch.ones(latent))):
            self.register_buffer(name, value)
        self.register_buffer("gathered_count", torch.zeros(()))
        self.register_buffer("gathered_K", torch.zeros(latent))
        self.register_buffer("gathered_square_K", torch.zeros(latent))
        self.average = Ema(self.networks.prior.named_parameters(), options.ema_decay)
        self.reference = Ema(self.networks.encoder.named_parameters() if options.joint else (), 0.0, warmup=False)
        self._language_model: tuple[Backbone, ...] = () if backbone is None else (backbone,)

    @classmethod
    def from_base(
        cls,
        directory: Path,
        options: RoomOptions,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Start from a converted checkpoint, of which one tensor is read."""
        assert isinstance(options, Options)
        return cls(None, options, base=Base.read(directory)).to(device=device, dtype=dtype)

    def standardise(self, states: Tensor) -> Tensor:
        """Return states with mean 0 and variance 1 per dimension, outliers cut off, in the compute dtype."""
        standard = (states.float() - self.mean_D.float()) / self.std_D.float()
        return standard.clamp(-start.STATE_LIMIT, start.STATE_LIMIT).to(self.head_VD.dtype)

    def stored_states(self, batch: Batch, cut: Spans, resources: Resources) -> Tensor:
        """Return stored states [S, T, D] of a batch's documents as they are, on the method's device.

        Raises:
            DllmError: no anchor store.
            ContractError: states of another width than the base model's.
            StoreError: the store lacks a row or layer, or belongs to another model.
        """
        if resources.anchors is None:
            raise DllmError(
                "cola trains on the frozen model's states, and no anchor store was given.",
                f"Pass Resources(anchors=...) with all rows of layer {self.layer}.",
            )
        keys = [batch.sequence_keys[row] for row in cut.row_S.tolist()]
        stored = resources.anchors.gather(keys, [self.layer], [p.cpu() for p in cut.position_ST])[self.layer]
        if stored.shape[-1] != self.base.hidden:
            raise ContractError(
                f"The anchors of layer {self.layer} are {stored.shape[-1]} wide, the model is {self.base.hidden}.",
                "Use the anchors of the model that this cell starts from.",
            )
        return stored.view(*cut.position_ST.shape, -1).to(self.device)

    def states_of(self, batch: Batch, cut: Spans, resources: Resources) -> Tensor:
        """Return standardised states [S, T, D] of a batch's documents, 0 in padding; raises as `stored_states`."""
        states_STD = self.standardise(self.stored_states(batch, cut, resources))
        return states_STD.masked_fill(~cut.real_ST[..., None], 0.0)

    def to_prior(self, z: Tensor) -> Tensor:
        """Return latents standardised by the frozen statistics."""
        return (z - self.latent_mean_K.to(z.dtype)) / self.latent_std_K.to(z.dtype)

    def from_prior(self, c: Tensor) -> Tensor:
        """Undo `to_prior`."""
        return c * self.latent_std_K.to(c.dtype) + self.latent_mean_K.to(c.dtype)

    def prepare(self, sequences: SequenceSet, samples: Sequence[int], resources: Resources) -> None:
        """Take the states' moments, and start the autoencoder from closed forms where the options say so."""
        chosen = list(samples)[: self.options.start_sequences]
        head_VD = self.head_VD.detach().float().cpu()
        counts_V = torch.zeros(len(head_VD))

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for first in range(0, len(chosen), _SEQUENCES_AT_ONCE):
                batch = sequences.batch_of(chosen[first : first + _SEQUENCES_AT_ONCE])
                cut = spans_of(batch)
                states_STD = self.stored_states(batch, cut, resources)
                yield states_STD[cut.response_ST].float().cpu(), cut.slots(batch.input_ids_BL)[cut.response_ST]

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for states_ND, ids_N in parts():
                counts_V.add_(torch.bincount(ids_N.cpu(), minlength=len(counts_V)))
                yield states_ND, ids_N

        found = start.gather_statistics(counted(), head_VD)
        self.mean_D.copy_(found.mean_D)
        self.std_D.copy_(found.std_D)
        if self.options.start == "linear":
            self._start_linear(found, next(parts()), head_VD, counts_V @ head_VD / counts_V.sum())

    @torch.no_grad()
    def _start_linear(
        self, found: start.Statistics, sample: tuple[Tensor, Tensor], head_VD: Tensor, mean_row_D: Tensor
    ) -> None:
        encoder, decoder = self.networks.encoder, self.networks.decoder
        latent = self.networks.latent_dim
        form = start.closed_form(found, latent, math.exp(self.options.start_log_variance))
        encoder.straight.weight[:latent].copy_(form.encoder_KD)
        decoder.straight.weight.copy_(form.decoder_DK)
        decoder.straight.bias.copy_(mean_row_D)  # with nothing else known: what tokens are on average
        states_ND = ((sample[0] - found.mean_D) / found.std_D).clamp(-start.STATE_LIMIT, start.STATE_LIMIT)
        outputs_ND = states_ND @ form.encoder_KD.T @ form.decoder_DK.T + mean_row_D
        decoder.log_scale.fill_(start.best_log_scale(outputs_ND, sample[1], head_VD))

    @property
    def language_model(self) -> Backbone | None:
        """The language model, if it is in memory."""
        return self._language_model[0] if self._language_model else None

    def language_model_states(self, ids_BP: Tensor, real_BP: Tensor) -> Tensor:
        """Return the language model's standardised states [B, P, D] of prompts, one causal pass.

        Args:
            ids_BP: prompts, padded on the right.
            real_BP: bool; tokens that are no padding.

        Raises:
            DllmError: the language model is not at hand.
        """
        from dllm_core.backbone.backbone import Backbone

        if not self._language_model:
            if self.base.directory is None:
                raise DllmError(
                    "This cell reads prompts through the language model, which is not at hand.",
                    "Load the cell from the directory that training wrote.",
                )
            dtype = self.head_VD.dtype
            self._language_model = (Backbone.from_pretrained(self.base.directory, dtype=dtype, device=self.device),)
        model = self._language_model[0]
        with model.capture([self.layer]) as states:
            model.hidden(ids_BP, causal=True, document_BL=torch.where(real_BP, 0, -1))
        return self.standardise(states[self.layer])
