"""Operations of latent rooms, attention scores included, against torch's counter at the laptop's sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dllm_core.backbone.contract import Contract
from dllm_core.corruption.noise import NoiseSource
from dllm_core.layers import attention
from dllm_core.methods.cola.method import Method as Cola
from dllm_core.methods.cola.options import Options as ColaOptions
from dllm_core.methods.cola.shapes import BASES as COLA_BASES
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.ldlm.method import Method as Ldlm
from dllm_core.methods.ldlm.options import Options as LdlmOptions
from dllm_core.methods.ldlm.shapes import BASES as LDLM_BASES
from dllm_core.methods.vfm.adapter import Adapter
from dllm_core.methods.vfm.shapes import AdapterShape, adapter_flops
from tests.cola_tools import in_phase
from tests.ldlm_tools import random_anchors
from tests.method_tools import step_info
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS

ROWS, PROMPT, RESPONSE = 2, 32, 128
"""The laptop's windows."""
CLEAN = PROMPT + RESPONSE - ColaOptions().block_size
NO_KEYS = 10**15
"""As many sequences as no batch holds: what is left of the closed forms are weights."""


def of_ldlm(options, base, sequences):
    return options.step_flops(base, ROWS * RESPONSE, ROWS * PROMPT, sequences=sequences)


def of_vae(options, base, documents, *, moves=True):
    slots = ROWS * (PROMPT + RESPONSE)
    return options.vae_flops(base, slots, moves=moves, responses=ROWS * RESPONSE, documents=documents)


def of_settled(options, base, documents):
    return of_vae(options, base, documents, moves=False)


def of_prior(options, base, documents):
    slots, clean, noisy = ROWS * (PROMPT + RESPONSE), ROWS * CLEAN, ROWS * RESPONSE
    return options.prior_flops(base, slots, clean, noisy, responses=noisy, documents=documents)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Attention by the products that torch's counter knows."""
    monkeypatch.setattr(attention, "is_plain", lambda *_: True)


@pytest.mark.parametrize(
    ("room", "options", "info", "closed"),
    [
        (Ldlm, LdlmOptions(self_condition=1.0, consistency=0.0), step_info(step=1, steps=100), of_ldlm),
        (Ldlm, LdlmOptions(self_condition=0.0, consistency=1.0), step_info(step=1, steps=100), of_ldlm),
        (Cola, ColaOptions(settle=0.0), in_phase("vae"), of_vae),
        (Cola, ColaOptions(settle=1.0), in_phase("vae"), of_settled),
        (Cola, ColaOptions(), in_phase("prior"), of_prior),
        (Cola, ColaOptions(joint=True), in_phase("prior"), of_prior),
    ],
    ids=["ldlm", "ldlm_consistency", "vae", "vae_settled", "prior", "joint"],
)
def test_what_a_step_reports_is_what_torch_counts(room, options, info, closed):
    """Scores exactly; all of it to two per cent, the first matrices' input gradients and modulations."""
    bases = LDLM_BASES if room is Ldlm else COLA_BASES
    contract, hidden = Contract(mask_token_id=NUM_TOKENS, num_tokens=NUM_TOKENS), bases["laptop"].hidden
    table_VD = torch.randn(NUM_TOKENS, hidden, generator=torch.Generator().manual_seed(0))
    base = Base(contract=contract, num_layers=30, eos_token_ids=(0,), hidden=hidden, embedding_VD=table_VD)
    method = room(None, options, base=base)
    data = random_sequences(ROWS, PROMPT + RESPONSE, PROMPT, NUM_TOKENS)
    corrupted = method.corrupt(data.batch_of(range(ROWS)), info, NoiseSource(0))
    with FlopCounterMode(display=False) as counter:
        out = method.loss(corrupted, method.totals(corrupted), info, random_anchors(data, method.layer, hidden))
        out.loss.backward()
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    scores = sum(flops for op, flops in found.items() if "bmm" in op)
    assert out.flops == closed(options, base.shape, ROWS)
    assert scores == pytest.approx(out.flops - closed(options, base.shape, NO_KEYS), rel=1e-6)
    assert sum(found.values()) == pytest.approx(out.flops, rel=0.02)


@pytest.mark.parametrize("spread", [True, False])
def test_the_adapter_of_vfm_costs_what_torch_counts(spread):
    shape, hidden = AdapterShape(), 192
    adapter = Adapter(hidden, hidden, shape, spread=spread)
    there = {"visible_SP": torch.ones(ROWS, PROMPT).bool(), "real_SL": torch.ones(ROWS, RESPONSE).bool()}
    with FlopCounterMode(display=False) as counter:
        adapter(torch.randn(ROWS, PROMPT, hidden), **there)
    told = adapter_flops(shape, hidden, PROMPT / RESPONSE, PROMPT + RESPONSE, spread=spread)
    assert told * ROWS * RESPONSE == pytest.approx(counter.get_total_flops(), rel=1e-9)
