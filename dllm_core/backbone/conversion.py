"""Turn an autoregressive checkpoint into one that a diffusion method can start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import Alignment, Contract, read_contract
from dllm_core.backbone.families import Family, check_config
from dllm_core.backbone.loading import load_causal_lm
from dllm_core.backbone.probe import assert_bidirectional
from dllm_core.backbone.sources import read_config, tokenizer_files

ROW_MULTIPLE = 64
NOISE_SHARE = 0.02


def convert(source_dir: Path | str, out_dir: Path | str, *, alignment: Alignment, seed: int = 0) -> Contract:
    """Write the converted form of a plain causal model.

    A mask row is added (mean of the token embeddings plus noise of 2 % of their RMS) at an id that neither the
    tokenizer nor the model uses, the vocabulary is padded to a multiple of 64, dropout is set to 0, attention is
    flipped in the config, every layer is probed, and the tokenizer files are copied as they are: the mask token has
    no string, so no text can spell it.

    A directory that is converted already is probed and copied, if it was made with the same alignment.

    Args:
        source_dir: config, weights and, where there is one, tokenizer of a causal model.
        out_dir: directory to write; created.
        alignment: `shifted` keeps the AR shift (state i-1 predicts token i), `same_position` does not.
        seed: keys the noise of the new rows.

    Returns:
        The contract, which is also in the written config.

    Raises:
        UnsupportedModelError: not a causal model of a supported family, weights that do not fit the config, or a
            layer that stays causal.
        ContractError: converted already, with the other alignment.
    """
    source, out = Path(source_dir), Path(out_dir)
    config = read_config(source)
    family = check_config(config, str(source_dir))
    if "dllm" in config:
        read_contract(source).require(alignment=alignment)
    model = load_causal_lm(source)
    _remove_dropout(model, family)
    contract = read_contract(source) if "dllm" in config else _add_mask_token(model, source, alignment, seed)
    backbone = Backbone(model, contract)
    assert_bidirectional(backbone)
    out.mkdir(parents=True, exist_ok=True)
    _keep_special_ids(model)
    backbone.save_pretrained(out)
    copy_tokenizer(source, out)
    return contract


def copy_tokenizer(source_dir: Path | str, out_dir: Path | str) -> None:
    """Copy the tokenizer's files, whichever of them there are."""
    for path in tokenizer_files(source_dir):
        shutil.copyfile(path, Path(out_dir) / path.name)


def tokenizer_size(directory: Path | str) -> int | None:
    """Return 1 + the highest id that the directory's tokenizer uses, added tokens included; None without one."""
    if not tokenizer_files(directory):
        return None
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    used = [*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder]
    return max(len(tokenizer), tokenizer.vocab_size, max(used, default=0) + 1)


def _keep_special_ids(model: Any) -> None:
    """Keep which ids begin, end and pad a text, and drop the rest of the generation config.

    Chat models name all their end tokens there and only there. A checkpoint's sampling defaults are not ours, and
    some of them cannot be saved again.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {n: getattr(model.generation_config, n, None) for n in names}
    for name, value in ids.items():
        if value is not None:
            setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**{n: getattr(model.config, n, None) for n in names})


def _remove_dropout(model: Any, family: Family) -> None:
    """Set dropout to 0: training noise is keyed per sample here, which dropout is not."""
    for name in family.dropouts:
        setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def _add_mask_token(model: Any, source: Path, alignment: Alignment, seed: int) -> Contract:
    rows = int(model.get_input_embeddings().weight.shape[0])
    num_tokens = tokenizer_size(source) or rows
    mask_id = max(rows, num_tokens)
    _add_rows(model, num_old=rows, num_real=min(rows, num_tokens), num_new=_round_up(mask_id + 1), seed=seed)
    return Contract(alignment=alignment, mask_token_id=mask_id, num_tokens=num_tokens)


def _round_up(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


@torch.no_grad()
def _add_rows(model: Any, *, num_old: int, num_real: int, num_new: int, seed: int) -> None:
    model.resize_token_embeddings(num_new, mean_resizing=False)
    tables = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not tables[0]:
        tables.append(model.get_output_embeddings().weight)
    generator = torch.Generator().manual_seed(seed)
    for weight_VD in tables:
        weight_VD[num_old:] = _new_rows(weight_VD[:num_real], num_new - num_old, generator).to(weight_VD)


def _new_rows(weight_VD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    weight_VD = weight_VD.float()
    noise_RD = torch.randn(count, weight_VD.shape[1], generator=generator)
    return weight_VD.mean(0) + NOISE_SHARE * weight_VD.square().mean().sqrt() * noise_RD
