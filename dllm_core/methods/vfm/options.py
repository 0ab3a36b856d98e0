"""Options of variational flow maps for text (after arXiv:2603.07276)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dllm_core.methods.latent_options import Decay, Fraction, FrozenStatesOptions, Share, named_sizes
from dllm_core.methods.requirements import AnchorNeed, BaseShape, Capabilities, NetworkCost, Requirements
from dllm_core.methods.vfm.shapes import (
    SHAPES,
    AdapterShape,
    adapter_flops,
    adapter_parameters,
    pass_flops,
    time_parameters,
)


class Options(FrozenStatesOptions):
    """Options of `vfm`; `layer` (read with `states` alone) and `anchor_sequences` are told in `FrozenStatesOptions`.

    Attributes:
        shape: name of the adapter's sizes, or the sizes themselves.
        freeze_base: train the adapter alone; it then gives soft masks without noise, and the flow map, its phases and
            its noise fall away (everything below that speaks of them has no effect).
        frozen_attention: of the base model under `freeze_base`. A plain AR base knows causal attention alone; take
            `bidirectional` when the base model is a trained denoiser.
        gate: strength of a soft mask at the start, relative to the scale of the embeddings; it is learned and stays
            positive.
        prompt: `visible` to the map (the adapter then has little left to tell) or `hidden` from it, so that the noise
            has to carry it.
        prompt_encoder: what the adapter reads of prompts: `states` of the frozen model (from the anchor cache; to
            generate, a copy of it is kept in memory unless the base stays frozen anyway), or its `embedding` rows.
            `auto`: states under `freeze_base`, else embedding.
        adapter_fraction: alpha, share of samples whose noise comes from the adapter; the others have N(0, 1).
        tau: of L_data / (2 tau^2).
        sigma: of L_obs / (2 sigma^2).
        kl_weight: beta at its full height; the KL divergence is a mean over dimensions.
        kl_warmup: part of the steps over which beta rises linearly from 0.
        observe_fraction: share of the adapter's samples that pay for L_obs (a forward and backward each).
        time_at_one: share of the samples at t = 1 exactly, where the one-pass sampler reads.
        time_power: the other times have density proportional to t^power.
        paired_share: part of the steps in the second phase; 0 leaves it out.
        paired_fraction: share of the samples of the second phase that are trained on the sampler's tokens; the others
            stay on the flow at t < 1, which keeps several passes in shape.
        rollout_steps: K, passes of the sampler that is imitated: that of the map as the first phase left it.
        statistics_sequences: training sequences over which the states' moments are taken.
    """

    shape: str | AdapterShape = "base"
    freeze_base: bool = False
    frozen_attention: Literal["causal", "bidirectional"] = "causal"
    gate: PositiveFloat = 0.1
    prompt: Literal["visible", "hidden"] = "visible"
    prompt_encoder: Literal["auto", "states", "embedding"] = "auto"
    adapter_fraction: Share = 0.5
    tau: PositiveFloat = 1.0
    sigma: PositiveFloat = 1.0
    kl_weight: NonNegativeFloat = 1.0
    kl_warmup: Share = 0.2
    observe_fraction: Share = 0.5
    time_at_one: Share = 0.25
    time_power: NonNegativeFloat = 2.0
    paired_share: Decay = 0.3
    paired_fraction: Fraction = 0.5
    rollout_steps: Annotated[int, Field(ge=2)] = 16
    statistics_sequences: PositiveInt = 512

    @property
    def sizes(self) -> AdapterShape:
        """The sizes, looked up where a name was given.

        Raises:
            DllmError: unknown name.
        """
        return named_sizes(self.shape, SHAPES, "VFM")

    @property
    def reads_states(self) -> bool:
        """Whether the adapter reads the frozen model's states of the prompt."""
        if self.prompt_encoder == "auto":
            return self.freeze_base
        return self.prompt_encoder == "states"

    @property
    def keeps_language_model(self) -> bool:
        """Whether prompts are read through a model that is not the trained one."""
        return self.reads_states and not self.freeze_base

    def requirements(self, num_layers: int) -> Requirements:
        """Ask for one layer's states of the prompts, where the adapter reads them."""
        _ = self.sizes
        if not self.reads_states:
            return Requirements()
        need = AnchorNeed(
            layers=(self.layer_name(num_layers),), positions="all", heldout=True, sequences=self.anchor_sequences
        )
        return Requirements(anchors=need)

    def capabilities(self) -> Capabilities:
        """No bound on the likelihood; evidence that the noise carries something is measured on held-out text."""
        return Capabilities(diagnostics=True, latent=True)

    def network(self, base: BaseShape) -> NetworkCost:
        """Return parameters and training FLOPs; the base model is among what is trained unless it is frozen."""
        shape, hidden = self.sizes, base.hidden
        if self.freeze_base:
            trainable = {"adapter": adapter_parameters(shape, hidden, spread=False) + 1}
            return NetworkCost(
                trainable=trainable, frozen=base.parameters, flops_per_response_token=self.training_flops(base)
            )
        trainable = {
            "base model": base.parameters,
            "adapter": adapter_parameters(shape, hidden),
            "time embedding": time_parameters(hidden),
        }
        return NetworkCost(
            trainable=trainable,
            frozen=base.parameters if self.reads_states else 0,  # the language model, to read prompts
            snapshot=base.parameters if self.paired_share else 0,  # the sampler to imitate
            flops_per_response_token=self.training_flops(base),
            flops_per_denoised_token=pass_flops(base, base.positions_per_response_token, 1.0, 2.0),
        )

    def training_flops(self, base: BaseShape) -> float:
        """Return operations of training per response token, averaged over the phases by their steps.

        A backward costs two forwards; one forward where only the gradient of the input is wanted (a frozen base).
        Passes of the rollout have no backward, and each but the last one makes softmax . E besides the logits.
        """
        shape, positions = self.sizes, base.positions_per_response_token
        prompt = positions - 1.0
        if self.freeze_base:
            adapter = 3.0 * adapter_flops(shape, base.hidden, prompt, base.length, spread=False)
            return adapter + 2.0 * pass_flops(base, positions, 0.5)
        rolled = self.paired_share * self.paired_fraction
        observed = self.adapter_fraction * self.observe_fraction * (prompt > 0)
        shown = 1.0 if self.prompt == "hidden" else 0.5
        return (
            3.0 * pass_flops(base, positions, 1.0)
            + 3.0 * self.adapter_fraction * adapter_flops(shape, base.hidden, prompt, base.length)
            + 3.0 * observed * pass_flops(base, positions, shown * prompt)
            + rolled * self.rollout_flops(base)
        )

    def rollout_flops(self, base: BaseShape) -> float:
        """Return operations of one rollout of K passes per response token."""
        positions = base.positions_per_response_token
        return (self.rollout_steps - 1) * pass_flops(base, positions, 1.0, 2.0) + pass_flops(base, positions, 1.0)

    def cost_factor(self) -> float:
        """Return passes, in units of one forward and backward (an adapter of 8 % of the base model counted in)."""
        if self.freeze_base:
            return 2.0 / 3.0 + 0.08
        observed = self.adapter_fraction * self.observe_fraction
        rolled = self.paired_share * self.paired_fraction
        return 1.0 + 0.08 * self.adapter_fraction + observed + rolled * self.rollout_steps / 3.0
