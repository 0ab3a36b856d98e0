"""Tiny LDLMs, ragged sequences and anchors in memory; the loss of one document in float64, as plainly as possible."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.data.anchor_extraction import extract
from dllm_core.data.anchors import AnchorStore
from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DllmError
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.ldlm.networks import LatentMap, LatentNetworks
from dllm_core.methods.ldlm.options import Options
from dllm_core.methods.ldlm.shapes import Shape
from dllm_core.methods.protocol import Resources
from tests.method_tools import DictAnchors
from tests.sequences import packed_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone
from tests.unit import layers_oracle

LAYERS, HIDDEN = 4, 32
SHAPE = Shape(
    latent_dim=12,
    encoder_width=16,
    encoder_depth=1,
    decoder_width=24,
    decoder_depth=2,
    denoiser_width=32,
    denoiser_depth=2,
    token_width=16,
    token_depth=1,
    prompt_depth=1,
    head_width=8,
)
"""Every width differs, so that mixing two of them up cannot pass."""


def tiny_ldlm(*, move: float = 0.1, seed: int = 0, shape: Shape = SHAPE, **options: Any) -> Method:
    """Return an LDLM on a 4-layer llama; `move` is the noise put on all its weights, those that start at zero too.

    Losses have the weights of the paper unless `options` say otherwise.
    """
    options = {"gate_ceiling": 1.0, "token_weight": 1.0, **options}
    base = Base.of(tiny_backbone("llama", layers=LAYERS))
    torch.manual_seed(seed)
    method = Method(None, Options(shape=shape, **options), base=base)
    return moved(method, move)


@torch.no_grad()
def moved(method: Method, size: float) -> Method:
    """Put noise on all weights that are trained, and on the statistics; the averages follow."""
    if size:
        for parameter in method.networks.parameters():
            parameter += size * torch.randn_like(parameter)
        method.mean_D.normal_()
        method.std_D.uniform_(0.5, 2.0)
        for name, average in method.ema.averages().items():
            average.copy_(method.networks.get_parameter(name))
    return method


def refusal(call: Callable[[], Any], kind: type[DllmError] = DllmError) -> tuple[str, str]:
    """Return the two lines with which a call is refused."""
    with pytest.raises(kind) as caught:
        call()
    problem, remedy = str(caught.value).split("\n")
    return problem, remedy


def ragged_sequences(sizes: Sequence[tuple[int, int]], vocab: int = NUM_TOKENS, seed: int = 0) -> SequenceSet:
    """Return one record a row of (prompt, response) tokens each, padded on the right."""
    length = max(p + r for p, r in sizes)
    generator = torch.Generator().manual_seed(seed)
    ids_NL = torch.randint(1, vocab, (len(sizes), length), generator=generator, dtype=torch.int32)
    place_NL = torch.arange(length, dtype=torch.int32).repeat(len(sizes), 1)
    prompt_N1, end_N1 = torch.tensor([[p] for p, _ in sizes]), torch.tensor([[p + r] for p, r in sizes])
    real_NL = place_NL < end_N1
    response_NL = real_NL & (place_NL >= prompt_N1)
    return SequenceSet(
        ids_NL.masked_fill(~real_NL, 0),
        response_NL,
        torch.where(real_NL, 0, -1).to(torch.int32),
        place_NL.masked_fill(~real_NL, 0),
        4 * response_NL.sum(1),
        vocab,
    )


LAYOUTS = {
    "ragged": lambda: ragged_sequences([(3, 5), (1, 2), (4, 6), (2, 4)]),
    "packed": lambda: packed_sequences(4, (5, 2, 4), 2, NUM_TOKENS),
}


def random_anchors(data: SequenceSet, layer: str, hidden: int = HIDDEN, seed: int = 1) -> Resources:
    """Return states of every row: N(0, 1) with an outlier at a document's first position, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for n, key in enumerate(data.keys):
        states_LD = torch.randn(data.length, hidden, generator=generator) + 0.5
        states_LD[data.position_NL[n] == 0] = 1e4
        states[key] = {layer: states_LD}
    return Resources(anchors=DictAnchors(states))  # type: ignore[arg-type]


def extracted_anchors(
    root: Path, data: SequenceSet, options: Options, backbone: Backbone | None = None, dtype: str = "fp32"
) -> Resources:
    """Return a real store with what the room asks for and no more."""
    teacher = backbone or tiny_backbone("llama", layers=LAYERS)
    need = options.requirements(teacher.num_layers).anchors
    store = AnchorStore(root, "teacher", dtype)
    extract(teacher, [data.batch_of(range(len(data)))], store, need.layers, positions=need.positions)
    return Resources(anchors=store)


# -- the oracle -----------------------------------------------------------------------------------------------------


def double(networks: LatentNetworks) -> LatentNetworks:
    return copy.deepcopy(networks).double()


def latent_map(module: LatentMap, x_LI: Tensor) -> Tensor:
    inner_LW = x_LI @ module.to_width.weight.T
    at_L, sees = range(len(x_LI)), torch.ones(2 * len(x_LI), dtype=torch.bool)
    found_LW = layers_oracle.perceiver(module.perceiver, inner_LW, inner_LW + module.query_W, at_L, at_L, sees)
    return x_LI @ module.straight.weight.T + found_LW @ module.out.weight.T


def encode(networks: LatentNetworks, h_LD: Tensor, normalise: bool = True) -> Tensor:
    z_LK = latent_map(networks.latent_encoder, h_LD)
    return z_LK * math.sqrt(z_LK.shape[1]) / z_LK.norm(dim=1, keepdim=True) if normalise else z_LK


def token_rows(networks: LatentNetworks, h_LD: Tensor) -> Tensor:
    decoder, everything = networks.token_decoder, torch.ones(len(h_LD), len(h_LD), dtype=torch.bool)
    inner_LW = h_LD @ decoder.to_width.weight.T
    inner_LW = layers_oracle.transformer(decoder.transformer, inner_LW, range(len(h_LD)), everything)
    straight_LD = h_LD @ decoder.straight.weight.T + decoder.intercept_D
    return decoder.log_scale.exp() * (straight_LD + inner_LW @ decoder.out.weight.T)


def denoise(networks: LatentNetworks, x_LK: Tensor, t: float, before_LK: Tensor, prompt_PD: Tensor) -> Tensor:
    """Return x0_hat of one document; `prompt_PD` holds no rows where there is no prompt or it was dropped."""
    denoiser, encoder, size = networks.denoiser, networks.prompt_encoder, len(prompt_PD)
    at_P = range(-size, 0)
    normed_PD = prompt_PD / (prompt_PD.square().mean(1, keepdim=True) + 1e-6).sqrt()
    inner_PW = normed_PD @ encoder.to_width.weight.T
    if size:
        all_PP = torch.ones(size, size, dtype=torch.bool)
        inner_PW = layers_oracle.transformer(encoder.transformer, inner_PW, at_P, all_PP)
    inner_LW = x_LK @ denoiser.from_noisy.weight.T + before_LK @ denoiser.from_before.weight.T
    sees = torch.ones(size + len(x_LK), dtype=torch.bool)
    out_LW = layers_oracle.dit(denoiser.dit, inner_LW, t, range(len(x_LK)), inner_PW, at_P, sees)
    return out_LW @ denoiser.out.weight.T + denoiser.out.bias


def documents(batch: Batch) -> list[tuple[int, list[int], list[int]]]:
    """Return (row, positions of the prompt, positions of the response) of every document that has a response."""
    found = []
    for row in range(len(batch)):
        for document in sorted(set(batch.document_BL[row].tolist()) - {-1}):
            own = [i for i, d in enumerate(batch.document_BL[row].tolist()) if d == document]
            response = [i for i in own if batch.response_BL[row, i]]
            if response:
                found.append((row, [i for i in own if i < response[0]], response))
    return found


@torch.no_grad()
def naive_losses(method: Method, batch: Batch, extras: dict[str, Tensor], resources: Resources) -> dict[str, float]:
    """Return the three losses and two accuracies of a batch, document after document, in float64."""
    networks, d = double(method.networks), method.options.schedule_d
    mean_D, std_D = method.mean_D.double(), method.std_D.double()
    table_VD = method.embedding_VD.double()
    head_VD = networks.token_head_VD
    head_VD = table_VD / table_VD.norm(dim=1, keepdim=True) if head_VD is None else head_VD
    sums = dict.fromkeys(("diffusion", "states", "tokens", "true hits", "true", "decoded hits", "decoded"), 0.0)
    num_tokens = 0
    for row, prompt, response in documents(batch):
        stored_LD = resources.anchors.states[batch.sequence_keys[row]][method.layer].double()
        h_LD = (stored_LD[response] - mean_D) / std_D
        ids_L = batch.input_ids_BL[row, response]
        num_tokens += len(ids_L)
        z_LK = encode(networks, h_LD, method.options.normalise == "rms")
        noise_LK, decoder_noise_LK = (extras[n][row, response].double() for n in ("noise_BTK", "decoder_noise_BTK"))
        decoded_LD = latent_map(networks.latent_decoder, z_LK + method.decoder_noise * decoder_noise_LK)
        sums["states"] += float((decoded_LD - h_LD).square().mean(1).sum())

        t = float(extras["time_B"][row])
        ratio = d * math.tan(math.pi * t / 2)
        alpha, sigma = 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)
        x_LK, before_LK = alpha * z_LK + sigma * noise_LK, torch.zeros_like(z_LK)
        prompt_PD = table_VD[batch.input_ids_BL[row, [] if extras["drop_prompt_B"][row] else prompt]]
        if extras["self_condition_B"][row]:
            before_LK = denoise(networks, x_LK, t, before_LK, prompt_PD)
        x0_LK = denoise(networks, x_LK, t, before_LK, prompt_PD)
        sums["diffusion"] += float((x0_LK - z_LK).square().mean(1).sum())

        true = bool(extras["true_states_B"][row])
        logp_LV = (token_rows(networks, h_LD if true else decoded_LD) @ head_VD.T).log_softmax(1)
        for i, token in enumerate(ids_L.tolist()):
            weight, name = float(extras["token_weight_BT"][row, response[i]]), "true" if true else "decoded"
            sums["tokens"] -= weight * float(logp_LV[i, token])
            sums[name] += weight
            sums[f"{name} hits"] += weight * (int(logp_LV[i].argmax()) == token)
    return {
        "diffusion_mse": sums["diffusion"] / num_tokens,
        "state_mse": sums["states"] / num_tokens,
        "token_nats": sums["tokens"] / num_tokens,
        "decode_true_accuracy": sums["true hits"] / max(1.0, sums["true"]),
        "reconstruction_noisy_accuracy": sums["decoded hits"] / max(1.0, sums["decoded"]),
    }
