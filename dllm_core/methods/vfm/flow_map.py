"""The flow map f(x_t, t, prompt) -> token logits, made of the base model. And its sampler.

S segments (one document's response each), B rows, L slots or positions, M real slots in order, D width, V vocabulary.

The alignment contract stays that of the checkpoint: under `shifted` the state at i-1 predicts token i. The noisy
embedding of token i is the *input at position i*, and so meets the state that predicts it by attention alone: exactly
what a shifted model has no habit of, since position i of its input never told it anything about token i. Moving the
noisy embeddings one place forward would cure that and overwrite the embedding of the last prompt token, which has to
stay clean. So the slot's own noisy embedding is handed to its read-out instead, through a gate per dimension that
depends on the time and starts at 0: logits_i = W (h_(i-1) + gate(t) * x_t,i). At low noise the gate gives the
posterior of a single noisy embedding (proportional to <x_t, e_v> (1-t)/t^2), at t = 1 a direct way from noise to token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.data.batch import Batch
from dllm_core.kernels.dispatch import rows_per_chunk
from dllm_core.layers.time_embedding import FREQUENCIES, sinusoids
from dllm_core.methods.segments import Segments

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

_RMS_MIN = 1e-8


class TimeConditioning(nn.Module):
    """What the time does to the base model: a shift of the noisy inputs and the read-out's gate; both 0 at the start.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(FREQUENCIES, width)
        self.shift = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        for last in (self.shift, self.gate):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, t_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return (shift_SD, gate_SD) of times."""
        inner_SW = F.silu(self.inner(sinusoids(t_S).to(self.inner.weight.dtype)))
        return self.shift(inner_SW), self.gate(inner_SW)


def inverse_rms(table_VD: Tensor) -> Tensor:
    """Return 1 / RMS of every embedding row, fp32 [V]."""
    return table_VD.detach().float().square().mean(1).clamp(min=_RMS_MIN**2).rsqrt()


def unit_embeddings(table_VD: Tensor, ids: Tensor) -> Tensor:
    """Return the tokens' embeddings at RMS 1, fp32 [..., D], detached: what is noised is data, not a parameter.

    Every row has the same RMS, so all tokens have the same signal-to-noise ratio at a given t, and no row can escape
    the noise by growing.
    """
    return F.rms_norm(table_VD.detach()[ids].float(), table_VD.shape[-1:], eps=_RMS_MIN**2)


def place(values_SLD: Tensor, cut: Segments, onto_BLD: Tensor) -> Tensor:
    """Return `onto_BLD` with the slots' values in their places; gradients flow into both."""
    rows_M = cut.row_S[:, None].expand_as(cut.position_SL)[cut.real_SL]
    return onto_BLD.index_put((rows_M, cut.position_SL[cut.real_SL]), values_SLD[cut.real_SL].to(onto_BLD.dtype))


def run(backbone: Backbone, batch: Batch, inputs_embeds_BLD: Tensor, *, causal: bool = False) -> Tensor:
    """Return hidden_BLD of embeddings laid out as `batch`."""
    if batch.is_plain:
        return backbone.hidden(inputs_embeds_BLD=inputs_embeds_BLD, causal=causal)
    return backbone.hidden(
        inputs_embeds_BLD=inputs_embeds_BLD,
        causal=causal,
        document_BL=batch.document_BL,
        position_BL=batch.position_BL,
    )


class FlowMap(nn.Module):
    """The base model as a denoiser of unit-RMS embeddings. Holds the time conditioning; the base model is passed in.

    Args:
        width: D.
        timed: with a time conditioning; without it there is a scale alone.

    Attributes:
        scale: RMS of the base model's embedding table when the map was made; what the inputs are multiplied with.
    """

    scale: Tensor

    def __init__(self, width: int, *, timed: bool = True) -> None:
        super().__init__()
        self.time = TimeConditioning(width) if timed else None
        self.register_buffer("scale", torch.ones(()))

    def forward(
        self,
        backbone: Backbone,
        batch: Batch,
        cut: Segments,
        x_SLD: Tensor,
        t_S: Tensor,
        masked_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (hidden_BLD, gate_SD).

        Args:
            backbone: the base model.
            batch: prompts; what stands at the slots is not read.
            cut: where the slots are.
            x_SLD: noisy embeddings at RMS about 1.
            t_S: times.
            masked_BL: bool; prompt tokens shown as the mask token. None shows all of the prompt.
        """
        assert self.time is not None, "a map without time has no flow"
        ids_BL = batch.input_ids_BL
        if masked_BL is not None:
            ids_BL = ids_BL.masked_fill(masked_BL, backbone.contract.mask_token_id)
        embedded_BLD = backbone.model.get_input_embeddings()(ids_BL)
        shift_SD, gate_SD = self.time(t_S)
        noisy_SLD = (self.scale * x_SLD.float()).to(embedded_BLD.dtype) + shift_SD[:, None]
        return run(backbone, batch, place(noisy_SLD, cut, embedded_BLD)), gate_SD

    def rows(self, hidden_BLD: Tensor, gate_SD: Tensor, cut: Segments, x_SLD: Tensor, shift: int) -> Tensor:
        """Return what the head reads for every real slot, [M, D]; `shift` is 1 where the state before predicts."""
        states_SLD = hidden_BLD[cut.row_S[:, None], cut.position_SL - shift]
        return (states_SLD + gate_SD[:, None] * x_SLD.to(states_SLD.dtype))[cut.real_SL]

    @torch.no_grad()
    def sample(
        self,
        backbone: Backbone,
        batch: Batch,
        cut: Segments,
        z_SLD: Tensor,
        passes: int,
        shift: int,
        masked_BL: Tensor | None = None,
    ) -> Tensor:
        """Return what the head reads of every real slot at the last of `passes` passes, [M, D].

        From t to s: x_s = (s / t) x_t + (1 - s / t) x0_hat, x0_hat = softmax(logits) . E over unit-RMS rows; times
        1, 1 - 1/K, ..., 1/K. Nothing is random once z is given.
        """
        inverse_V = inverse_rms(backbone.embedding_weight_VD)
        x_SLD = z_SLD.float()
        rows_MD = x_SLD
        for k in range(passes):
            t, s = 1.0 - k / passes, 1.0 - (k + 1) / passes
            t_S = torch.full((len(cut),), t, device=x_SLD.device)
            hidden_BLD, gate_SD = self(backbone, batch, cut, x_SLD, t_S, masked_BL)
            rows_MD = self.rows(hidden_BLD, gate_SD, cut, x_SLD, shift)
            if k == passes - 1:
                break
            x0_SLD = torch.zeros_like(x_SLD)
            x0_SLD[cut.real_SL] = expected_embeddings(backbone, rows_MD, inverse_V)
            x_SLD = (s / t) * x_SLD + (1.0 - s / t) * x0_SLD
        return rows_MD


@torch.no_grad()
def expected_embeddings(backbone: Backbone, rows_MD: Tensor, inverse_V: Tensor) -> Tensor:
    """Return x0_hat = softmax(logits) . E over unit-RMS rows, fp32 [M, D]; chunk by chunk over the rows.

    Args:
        backbone: head and embeddings.
        rows_MD: what the head reads.
        inverse_V: 1 / RMS of the embedding rows.
    """
    table_VD = backbone.embedding_weight_VD
    step = rows_per_chunk(table_VD.shape[0], rows_MD.device.type)
    parts = []
    for start in range(0, len(rows_MD), step):
        p_CV = backbone.logits(rows_MD[start : start + step]).softmax(-1)
        parts.append(((p_CV * inverse_V).to(table_VD.dtype) @ table_VD).float())
    return torch.cat(parts) if parts else rows_MD.float()
