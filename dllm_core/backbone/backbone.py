"""A transformers decoder that runs with causal or bidirectional attention, under a contract.

B batch, L length, M rows (of a mask: keys), D hidden, V vocabulary rows (padded).

Attention is flipped through the interface transformers supports (`is_causal` in the call, a prepared 4-D mask), so no
modelling code is copied and the plain path keeps the flash kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dllm_core.backbone import attention, masks
from dllm_core.backbone.contract import Contract, read_contract
from dllm_core.backbone.families import Family, check_config
from dllm_core.backbone.loading import load_causal_lm, no_progress_bars
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.errors import DllmError, did_you_mean

FREEZE_RULES = ("embeddings", "mlp")


class Backbone(nn.Module):
    """A converted decoder: `hidden` runs it, `logits` reads it out, `capture` looks inside.

    Args:
        model: a transformers `*ForCausalLM` of a supported family whose vocabulary is already padded.
        contract: what the checkpoint promises.

    Attributes:
        blocked_V: bool; ids that are never predicted (mask and padding rows).
    """

    blocked_V: Tensor

    def __init__(self, model: PreTrainedModel, contract: Contract) -> None:
        super().__init__()
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.register())
        self.model = model
        self.contract = contract
        self.family: Family = check_config(model.config.to_dict(), type(model).__name__)
        rows = self.embedding_weight_VD.shape[0]
        contract.require_rows(rows)
        self.register_buffer("blocked_V", torch.arange(rows) >= contract.num_tokens, persistent=False)
        self._in_hidden = False
        self._fp32_buffers = {
            name: buffer.detach().clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")
        }

    # -- keeping ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        directory: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        expect: dict[str, Any] | None = None,
        attn_implementation: str = "sdpa",
    ) -> Backbone:
        """Load a converted checkpoint.

        Args:
            directory: what `save_pretrained` or `conversion.convert` wrote.
            dtype: of the weights.
            device: of the weights.
            expect: contract fields that the caller relies on.
            attn_implementation: transformers' name; `sdpa` or `eager`.

        Raises:
            ContractError: the directory holds no converted checkpoint, or one made under another contract.
            UnsupportedModelError: weights that do not fit their config.
        """
        contract = read_contract(directory)
        contract.require(**(expect or {}))
        model = load_causal_lm(directory, dtype=dtype, attn_implementation=attn_implementation)
        return cls(model, contract).to(device)

    def save_pretrained(self, directory: Path | str) -> None:
        """Write safetensors weights and a config that holds the contract and `is_causal: false`."""
        self.model.config.is_causal = False
        self.model.config.dllm = self.contract.model_dump()
        with no_progress_bars():
            self.model.save_pretrained(str(directory))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        super()._apply(fn, recurse)
        # rotary frequencies stay fp32: rounded to bf16 they put a position of a few hundred off by whole radians
        for name, saved in self._fp32_buffers.items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if getattr(module, leaf).dtype != saved.dtype:
                setattr(module, leaf, saved.to(self.blocked_V.device))
        return self

    # -- parts ------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def decoder(self) -> nn.Module:
        """The decoder without its head."""
        module: nn.Module = getattr(self.model, self.family.base)
        return module

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks; layer k of the 1-indexed names is `layers[k - 1]`."""
        blocks: nn.ModuleList = getattr(self.decoder, self.family.layers)
        return blocks

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def head_weight_VD(self) -> Tensor:
        """Rows of the output head; the embedding itself where the head is tied."""
        head: Any = self.model.get_output_embeddings()
        weight: Tensor = head.weight
        return weight

    @property
    def embedding_weight_VD(self) -> Tensor:
        table: Any = self.model.get_input_embeddings()
        weight: Tensor = table.weight
        return weight

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence; empty where the model has none."""
        eos = self.config.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)

    @property
    def device(self) -> torch.device:
        return self.embedding_weight_VD.device

    @property
    def is_tied(self) -> bool:
        return self.head_weight_VD is self.embedding_weight_VD

    # -- running ----------------------------------------------------------------------------------------------------

    def hidden(
        self,
        input_ids_BL: Tensor | None = None,
        *,
        causal: bool,
        document_BL: Tensor | None = None,
        position_BL: Tensor | None = None,
        inputs_embeds_BLD: Tensor | None = None,
        attention_mask_B1LM: Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> Tensor:
        """Return the states after the final norm, [B, L, D].

        Args:
            input_ids_BL: int64; exactly one of ids and embeddings is given.
            causal: attention runs left to right instead of both ways.
            document_BL: document of each token, -1 for padding. None or all 0 needs no mask and keeps the flash
                kernels; otherwise documents do not see each other and padding is seen by nobody.
            position_BL: position of each token, [B or 1, L]; default 0..L-1, with a cache the slots written.
            inputs_embeds_BLD: token embeddings in place of ids.
            attention_mask_B1LM: boolean [B or 1, 1, L, M], True where query sees key; replaces `causal` and
                `document_BL`. M is L, with a cache the slots it shows.
            cache: where `at` was called on it, keys and values of the tokens given are written and read with those
                that are there already. The L tokens given see all M visible slots unless a mask or `causal` says
                otherwise. Documents are a mask's business then, and so is the length the caller's (`check_length`).

        Raises:
            DllmError: a position is beyond the model's last, or slots beyond the cache's.
        """
        assert (input_ids_BL is None) != (inputs_embeds_BLD is None), "give either ids or embeddings"
        if inputs_embeds_BLD is None:
            inputs_embeds_BLD = self.model.get_input_embeddings()(input_ids_BL)
        length, device = inputs_embeds_BLD.shape[1], inputs_embeds_BLD.device
        mask = attention_mask_B1LM
        if cache is not None:
            assert document_BL is None, "with a cache, documents are said by a mask"
            cache.require_room(length)
            position_BL = cache.window.position_BL(length, device) if position_BL is None else position_BL
            mask = _mask_over_slots(cache, length, device, causal=causal) if mask is None else mask
        else:
            if position_BL is not None and _is_arange(position_BL):
                position_BL = None
            self.check_length(length if position_BL is None else int(position_BL.max()) + 1)
            if mask is None and not masks.is_plain(document_BL):
                assert document_BL is not None
                mask = masks.document_mask(document_BL, causal=causal)
            elif mask is None and causal and position_BL is not None:
                # without a mask transformers would read restarting positions as document boundaries
                mask = masks.causal_mask(length, device)
        if mask is not None and self.config._attn_implementation == "eager":
            mask = masks.additive(mask, inputs_embeds_BLD.dtype)
        self._in_hidden = True
        try:
            states_BLD: Tensor = self.decoder(
                inputs_embeds=inputs_embeds_BLD,
                attention_mask=mask,
                position_ids=position_BL,
                is_causal=causal,
                past_key_values=cache,
                use_cache=False,
            ).last_hidden_state
        finally:
            self._in_hidden = False
        return states_BLD

    def check_length(self, length: int) -> None:
        """Raise if the model has too few positions.

        Raises:
            DllmError: naming both numbers.
        """
        limit = self.config.max_position_embeddings
        if length > limit:
            raise DllmError(
                f"A sequence of {length} tokens does not fit the model, which has {limit} positions.",
                f"Use sequences of at most {limit} tokens, prompt included.",
            )

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return fp32 logits [..., V]; mask and padding rows are -inf."""
        logits_MV = F.linear(hidden_MD, self.head_weight_VD).float()
        logits_MV[..., self.contract.num_tokens :] = -torch.inf
        return logits_MV

    @contextmanager
    def capture(self, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Collect hidden states of the `hidden()` calls made inside the context; each call replaces the last one's.

        Gradients flow through the captured tensors. A recomputation by activation checkpointing captures nothing.

        Args:
            layers: "embed" (what the first block reads), "1".."N-1" (block outputs) and "final" (after the norm).

        Yields:
            A dict that is filled with one [B, L, D] tensor per layer.

        Raises:
            DllmError: unknown layer name.
        """
        states: dict[str, Tensor] = {}

        def keep(name: str, value: Any) -> None:
            if self._in_hidden:
                states[name] = value[0] if isinstance(value, tuple) else value

        handles = []
        try:
            for name in layers:
                if name == "embed":
                    hook = self.layers[0].register_forward_pre_hook(
                        lambda _, args, kwargs: keep("embed", args[0] if args else kwargs["hidden_states"]),
                        with_kwargs=True,
                    )
                else:
                    module = self._captured_module(name)
                    hook = module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
                handles.append(hook)
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _captured_module(self, name: str) -> nn.Module:
        if name == "final":
            module: nn.Module = getattr(self.decoder, self.family.norm)
            return module
        if name.isdecimal() and 1 <= int(name) < self.num_layers:
            return self.layers[int(name) - 1]
        known = ["embed", "final", *(str(k) for k in range(1, self.num_layers))]
        raise DllmError(f"Unknown layer '{name}' of a model with {self.num_layers} blocks.", did_you_mean(name, known))

    # -- training ---------------------------------------------------------------------------------------------------

    def enable_activation_checkpointing(self) -> None:
        """Keep block inputs only and recompute the rest in the backward pass (in training mode)."""
        model = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        # only the reentrant form needs inputs that require gradients; it would cost a backward through frozen tables
        model.disable_input_require_grads()

    def freeze(self, rules: Sequence[str]) -> None:
        """Exclude parameters from training.

        Args:
            rules: `embeddings` (token and position tables; a tied head with them) and `mlp` (in every block).

        Raises:
            DllmError: unknown rule.
        """
        for rule in rules:
            if rule == "embeddings":
                modules = [getattr(self.decoder, name) for name in self.family.embeddings]
            elif rule == "mlp":
                modules = [getattr(block, self.family.mlp) for block in self.layers]
            else:
                raise DllmError(f"Unknown freezing rule '{rule}'.", did_you_mean(rule, FREEZE_RULES))
            for module in modules:
                module.requires_grad_(False)

    def num_parameters(self, *, trainable_only: bool = False) -> int:
        """Return the number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or not trainable_only)

    def flops_forward(self, num_positions: int, length: int, head_rows: int) -> float:
        """Return the floating-point operations of one forward pass (a backward costs twice as many again).

        2 per weight and position in the blocks, 4 L (heads x head size) per position and layer for scores and values
        of full attention, 2 D V per row that goes through the head. Norms, activations and softmax are left out.

        Args:
            num_positions: tokens in the batch, B x L.
            length: tokens each position attends to.
            head_rows: rows for which logits are computed.
        """
        config = self.config
        weights = sum(p.numel() for p in self.layers.parameters() if p.dim() == 2)
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or self.hidden_size // heads)
        blocks = num_positions * (2.0 * weights + 4.0 * length * width * self.num_layers)
        return blocks + 2.0 * head_rows * self.head_weight_VD.numel()


def _mask_over_slots(cache: SlotCache, length: int, device: torch.device, *, causal: bool) -> Tensor:
    if not causal:
        return masks.open_mask(device)
    assert isinstance(cache.window.slots, int), "slots in any order have no left and right: give a mask"
    visible = cache.window.num_visible(length, cache.capacity)
    return masks.causal_mask(length, device, first=cache.window.slots, num_keys=visible)


def _is_arange(position_BL: Tensor) -> bool:
    expected = torch.arange(position_BL.shape[1], device=position_BL.device)
    return bool((position_BL == expected).all())
