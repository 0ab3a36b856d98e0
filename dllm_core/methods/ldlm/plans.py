"""A generation of one shape, planned: everything that no input changes is made once, the rest runs without waiting.

B batch, L new tokens, P prompt tokens, S steps, K latent dimension, W width of a network, D width of the states,
V vocabulary, N heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.kernels.token_stats import argmax
from dllm_core.layers.attention import NORM_EPS
from dllm_core.layers.graphs import CudaRecorder, Graph
from dllm_core.layers.packed_linear import Layout, layout, linear
from dllm_core.methods.ldlm import parts
from dllm_core.methods.ldlm.networks import LatentMap, TokenDecoder, prompt_positions
from dllm_core.methods.ldlm.packed import (
    AttentionWeights,
    DiTWeights,
    FeedForwardWeights,
    Looked,
    Modulation,
    Norm,
    Table,
    TransformerWeights,
    dit_block,
    look_at,
)
from dllm_core.samplers.continuous import STOCHASTIC, Solver
from dllm_core.samplers.continuous import plan as solver_plan

if TYPE_CHECKING:
    from dllm_core.methods.ldlm.method import Method

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**29}
"""Elements of logits that are held at a time; every further piece reads the head again."""


@dataclass(frozen=True)
class Shape:
    """What a plan is made for.

    Attributes:
        batch: B.
        prompt: P.
        tokens: L.
        steps: S.
        solver: resolved.
        guidance: scale of classifier-free guidance.
    """

    batch: int
    prompt: int
    tokens: int
    steps: int
    solver: Solver
    guidance: float = 1.0

    @property
    def num_noises(self) -> int:
        """Draws of N(0, 1) per latent: the start, and one a step but the last for stochastic solvers."""
        return self.steps if self.solver in STOCHASTIC else 1


class ReadOut(NamedTuple):
    """The latent decoder, or the token decoder: straight(x) + b + out(inner(x)), the two matrices side by side.

    Attributes:
        to_width: [W, inputs].
        query_W: what a Perceiver's queries add to their slots; None for the token decoder.
        layers: of the Perceiver or transformer.
        norm: the final one.
        both: [outputs, inputs + W].
        intercept: b of the token decoder; None for the latent decoder.
    """

    to_width: Tensor
    query_W: Tensor | None
    layers: list[TransformerWeights]
    norm: Norm
    both: Tensor
    intercept: Tensor | None

    @classmethod
    def of(cls, module: LatentMap | TokenDecoder, lay: Layout) -> ReadOut:
        """Take a module's weights."""
        both = lay(torch.cat((module.straight.weight, module.out.weight), dim=1))
        if isinstance(module, LatentMap):
            layers, norm, query = module.perceiver.layers, module.perceiver.norm, module.query_W.detach()
            made = [
                TransformerWeights(
                    Norm.of(layer.latent_norm),  # type: ignore[arg-type]
                    AttentionWeights.of(layer.attention, lay, looks_elsewhere=True),  # type: ignore[arg-type]
                    Norm.of(layer.feedforward_norm),  # type: ignore[arg-type]
                    FeedForwardWeights.of(layer.feedforward, lay),  # type: ignore[arg-type]
                    Norm.of(layer.input_norm),  # type: ignore[arg-type]
                )
                for layer in layers
            ]
            return cls(lay(module.to_width.weight), query, made, Norm.of(norm), both, None)
        made, final = _transformer(module.transformer.blocks, lay), Norm.of(module.transformer.norm)
        return cls(lay(module.to_width.weight), None, made, final, both, module.intercept_D.detach())


def _transformer(blocks: torch.nn.ModuleList, lay: Layout) -> list[TransformerWeights]:
    return [
        TransformerWeights(
            Norm.of(block.attention_norm),  # type: ignore[arg-type]
            AttentionWeights.of(block.attention, lay),  # type: ignore[arg-type]
            Norm.of(block.feedforward_norm),  # type: ignore[arg-type]
            FeedForwardWeights.of(block.feedforward, lay),  # type: ignore[arg-type]
        )
        for block in blocks
    ]


class Weights:
    """The generating networks of a method, laid out once and shared by its plans.

    Memory: on a CPU with oneDNN as much again as the networks; elsewhere the attentions' matrices and the token head
    if that is made from the embeddings.

    Args:
        method: in the dtype and on the device that it generates with.
        rows: rows of a typical product.
    """

    @torch.no_grad()
    def __init__(self, method: Method, rows: int) -> None:
        networks = method.networks
        self.dtype, self.device = method.embedding_VD.dtype, method.device
        self.networks = networks
        lay = layout(self.device, self.dtype, rows)
        self.embedding_VD = method.embedding_VD.detach()
        encoder, denoiser = networks.prompt_encoder, networks.denoiser
        self.prompt_in = lay(encoder.to_width.weight)
        self.prompt_blocks = _transformer(encoder.transformer.blocks, lay)
        self.prompt_norm = Norm.of(encoder.transformer.norm)
        self.denoiser_in = lay(torch.cat((denoiser.from_noisy.weight, denoiser.from_before.weight), dim=1))
        self.denoiser_blocks = [
            DiTWeights(
                AttentionWeights.of(block.attention, lay, looks_elsewhere=True),  # type: ignore[arg-type]
                FeedForwardWeights.of(block.feedforward, lay),  # type: ignore[arg-type]
            )
            for block in denoiser.dit.blocks
        ]
        self.denoiser_out, self.denoiser_bias = lay(denoiser.out.weight), denoiser.out.bias.detach()
        self.latent_decoder = ReadOut.of(networks.latent_decoder, lay)
        self.token_decoder = ReadOut.of(networks.token_decoder, lay)
        self.token_scale = networks.token_decoder.log_scale.detach().exp()
        self.head = lay(method.head_VD)
        self.vocab = method.head_VD.shape[0]


class Plan:
    """One shape's buffers and tables, and its run.

    Args:
        method: whose schedule, time grid and modulations are planned with.
        weights: its weights.
        shape: what is generated.
        run: implementations of the element-wise parts.

    Attributes:
        ids_BP: prompts are put here.
        noise_RBLK: and noises here: the start, then of each step (`Shape.num_noises`).
        latents_BLK: clean latents of the last run.
        outputs_BLD: what is multiplied with the head's rows, of the last run.
        tokens_BL: the most probable tokens, of the last run.
    """

    tokens_BL: Tensor
    latents_BLK: Tensor
    outputs_BLD: Tensor

    @torch.no_grad()
    def __init__(self, method: Method, weights: Weights, shape: Shape, run: parts.Parts) -> None:
        self.weights, self.shape, self.run_parts = weights, shape, run
        device, dtype, latent = weights.device, weights.dtype, weights.networks.latent_dim
        self.ids_BP = torch.zeros(shape.batch, shape.prompt, dtype=torch.long, device=device)
        self.noise_RBLK = torch.zeros(shape.num_noises, shape.batch, shape.tokens, latent, dtype=dtype, device=device)
        self._state = torch.zeros(shape.batch, shape.tokens, 2 * latent, dtype=dtype, device=device)
        self._plan_times(method)
        self._plan_tables()
        self._graph: Graph | None = None

    def _plan_times(self, method: Method) -> None:
        shape, dit = self.shape, self.weights.networks.denoiser.dit
        times = method.times.grid(shape.steps, method.options.grid).tolist()
        self._numbers = solver_plan(shape.solver, times, method.schedule)
        self._number_rows = torch.tensor(self._numbers, dtype=torch.float32, device=self.weights.device)
        # of all steps, then of the clean prompt
        moments = torch.tensor([*times[:-1], 0.0], dtype=torch.float32, device=self.weights.device)
        found = dit.modulations(moments)
        self._modulations = [Modulation.of(block) for block in found.blocks]
        shift, scale = found.final.chunk(2, dim=-1)
        self._final = list(zip(shift.contiguous(), (1 + scale).contiguous(), strict=True))

    def _plan_tables(self) -> None:
        """Make rotary tables and buffers for keys and values; blocks of one network take turns with a buffer."""
        weights, shape, device = self.weights, self.shape, self.weights.device
        table_dtype = torch.float32 if self.run_parts.in_tensors else weights.dtype
        slot_L, prompt_P = torch.arange(shape.tokens, device=device), prompt_positions(shape.prompt, device)

        def tables(blocks: list[TransformerWeights] | list[DiTWeights], positions: Tensor) -> list[Table]:
            return [Table.at(positions, block.attention.norms, table_dtype) for block in blocks]

        def buffer(block: TransformerWeights | DiTWeights, keys: int) -> Looked:
            attention = block.attention
            return Looked.empty(self._state, shape.batch, attention.num_heads, keys, attention.norms.shape[-1])

        self._prompt_tables = tables(weights.prompt_blocks, prompt_P)
        self._prefix_tables = tables(weights.denoiser_blocks, prompt_P)
        self._denoiser_tables = tables(weights.denoiser_blocks, slot_L)
        self._decoder_tables = tables(weights.latent_decoder.layers, slot_L)
        self._token_tables = tables(weights.token_decoder.layers, slot_L)
        self._prompt_looked = [buffer(b, shape.prompt) for b in weights.prompt_blocks[:1]]
        self._denoiser_looked = [buffer(b, shape.prompt + shape.tokens) for b in weights.denoiser_blocks]
        self._decoder_looked = [buffer(b, 2 * shape.tokens) for b in weights.latent_decoder.layers[:1]]
        self._token_looked = [buffer(b, shape.tokens) for b in weights.token_decoder.layers[:1]]

    # -- one run ------------------------------------------------------------------------------------------------------

    def _read_prompt(self) -> None:
        """Write the prompt's keys and values into the denoiser's buffers."""
        weights, run = self.weights, self.run_parts
        embedded_BPD = weights.embedding_VD[self.ids_BP]
        x_BPW = linear(F.rms_norm(embedded_BPD, embedded_BPD.shape[-1:], eps=NORM_EPS), weights.prompt_in)
        for block, table in zip(weights.prompt_blocks, self._prompt_tables, strict=True):
            x_BPW = block(run, x_BPW, table, self._prompt_looked[0])
        context_BPW = run.normed(x_BPW, *weights.prompt_norm)
        for denoising, moments, table, looked in zip(
            weights.denoiser_blocks, self._modulations, self._prefix_tables, self._denoiser_looked, strict=True
        ):
            clean = moments[-1]
            normed_BPW = run.modulated(context_BPW, clean.shift_a, clean.scale_a)
            look_at(run, normed_BPW, denoising.attention, table, looked)

    def _pass(self, k: int, inner_BLW: Tensor, first: int) -> Tensor:
        """Return the prediction of step k with the places of the buffers from `first` on."""
        weights, run = self.weights, self.run_parts
        for block, moments, table, looked in zip(
            weights.denoiser_blocks, self._modulations, self._denoiser_tables, self._denoiser_looked, strict=True
        ):
            inner_BLW = dit_block(run, inner_BLW, block, moments[k], table, looked.beyond(first) if first else looked)
        return linear(run.modulated(inner_BLW, *self._final[k]), weights.denoiser_out, weights.denoiser_bias)

    def _predict(self, k: int) -> Tensor:
        inner_BLW = linear(self._state, self.weights.denoiser_in)
        found_BLK = self._pass(k, inner_BLW, 0)
        if self.shape.guidance == 1.0:
            return found_BLK
        without_BLK = self._pass(k, inner_BLW, self.shape.prompt)
        return without_BLK + self.shape.guidance * (found_BLK - without_BLK)

    def _denoise(self) -> Tensor:
        latent_BLK, before_BLK = self._state.chunk(2, dim=-1)
        latent_BLK.copy_(self.noise_RBLK[0])
        before_BLK.zero_()
        step, numbers = self.run_parts.step, self._number_rows if self.run_parts.in_tensors else self._numbers
        for k in range(self.shape.steps - 1):
            noise = self.noise_RBLK[k + 1] if self._numbers[k].c_noise else None
            step(self._state, self._predict(k), noise, numbers[k])
        return self._predict(self.shape.steps - 1)

    def _read_out(self, x_BLI: Tensor, weights: ReadOut, tables: list[Table], looked: list[Looked]) -> Tensor:
        run, inner_BLW = self.run_parts, linear(x_BLI, weights.to_width)
        seen_BLW = None
        if weights.query_W is not None:
            seen_BLW, inner_BLW = inner_BLW, inner_BLW + weights.query_W
        for layer, table in zip(weights.layers, tables, strict=True):
            inner_BLW = layer(run, inner_BLW, table, looked[0], seen_BLW)
        joined_BLC = torch.cat((x_BLI, run.normed(inner_BLW, *weights.norm)), dim=-1)
        return linear(joined_BLC, weights.both, weights.intercept)

    def _read_tokens(self) -> Tensor:
        rows_MD = self.outputs_BLD.flatten(0, 1)
        size = max(1, LOGITS_AT_ONCE[rows_MD.device.type] // self.weights.vocab)
        best = [argmax(linear(piece, self.weights.head)) for piece in rows_MD.split(size)]
        return torch.cat(best).view(self.shape.batch, self.shape.tokens)

    def _generate(self) -> None:
        weights = self.weights
        self._read_prompt()
        self.latents_BLK = self._denoise()
        states_BLD = self._read_out(
            self.latents_BLK, weights.latent_decoder, self._decoder_tables, self._decoder_looked
        )
        outputs_BLD = self._read_out(states_BLD, weights.token_decoder, self._token_tables, self._token_looked)
        self.outputs_BLD = outputs_BLD.mul_(weights.token_scale)
        self.tokens_BL = self._read_tokens()

    def capture(self) -> None:
        """Record a run as a CUDA graph, which `run` replays; everything is compiled and chosen in two runs before."""
        self._graph = CudaRecorder(self.weights.device).record(torch.no_grad()(self._generate))

    def run(self) -> Tensor:
        """Generate from `ids_BP` and `noise_RBLK`; return `tokens_BL`, which the next run overwrites."""
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.no_grad():
                self._generate()
        return self.tokens_BL
