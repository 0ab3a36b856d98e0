"""Options of the latent diffusion language model (arXiv:2605.07933)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from dllm_core.methods.latent_options import Fraction, LatentOptions, Share, named_sizes
from dllm_core.methods.ldlm.shapes import SHAPES, Shape, forward_flops, parameter_table
from dllm_core.methods.requirements import AnchorNeed, BaseShape, Capabilities, NetworkCost, Requirements


class Options(LatentOptions):
    """Options of `ldlm`; `layer`, `anchor_sequences` and others that it shares are told in `LatentOptions`.

    Attributes:
        shape: name of a set of sizes, or the sizes themselves.
        prompt_encoder: `embedding` reads prompts through the frozen embedding table and blocks of its own, so that
            generating needs no language model; `backbone` reads the language model's states, keeps it in memory and
            counts its passes.
        schedule_d: d of the tan-d schedule; wider latents want a larger one.
        decoder_noise: standard deviation of the noise on the latent decoder's input in training; None is
            3 sqrt(K / 768).
        normalise: `rms` puts every latent on the sphere of radius sqrt(K); `none` leaves its scale free.
        start: `linear` starts from closed forms (principal components, ridge regressions), which the networks refine;
            `random` starts from noise.
        self_condition: share of samples trained with a first prediction at hand.
        prompt_drop: share of samples trained without their prompt, for classifier-free guidance.
        gate_warmup: part of the steps over which the gradient of the diffusion loss into the encoder opens.
        gate_floor: how far it is open at the start, relative to the ceiling.
        gate_ceiling: how far it opens. Fully open (1, as published for runs of 200,000 steps) it lets the encoder make
            latents that are easy to predict: in short runs all of them collapse onto a line (docs/LOG.md).
        token_weight: factor of the token loss. It trains the token decoder alone, and AdamW does not see the scale of
            a loss: what the factor changes is how much of the common gradient clipping the token decoder uses up.
        adaptive_times: draw times where the loss rises; False draws them uniformly.
        adaptive_refresh: part of the steps between two refreshes of that density.
        true_states: share of samples whose token loss reads the true states instead of the decoded ones.
        consistency: weight of self-trajectory consistency (arXiv:2608.02602): the prediction is held to that of the
            averaged weights at the next point of a 16-step grid; 0 leaves it out.
        solver: of generation; `auto` is ddim up to 16 steps, sde beyond.
        grid: steps of generation evenly spaced in `u` (the adaptive sampler's quantiles) or in `t`.
        health_every: part of the steps between two looks at the noise-free reconstruction.
    """

    shape: str | Shape = "laptop"
    prompt_encoder: Literal["embedding", "backbone"] = "embedding"
    schedule_d: PositiveFloat = 3.0
    decoder_noise: NonNegativeFloat | None = None
    normalise: Literal["rms", "none"] = "rms"
    self_condition: Share = 0.5
    prompt_drop: Share = 0.1
    gate_warmup: Share = 0.15
    gate_floor: Share = 1e-3
    gate_ceiling: Share = 0.0
    token_weight: PositiveFloat = 0.02
    adaptive_times: bool = True
    adaptive_refresh: Fraction = 0.1
    true_states: Share = 0.5
    consistency: NonNegativeFloat = 0.0
    solver: Literal["auto", "ddim", "ddpm", "sde"] = "auto"
    grid: Literal["u", "t"] = "t"
    health_every: Fraction = 0.02

    @property
    def sizes(self) -> Shape:
        """The sizes, looked up where a name was given.

        Raises:
            DllmError: unknown name.
        """
        return named_sizes(self.shape, SHAPES, "LDLM")

    @property
    def keeps_language_model(self) -> bool:
        """Whether prompts are read through the language model."""
        return self.prompt_encoder == "backbone"

    def facts(self, base: BaseShape) -> dict[str, Any]:
        """Return latent width and layer."""
        return {"latent_dim": self.sizes.latent(base.hidden), **super().facts(base)}

    def noise_level(self, latent_dim: int) -> float:
        """Return the standard deviation of the decoder's noise: 3 at 768 dimensions, the same per token elsewhere."""
        return 3.0 * (latent_dim / 768) ** 0.5 if self.decoder_noise is None else self.decoder_noise

    def requirements(self, num_layers: int) -> Requirements:
        """Ask for one layer's states, of responses alone unless prompts are read through the language model."""
        _ = self.sizes
        return Requirements(
            anchors=AnchorNeed(
                layers=(self.layer_name(num_layers),),
                positions="all" if self.keeps_language_model else "response",
                heldout=True,
                sequences=self.anchor_sequences,
            )
        )

    def capabilities(self) -> Capabilities:
        """No masks and no bound; health on held-out text."""
        return Capabilities(diagnostics=True, latent=True)

    def network(self, base: BaseShape) -> NetworkCost:
        """Return parameters and training FLOPs of the room's networks."""
        shape = self.sizes
        return NetworkCost(
            trainable=parameter_table(shape, base),
            frozen=base.hidden * base.vocab,
            flops_per_response_token=self.training_flops(base),
        )

    def training_flops(self, base: BaseShape) -> float:
        """Return operations of a training step per response position, its share of prompt positions included."""
        slots = base.response
        return self.step_flops(base, slots, base.length - slots) / slots

    def step_flops(self, base: BaseShape, slots: float, prompt: float, *, sequences: int = 1) -> float:
        """Return operations of the loss, forward and backward.

        A backward costs two forwards, one where only the input's gradient is wanted (the frozen head). The first pass
        of self-conditioning and both of the consistency term have no backward, and read a prompt that is encoded once.

        Args:
            base: the base model's shape.
            slots: response positions.
            prompt: prompt positions.
            sequences: equally long sequences that these are the positions of; none attends to another.
        """
        flops = forward_flops(self.sizes, base, slots / sequences, prompt / sequences)
        head = (2.0 if self.sizes.token_head == "frozen" else 3.0) * self.token_fraction * flops["token head"]
        trained = 3.0 * sum(flops[n] for n in ("latent encoder", "latent decoder", "token decoder", "denoiser"))
        free_passes = self.self_condition + (1.0 if self.consistency else 0.0)
        of_slots = trained + head + free_passes * flops["denoiser"]
        return slots * of_slots + prompt * 3.0 * flops["prompt encoder"]
