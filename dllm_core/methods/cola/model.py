"""What a Cola DLM consists of, and how it starts: networks, frozen states, statistics.

B batch, S spans (documents), T slots (one latent a token), K latent dimension, D width of the frozen states, V
vocabulary, N tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.methods.closed_forms import Statistics, best_log_scale
from dllm_core.methods.cola import start
from dllm_core.methods.cola.networks import ColaNetworks
from dllm_core.methods.cola.options import Options
from dllm_core.methods.cola.spans import Spans
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.latent_keeping import CellForm
from dllm_core.methods.latent_method import LatentMethod
from dllm_core.methods.protocol import Resources
from dllm_core.training.ema import Ema

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class Model(LatentMethod):
    """Everything but training and measuring.

    Attributes:
        head_VD: frozen token embeddings at unit length, along which tokens are read out; not trained.
        latent_mean_K, latent_std_K: of sampled latents when the first phase ended; frozen from then on.
        gathered_count, gathered_K, gathered_square_K: sums that those statistics are made of.
        reference: the encoder as the first phase left it (joint training alone).
    """

    FORM = CellForm("cola", "a cola cell", training_alone=("ema.", "reference.", "gathered_"))
    AVERAGED = "networks.prior"
    options: Options
    networks: ColaNetworks
    latent_mean_K: Tensor
    latent_std_K: Tensor
    gathered_count: Tensor
    gathered_K: Tensor
    gathered_square_K: Tensor

    def __init__(self, backbone: Backbone | None, options: Options, *, base: Base | None = None) -> None:
        super().__init__(backbone, options, base=base)
        latent = options.sizes.latent_dim
        self.networks = ColaNetworks(
            options.sizes,
            self.base.hidden,
            options.block_size,
            options.start_log_variance,
            linear=options.start == "linear",
        )
        self.head_VD = self.base.unit_embeddings()
        for name, value in (("latent_mean_K", torch.zeros(latent)), ("latent_std_K", torch.ones(latent))):
            self.register_buffer(name, value)
        self.register_buffer("gathered_count", torch.zeros(()))
        self.register_buffer("gathered_K", torch.zeros(latent))
        self.register_buffer("gathered_square_K", torch.zeros(latent))
        self.start_averages()
        self.reference = Ema(self.networks.encoder.named_parameters() if options.joint else (), 0.0, warmup=False)

    def standardise(self, states: Tensor) -> Tensor:
        """Return states with mean 0 and variance 1 per dimension, outliers cut off, in the compute dtype."""
        return super().standardise(states).clamp(-start.STATE_LIMIT, start.STATE_LIMIT)

    def states_of(self, batch: Batch, cut: Spans, resources: Resources) -> Tensor:
        """Return standardised states [S, T, D] of a batch's documents, 0 in padding; raises as `stored_states`."""
        states_STD = self.standardise(self.stored_states(batch, cut.row_S, cut.position_ST, resources))
        return states_STD.masked_fill(~cut.real_ST[..., None], 0.0)

    def to_prior(self, z: Tensor) -> Tensor:
        """Return latents standardised by the frozen statistics."""
        return (z - self.latent_mean_K.to(z.dtype)) / self.latent_std_K.to(z.dtype)

    def from_prior(self, c: Tensor) -> Tensor:
        """Undo `to_prior`."""
        return c * self.latent_std_K.to(c.dtype) + self.latent_mean_K.to(c.dtype)

    def start_linear(self, found: Statistics, states_ND: Tensor, ids_N: Tensor, head_VD: Tensor) -> None:
        """Set the straight paths to the reduced-rank regression; see `cola.start`."""
        encoder, decoder = self.networks.encoder, self.networks.decoder
        latent = self.networks.latent_dim
        form = start.closed_form(found, latent, math.exp(self.options.start_log_variance))
        encoder.straight.weight[:latent].copy_(form.encoder_KD)
        decoder.straight.weight.copy_(form.decoder_DK)
        decoder.straight.bias.copy_(found.mean_row_D)  # with nothing else known: what tokens are on average
        standard_ND = ((states_ND - found.mean_D) / found.std_D).clamp(-start.STATE_LIMIT, start.STATE_LIMIT)
        outputs_ND = standard_ND @ form.encoder_KD.T @ form.decoder_DK.T + found.mean_row_D
        decoder.log_scale.fill_(best_log_scale(outputs_ND, ids_N, head_VD))

    @property
    def language_model(self) -> Backbone | None:
        """The language model, if it is in memory."""
        return self.prompt_reader.model

    def language_model_states(self, ids_BP: Tensor, real_BP: Tensor) -> Tensor:
        """Return the language model's standardised states [B, P, D] of prompts; see `PromptReader.states`."""
        return self.standardise(self.prompt_reader.states(ids_BP, real_BP, self.head_VD.dtype))
