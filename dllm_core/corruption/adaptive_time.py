"""Noise levels drawn where the loss rises: t(u) such that the expected loss is linear in u ~ U(0, 1). B batch.

After arXiv:2605.07933, Eq. 5: F(t) = (L(t) - L(0)) / (L(1) - L(0)), t = F^-1(u), so the density of t is proportional
to dL/dt. No importance weights enter the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch

UNIFORM_SHARE = 0.01
"""Part of the draws that stays uniform in t: a bin that is never visited would keep its old loss for ever."""


class AdaptiveTimes(nn.Module):
    """Keeps a running loss per bin of t and draws times accordingly. All state is float64 persistent buffers.

    Per bin a sum of per-sample losses and a count, both forgotten by the same factor 1 - 1 / memory every step: their
    ratio is an exponential average with its bias corrected. One clock for all bins, not one per bin that ticks when it
    is visited: the loss falls while a model learns, and a bin that is seldom visited would keep the losses of long ago
    and stand out. What is common to all bins cancels in the density.

    At a refresh neighbouring bins are pooled until each group holds `pool` samples (noise would otherwise pass for
    slope: with few samples per bin a running max turns it into a handful of jumps), the groups' means are made
    monotone by a running max and joined by straight lines, and the rise across each bin becomes its probability; t is
    uniform inside a bin. t is uniform until the first refresh.

    What a step observes is summed per bin and enters once, in `end_step`: splitting a batch changes nothing.

    Args:
        refresh_every: steps between refreshes, scaled to the run (5,000 of 200,000 in the lineage).
        bins: equal bins of [t_min, 1].
        memory: steps remembered; by default those between two refreshes.
        pool: remembered samples that make a mean trustworthy; 0 pools only what is empty.
        t_min: smallest time drawn.
    """

    loss_sum: Tensor
    loss_count: Tensor
    cdf: Tensor
    pending_sum: Tensor
    pending_count: Tensor
    steps: Tensor

    def __init__(
        self, refresh_every: int, bins: int = 100, memory: int | None = None, pool: float = 100.0, t_min: float = 1e-3
    ) -> None:
        super().__init__()
        self.refresh_every, self.bins, self.memory = refresh_every, bins, memory or refresh_every
        self.pool, self.t_min = pool, t_min
        if refresh_every < 1 or bins < 2 or self.memory < 1 or not 0.0 <= t_min < 1.0:
            raise ValueError(
                f"adaptive times need refresh_every >= 1, bins >= 2, memory >= 1 and 0 <= t_min < 1, "
                f"got {refresh_every}, {bins}, {memory} and {t_min}"
            )
        for name in ("loss_sum", "loss_count", "pending_sum", "pending_count"):
            self.register_buffer(name, torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("cdf", torch.linspace(0, 1, bins + 1, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # a network cast to bf16 must not round the density: only the device follows
        return super()._apply(lambda held: fn(held) if held.is_meta else held.to(fn(held).device), recurse)

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
        kept = 1.0 - 1.0 / self.memory
        for total, pending in ((self.loss_sum, self.pending_sum), (self.loss_count, self.pending_count)):
            total.mul_(kept).add_(pending)
            pending.zero_()
        self.steps += 1
        if int(self.steps) % self.refresh_every == 0:
            self.refresh()

    def bin_losses(self) -> Tensor:
        """Return the mean loss of each bin, float64, CPU; nan where nothing was seen."""
        return (self.loss_sum / self.loss_count).cpu()  # 0 / 0 is nan

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the density from the running losses; unchanged while they do not make two groups."""
        places, losses = _pooled(self.loss_sum.cpu(), self.loss_count.cpu(), self.pool)
        if len(places) < 2:
            return
        edges = _line(places, losses.cummax(0).values, torch.arange(self.bins + 1, dtype=torch.float64))
        rise = edges.diff()
        even = torch.full_like(rise, 1 / self.bins)
        share = (rise / rise.sum() if rise.sum() > 0 else even) * (1 - UNIFORM_SHARE) + even * UNIFORM_SHARE
        self.cdf[1:] = share.cumsum(0).to(self.cdf)
        self.cdf[-1] = 1.0


def _pooled(loss_sum: Tensor, loss_count: Tensor, pool: float) -> tuple[Tensor, Tensor]:
    """Return (centre in bins, mean loss) of groups of neighbouring bins with at least `pool` samples each.

    Groups are closed from left to right; what is left at the right end joins the last one.
    """
    groups: list[list[float]] = []
    place = total = count = 0.0
    for j, (more, samples) in enumerate(zip(loss_sum.tolist(), loss_count.tolist(), strict=True)):
        place, total, count = place + (j + 0.5) * samples, total + more, count + samples
        if count >= pool and count > 0:
            groups.append([place, total, count])
            place = total = count = 0.0
    if groups and count > 0:
        groups[-1] = [old + new for old, new in zip(groups[-1], (place, total, count), strict=True)]
    rows = torch.tensor(groups, dtype=torch.float64).reshape(-1, 3)
    return rows[:, 0] / rows[:, 2], rows[:, 1] / rows[:, 2]


def _line(x_N: Tensor, y_N: Tensor, at_M: Tensor) -> Tensor:
    """Return the polygon through (x, y), x ascending, at other places; its first and last sides are prolonged."""
    right = torch.searchsorted(x_N, at_M).clamp(1, len(x_N) - 1)
    weight = (at_M - x_N[right - 1]) / (x_N[right] - x_N[right - 1])
    return y_N[right - 1] + weight * (y_N[right] - y_N[right - 1])


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
