"""What latent rooms leave out of their operations: attention scores, counted here at the laptop's sizes."""

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
from tests.cola_tools import in_phase
from tests.ldlm_tools import random_anchors
from tests.method_tools import step_info
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS

PROMPT, RESPONSE = 32, 128
"""Of the laptop's windows."""
LDLM, COLA = LdlmOptions(self_condition=1.0), ColaOptions()
LDLM_STEP = LDLM.step_flops(LDLM_BASES["laptop"], RESPONSE, PROMPT)
VAE_STEP = COLA.vae_flops(COLA_BASES["laptop"], PROMPT + RESPONSE, moves=True, responses=RESPONSE)
CLEAN = PROMPT + RESPONSE - COLA.block_size
PRIOR_STEP = COLA.prior_flops(COLA_BASES["laptop"], PROMPT + RESPONSE, CLEAN, RESPONSE, responses=RESPONSE)


@pytest.mark.parametrize(
    ("room", "options", "info", "told", "share"),
    [
        (Ldlm, LDLM, step_info(step=1, steps=100), LDLM_STEP, 0.06),
        (Cola, COLA, in_phase("vae"), VAE_STEP, 0.04),
        (Cola, COLA, in_phase("prior"), PRIOR_STEP, 0.09),
    ],
)
def test_attention_scores_are_the_small_part_that_is_said(room, options, info, told, share, monkeypatch):
    monkeypatch.setattr(attention, "is_plain", lambda *_: True)  # products that torch's counter knows
    contract, hidden = Contract(mask_token_id=NUM_TOKENS, num_tokens=NUM_TOKENS), LDLM_BASES["laptop"].hidden
    table_VD = torch.randn(NUM_TOKENS, hidden, generator=torch.Generator().manual_seed(0))  # scores read no words
    base = Base(contract=contract, num_layers=30, eos_token_ids=(0,), hidden=hidden, embedding_VD=table_VD)
    method = room(None, options, base=base)
    data = random_sequences(1, PROMPT + RESPONSE, PROMPT, NUM_TOKENS)
    corrupted = method.corrupt(data.batch_of([0]), info, NoiseSource(0))
    with FlopCounterMode(display=False) as counter:
        out = method.loss(corrupted, method.totals(corrupted), info, random_anchors(data, method.layer, hidden))
        out.loss.backward()
    scores = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    assert scores / told == pytest.approx(share, abs=0.005)
