"""What generations from latents begin and end with. B batch, L new tokens, K latent dimension, M tokens, V vocabulary.

Noise is drawn on the CPU, keyed by seed and sample id, and moved then: what a row draws depends neither on the device
nor on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.kernels import token_stats
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.denoise import draw_tokens

_CHUNK_ROWS = 256
_OF_UNMASKING = (
    "sampler_config",
    "cache",
    "guidance_scale",
    "t_max",
    "stability_threshold",
    "record_passes",
    "verify",
)
"""Settings of `DiffusionGenerationConfig` that say how masks are filled."""


@dataclass(frozen=True)
class Request:
    """A batch of generations; a room adds what else its own take.

    Attributes:
        prompts: 1-D int64 ids on the method's device.
        lengths: new tokens of each.
        config: steps, temperature, top-k, top-p, seed, end of text.
        sample_ids: with the seed they key all noise of a row.
    """

    prompts: list[Tensor]
    lengths: list[int]
    config: DiffusionGenerationConfig
    sample_ids: tuple[int, ...]

    def normal(self, width: int, stream: str) -> Tensor:
        """Return N(0, 1) draws [B, L, width], on CPU; zeros beyond a row's length."""
        generators = [NoiseSource(self.config.seed).generator(i, 0, stream) for i in self.sample_ids]
        rows = [torch.randn(n, width, generator=g) for n, g in zip(self.lengths, generators, strict=True)]
        return pad_sequence(rows, batch_first=True)

    def uniform(self, stream: str) -> Tensor | None:
        """Return U(0, 1) draws [B, L] that tokens are drawn with, float64 on CPU; None at temperature 0."""
        if self.config.temperature == 0:
            return None
        generators = [NoiseSource(self.config.seed).generator(i, 0, stream) for i in self.sample_ids]
        rows = [torch.rand(n, generator=g, dtype=torch.float64) for n, g in zip(self.lengths, generators, strict=True)]
        return pad_sequence(rows, batch_first=True)

    def up_to_end(self, new_L: Tensor, own_ends: tuple[int, ...]) -> int | None:
        """Return how many new tokens (on CPU) stand up to the first end of text, None where none of them is one.

        Args:
            new_L: a row's new tokens.
            own_ends: ids that end a text where the config names none.
        """
        ends = self.config.eos_token_ids or own_ends
        if not self.config.stop_at_eos or not ends:
            return None
        (found,) = torch.isin(new_L, torch.tensor(ends)).nonzero(as_tuple=True)
        return int(found[0]) + 1 if len(found) else None

    def finished(self, ids_BL: Tensor, own_ends: tuple[int, ...], passes: int, seconds: float) -> GenerationOutput:
        """Put prompts before the new tokens, cut to their lengths and at the end of text where that is asked for."""
        sequences, counts = [], []
        for prompt, length, ids_L in zip(self.prompts, self.lengths, ids_BL.cpu(), strict=True):
            new_L = ids_L[:length]
            new_L = new_L[: self.up_to_end(new_L, own_ends)]
            sequences.append(torch.cat((prompt.cpu(), new_L)))
            counts.append(len(new_L))
        return GenerationOutput(sequences, counts, passes, seconds)


def request_of(
    prompts: Sequence[Tensor],
    config: DiffusionGenerationConfig,
    device: torch.device,
    *,
    lengths: Sequence[int] | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Request:
    """Resolve what is to be generated.

    Args:
        prompts: 1-D ids.
        config: how.
        device: of the method.
        lengths: new tokens of each prompt; None is `max_new_tokens` for all.
        sample_ids: one a prompt; None means 0..B-1.

    Raises:
        DllmError: no prompts, an empty prompt, lists of different lengths, or a setting that only unmasking knows.
    """
    _refuse_unmasking(config)
    rows = [p.to(device).long() for p in prompts]
    if not rows or any(p.ndim != 1 or len(p) == 0 for p in rows):
        raise DllmError("A prompt is empty or not one row of ids.", "Give every prompt at least one token.")
    sizes = [config.max_new_tokens] * len(rows) if lengths is None else list(lengths)
    ids = tuple(range(len(rows))) if sample_ids is None else tuple(sample_ids)
    if not len(rows) == len(sizes) == len(ids):
        raise DllmError(
            f"{len(rows)} prompts, {len(sizes)} lengths and {len(ids)} sample ids.", "Give one of each per prompt."
        )
    return Request(rows, sizes, config, ids)


def _refuse_unmasking(config: DiffusionGenerationConfig) -> None:
    """Raise `DllmError` where a setting asks for what generation from latents has no place for."""
    default = DiffusionGenerationConfig()
    for name in _OF_UNMASKING:
        if getattr(config, name) != getattr(default, name):
            raise DllmError(
                f"{name} says how masks are filled, and this cell generates from latents.",
                f"Leave {name} out, or take a token-space cell.",
            )


def read_tokens(
    outputs_MD: Tensor, head_VD: Tensor, config: DiffusionGenerationConfig, uniform_M: Tensor | None
) -> Tensor:
    """Return int64 [M]: the most probable tokens, or draws at the temperature of the config.

    Args:
        outputs_MD: what is multiplied with the head's rows.
        head_VD: those rows.
        config: temperature, top-k and top-p.
        uniform_M: U(0, 1) draws; None takes the most probable.
    """
    if uniform_M is None:
        return token_stats.stats(outputs_MD, head_VD, second=False).argmax_M
    pieces = zip(outputs_MD.split(_CHUNK_ROWS), uniform_M.to(outputs_MD.device).split(_CHUNK_ROWS), strict=True)
    return torch.cat([draw_tokens((rows_RD @ head_VD.T).float(), config, uniform_R) for rows_RD, uniform_R in pieces])
