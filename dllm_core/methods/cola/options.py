"""Options of Cola DLM (arXiv:2605.06548) on frozen states of an autoregressive model, or of a cell made from it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dllm_core.methods.cola.shapes import SHAPES, Shape, parameter_table, prior_flops, vae_flops
from dllm_core.methods.latent_options import LatentOptions, Share, named_sizes
from dllm_core.methods.requirements import AnchorNeed, BaseShape, Capabilities, NetworkCost, Requirements

AR = "ar"
"""As `backbone`: the unconverted model, which trains nothing."""


class Options(LatentOptions):
    """Options of `cola`; `layer`, `anchor_sequences` and others that it shares are told in `LatentOptions`.

    Attributes:
        shape: name of a set of sizes, or the sizes themselves; K, the latent width of a token, is one of them.
        backbone: whose states; `ar` is the unconverted model, any other name a cell of the grid that trains the model
            itself, e.g. repr_align_all: it is trained first, then its states are cached under its own identity, and
            its embeddings are read out along. Read causally, whatever attention the cell was trained with (see
            `requirements`).
        block_size: tokens per block of the prior, from the start of a document.
        vae_share: part of the budget for the autoencoder; the prior gets the rest.
        settle: part of the autoencoder's phase, at its end, in which the encoder stands still: the decoder goes on,
            and the statistics that standardise latents are taken.
        beta: weight of the KL, a mean over dimensions, in nats.
        masked_share: share of the rows that the masked view hides from the encoder.
        masked_weight: weight of that view's cross-entropy; 0 leaves the view out.
        start: `linear` starts the autoencoder from closed forms (reduced-rank regression) and the prior from the best
            linear guess, which it corrects; `random` starts from noise and from 0.
        start_log_variance: of the posterior at the start; latents start with variance 1.
        time_location: t = sigmoid(location + scale N(0, 1)), one per document; above 0 is more noise.
        time_scale: of those times.
        clean_prefix: share of the blocks of which a random beginning is known, as where a prompt ends inside a block.
        prefix_drop: share of the blocks trained without what comes before, for classifier-free guidance.
        joint: train the autoencoder on in the prior's phase.
        vae_weight: of the autoencoder's loss in the joint stage.
        flow_weight: of the flow loss.
        reference_weight: in the joint stage, of the KL (a mean over dimensions) of the posterior from that of the
            encoder as the first phase left it.
        guidance: scale g of classifier-free guidance against the empty prefix, v_u + g (v_c - v_u); 1 needs no second
            pass.
        block_steps: Euler steps of every block, whatever the request says; None spreads the requested steps over the
            blocks of the response.
    """

    shape: str | Shape = "laptop"
    backbone: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = AR
    block_size: PositiveInt = 16
    vae_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    settle: Share = 0.1
    beta: NonNegativeFloat = 1e-3
    masked_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    masked_weight: NonNegativeFloat = 1.0
    start_log_variance: float = -3.0
    time_location: float = 1.0
    time_scale: PositiveFloat = 1.0
    clean_prefix: Share = 0.05
    prefix_drop: Share = 0.1
    joint: bool = False
    vae_weight: NonNegativeFloat = 1.0
    flow_weight: PositiveFloat = 1.0
    reference_weight: NonNegativeFloat = 0.1
    guidance: NonNegativeFloat = 2.0
    block_steps: PositiveInt | None = None

    @property
    def sizes(self) -> Shape:
        """The sizes, looked up where a name was given.

        Raises:
            DllmError: unknown name.
        """
        return named_sizes(self.shape, SHAPES, "cola")

    @property
    def keeps_language_model(self) -> bool:
        """Always: prompts are read through the language model."""
        return True

    def facts(self, base: BaseShape) -> dict[str, Any]:
        """Return latent width, layer and block size."""
        return {"latent_dim": self.sizes.latent_dim, **super().facts(base), "block_size": self.block_size}

    def requirements(self, num_layers: int) -> Requirements:
        """Ask for one layer's states of prompts and responses, held-out sequences included.

        States are read in one causal pass over clean tokens, those of a cell that was trained to see both sides too:
        state i then follows from the tokens 0..i alone. That is what the autoencoder promises (changing token j leaves
        the latents before j as they are) and what makes the prompt's states in generating those of training. A pass
        that sees both sides would give neither: in training the states of a prompt would hold its response, in
        generating there is none, and masks in its place would tie them to the length asked for. The price: the cell
        runs with an attention that it was not trained with. One pass a prefix would keep its own attention, at as many
        passes as there are tokens.

        Raises:
            DllmError: unknown shape or layer.
        """
        _ = self.sizes
        return Requirements(
            anchors=AnchorNeed(
                layers=(self.layer_name(num_layers),),
                positions="all",
                heldout=True,
                sequences=self.anchor_sequences,
                cell=None if self.backbone == AR else self.backbone,
            )
        )

    def capabilities(self) -> Capabilities:
        """No masks and no bound on the likelihood; blocks stream, and their cache is exact."""
        return Capabilities(diagnostics=True, latent=True, streaming=True, exact_cache=True)

    def network(self, base: BaseShape) -> NetworkCost:
        """Return parameters and training FLOPs; generating needs the language model besides, for the prompt."""
        table = parameter_table(self.sizes, base)
        return NetworkCost(
            trainable=table,
            frozen=base.hidden * base.vocab + (table["encoder"] if self.joint else 0),
            flops_per_response_token=self.training_flops(base),
        )

    def training_flops(self, base: BaseShape) -> float:
        """Return operations of an average step per response position, its share of prompt positions included."""
        slots, responses = base.length, base.response
        settled, moving = (self.vae_flops(base, slots, moves=moves, responses=responses) for moves in (False, True))
        first = self.settle * settled + (1.0 - self.settle) * moving
        # whole blocks, as `Spans.halves` cuts them
        clean = (slots - 1) // self.block_size * self.block_size
        noisy = slots - int(slots - responses) // self.block_size * self.block_size
        second = self.prior_flops(base, slots, clean, noisy, responses=responses)
        return (self.vae_share * first + (1.0 - self.vae_share) * second) / responses

    def vae_flops(self, base: BaseShape, slots: float, *, moves: bool, responses: float, documents: int = 1) -> float:
        """Return operations of the autoencoder's loss, forward and backward.

        A backward costs two forwards, one where only the input's gradient is wanted (the frozen head).

        Args:
            base: the base model's shape.
            slots: positions of documents, prompts included.
            moves: the encoder is trained too.
            responses: of them, response positions.
            documents: equally long documents that these are the positions of; none attends to another.
        """
        flops, views = vae_flops(self.sizes, base, slots / documents), 2.0 if self.masked_weight else 1.0
        networks = views * slots * ((3.0 if moves else 1.0) * flops["encoder"] + 3.0 * flops["decoder"])
        read_out = self.token_fraction + (self.masked_share if self.masked_weight else 0.0)
        return networks + 2.0 * read_out * responses * flops["head"]

    def prior_flops(
        self, base: BaseShape, slots: float, clean: float, noisy: float, *, responses: float, documents: int = 1
    ) -> float:
        """Return operations of a step of the second phase, forward and backward.

        Args:
            base: the base model's shape.
            slots: positions of documents, prompts included.
            clean, noisy: positions of the prior's halves.
            responses: response positions.
            documents: as for `vae_flops`.
        """
        halves = prior_flops(self.sizes, clean / documents, noisy / documents)
        prior = 3.0 * (clean * halves["clean"] + noisy * halves["noisy"])
        encoder = slots * vae_flops(self.sizes, base, slots / documents)["encoder"]
        if not self.joint:
            return prior + encoder
        reference = encoder if self.reference_weight else 0.0
        return prior + reference + self.vae_flops(base, slots, moves=True, responses=responses, documents=documents)
