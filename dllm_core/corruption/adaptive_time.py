"""Noise levels drawn where the loss rises: t(u) such that the expected loss is linear in u ~ U(0, 1). B batch.

After arXiv:2605.07933, Eq. 5: F(t) = (L(t) - L(0)) / (L(1) - L(0)), t = F^-1(u), so the density of t is proportional
to dL/dt. No importance weights enter the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch

UNIFORM_SHARE = 0.01
"""Part of the draws that stays uniform in t: a bin that is never visited would keep its old loss for ever."""


class AdaptiveTimes(nn.Module):
    """Keeps a running loss per bin of t and draws times accordingly. All state is float64 persistent buffers.

    Per bin an exponential average over *samples* with bias correction: n samples of mean m change it as n updates by m
    would, average <- decay^n average + (1 - decay^n) m. At a refresh the averages are made monotone by a running max,
    taken as L at the bins' centres, interpolated to their edges, and the rise across each bin becomes its probability;
    t is uniform inside a bin. Bins without any sample take the value between their neighbours. t is uniform until the
    first refresh.

    What a step observes is summed per bin and enters once, in `end_step`: splitting a batch changes nothing.

    Args:
        refresh_every: steps between refreshes, scaled to the run (5,000 of 200,000 in the lineage).
        bins: equal bins of [t_min, 1].
        decay: per sample of a bin; 1 / (1 - decay) samples are remembered. A short run needs a shorter memory.
        t_min: smallest time drawn.
    """

    average: Tensor
    weight: Tensor
    cdf: Tensor
    pending_sum: Tensor
    pending_count: Tensor
    steps: Tensor

    def __init__(self, refresh_every: int, bins: int = 100, decay: float = 0.999, t_min: float = 1e-3) -> None:
        super().__init__()
        if refresh_every < 1 or bins < 2 or not 0.0 <= decay < 1.0 or not 0.0 <= t_min < 1.0:
            raise ValueError(
                f"refresh_every >= 1, bins >= 2, 0 <= decay < 1 and 0 <= t_min < 1 are needed, "
                f"got {refresh_every}, {bins}, {decay} and {t_min}"
            )
        self.refresh_every, self.bins, self.decay, self.t_min = refresh_every, bins, decay, t_min
        for name in ("average", "weight", "pending_sum", "pending_count"):
            self.register_buffer(name, torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("cdf", torch.linspace(0, 1, bins + 1, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def times(self, u_B: Tensor) -> Tensor:
        """Return t(u), fp32, on the device of u; rises with u.

        Args:
            u_B: U(0, 1) draws, float64 for full resolution.
        """
        cdf = self.cdf.to(u_B.device)
        u_B = u_B.double()
        bin_B = (torch.searchsorted(cdf, u_B.contiguous(), right=True) - 1).clamp(0, self.bins - 1)
        low_B, high_B = cdf[bin_B], cdf[bin_B + 1]
        place_B = (bin_B + (u_B - low_B) / (high_B - low_B)) / self.bins
        return (self.t_min + (1 - self.t_min) * place_B).float()

    def quantiles(self, t_B: Tensor) -> Tensor:
        """Return u(t) = F(t), float64: the inverse of `times`."""
        place_B = (t_B.double() - self.t_min) / (1 - self.t_min) * self.bins
        bin_B = place_B.floor().long().clamp(0, self.bins - 1)
        cdf = self.cdf.to(t_B.device)
        return (cdf[bin_B] + (place_B - bin_B) * (cdf[bin_B + 1] - cdf[bin_B])).clamp(0, 1)

    def grid(self, steps: int, uniform_in: Literal["u", "t"] = "u", t_min: float = 0.01) -> Tensor:
        """Return the times of a sampler, [steps + 1], float64, CPU, falling from 1 to `t_min`.

        Args:
            steps: denoising steps, at least 1.
            uniform_in: "u" spends steps where the loss rises, "t" spaces them evenly.
            t_min: the last time.
        """
        if steps < 1:
            raise ValueError(f"a sampler needs at least one step, got {steps}")
        part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = 1 - part * (1 - t_min)
        if uniform_in == "u":
            first_u = float(self.quantiles(torch.tensor([t_min], dtype=torch.float64)))
            times = self.times(1 - part * (1 - first_u)).double()
        times[0], times[-1] = 1.0, t_min
        return times

    @torch.no_grad()
    def observe(self, t_B: Tensor, loss_B: Tensor) -> None:
        """Note per-sample losses at their times; they count from the next `end_step` on."""
        loss_B = loss_B.detach().to(self.pending_sum)
        place_B = (t_B.to(self.pending_sum) - self.t_min) / (1 - self.t_min) * self.bins
        # a sum over one-hot rows: the same whatever the order, where a scatter on a GPU is not
        hot_BJ = F.one_hot(place_B.floor().long().clamp(0, self.bins - 1), self.bins).double()
        self.pending_sum += (hot_BJ * loss_B[:, None]).sum(0)
        self.pending_count += hot_BJ.sum(0)

    @torch.no_grad()
    def end_step(self) -> None:
        """Take in what the step observed; refresh the density if it is time."""
        kept = self.decay**self.pending_count
        mean = self.pending_sum / self.pending_count.clamp(min=1)
        self.average.mul_(kept).add_((1 - kept) * mean)
        self.weight.mul_(kept).add_(1 - kept)
        self.pending_sum.zero_()
        self.pending_count.zero_()
        self.steps += 1
        if int(self.steps) % self.refresh_every == 0:
            self.refresh()

    def bin_losses(self) -> Tensor:
        """Return the mean loss of each bin, float64, CPU; nan where nothing was seen."""
        return torch.where(self.weight > 0, self.average / self.weight, torch.nan).cpu()

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the density from the running losses; unchanged while fewer than two bins have been seen."""
        losses = _filled(self.bin_losses())
        if losses is None:
            return
        rising = losses.cummax(0).values
        edges = torch.empty(self.bins + 1, dtype=torch.float64)
        edges[1:-1] = (rising[1:] + rising[:-1]) / 2
        edges[0], edges[-1] = 2 * rising[0] - edges[1], 2 * rising[-1] - edges[-2]
        rise = edges.diff()
        total = rise.sum()
        even = torch.full_like(rise, 1 / self.bins)
        share = torch.where(total > 0, rise / total, even) * (1 - UNIFORM_SHARE) + even * UNIFORM_SHARE
        self.cdf[1:] = share.cumsum(0).to(self.cdf)
        self.cdf[-1] = 1.0


def _filled(losses: Tensor) -> Tensor | None:
    """Return the losses with gaps filled linearly and ends by the nearest; None if fewer than two are known."""
    (known,) = (~losses.isnan()).nonzero(as_tuple=True)
    if len(known) < 2:
        return None
    places = torch.arange(len(losses)).clamp(int(known[0]), int(known[-1]))
    right = torch.searchsorted(known, places).clamp(1, len(known) - 1)
    low, high = known[right - 1], known[right]
    return torch.lerp(losses[low], losses[high], (places - low) / (high - low).double())


def stratified(noise: NoiseSource, batch: Batch, first_index: int, batch_size: int | None = None) -> Tensor:
    """Return u_B, float64, CPU: one draw in every interval of length 1 / batch_size over the global batch.

    u_b = frac(u_0 + rank_b / batch_size), u_0 ~ U(0, 1) keyed by (seed, optimiser step). The rank is the place within
    the global batch, so that whoever holds a part of it draws what one process would.

    Args:
        noise: the run's source.
        batch: the samples; all of the global batch or a stretch of it.
        first_index: presentations before its first sample, over the whole run: `step * batch_size` for a whole batch.
        batch_size: samples of the global batch; by default those of `batch`.
    """
    size = batch_size or len(batch)
    step, rank = divmod(first_index, size)
    if rank + len(batch) > size:
        raise ValueError(f"{len(batch)} samples from {first_index} on do not lie within one batch of {size}")
    start = torch.rand((), generator=noise.generator(step, 0, "strata"), dtype=torch.float64)
    return (start + torch.arange(rank, rank + len(batch), dtype=torch.float64) / size).frac()
