"""The noise adapter q(z | prompt): a diagonal Gaussian over one noise vector per response slot.

S segments, L slots, P prompt tokens, C width of what is read of a prompt token, D width of the embeddings, W width of
the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dllm_core.layers.perceiver import Perceiver
from dllm_core.methods.vfm.shapes import AdapterShape

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
_INIT_STD = 0.02


@dataclass(frozen=True)
class Posterior:
    """N(mean, diag exp(2 log_std)) of every slot.

    Attributes:
        mean_SLD, log_std_SLD: fp32.
    """

    mean_SLD: Tensor
    log_std_SLD: Tensor

    def sample(self, eps_SLD: Tensor) -> Tensor:
        """Return z = mean + std * eps, fp32; gradients flow into both."""
        return self.mean_SLD + self.log_std_SLD.exp() * eps_SLD.float()

    def kl_SLD(self) -> Tensor:
        """Return KL(q || N(0, 1)) of every dimension, in nats: (mean^2 + std^2 - 1) / 2 - log std."""
        log_std = self.log_std_SLD
        return 0.5 * (self.mean_SLD.square() + torch.exp(2 * log_std) - 1.0) - log_std

    def kl_SL(self) -> Tensor:
        """Return the KL divergence of every slot as a mean over dimensions, so that it stands beside nats per token."""
        return self.kl_SLD().mean(-1)


class Adapter(nn.Module):
    """Learned slot queries look at the prompt and at each other.

    It starts close to N(0, 1) but not at a constant: the mean is small and differs between prompts and slots from the
    first step on, log std is 0.

    Args:
        inputs: C.
        outputs: D.
        shape: width and depth.
        spread: also predict the deviation; without it there is a mean alone.
    """

    def __init__(self, inputs: int, outputs: int, shape: AdapterShape, *, spread: bool = True) -> None:
        super().__init__()
        width = shape.width_on(outputs)
        self.to_width = nn.Linear(inputs, width, bias=False)
        self.query_W = nn.Parameter(_INIT_STD * torch.randn(width))
        self.perceiver = Perceiver(width, shape.depth, shape.heads_on(outputs))
        self.mean = nn.Linear(width, outputs)
        nn.init.normal_(self.mean.weight, std=_INIT_STD)
        nn.init.zeros_(self.mean.bias)
        self.log_std = nn.Linear(width, outputs) if spread else None
        if self.log_std is not None:
            nn.init.normal_(self.log_std.weight, std=_INIT_STD / 10)
            nn.init.zeros_(self.log_std.bias)

    def forward(self, prompt_SPC: Tensor, visible_SP: Tensor, real_SL: Tensor) -> Posterior:
        """Return the distribution of the noise.

        Args:
            prompt_SPC: what is read of the prompts; the last column is the last prompt token.
            visible_SP: bool; prompt tokens that are there.
            real_SL: bool; slots that are no padding.
        """
        dtype, device = self.to_width.weight.dtype, prompt_SPC.device
        position_P = torch.arange(-prompt_SPC.shape[1], 0, device=device)
        position_L = torch.arange(real_SL.shape[1], device=device)
        queries_SLW = self.query_W.expand(*real_SL.shape, -1)
        inner_SPW = self.to_width(prompt_SPC.to(dtype))
        out_SLW = self.perceiver(inner_SPW, queries_SLW, position_P, position_L, visible_SP, real_SL)
        mean_SLD = self.mean(out_SLW).float()
        if self.log_std is None:
            return Posterior(mean_SLD, torch.full_like(mean_SLD, -torch.inf))
        return Posterior(mean_SLD, self.log_std(out_SLW).float().clamp(LOG_STD_MIN, LOG_STD_MAX))
