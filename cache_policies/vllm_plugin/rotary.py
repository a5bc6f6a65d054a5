"""The rotary embedding of a layer, from the model's own rotary module.

vLLM builds a module for every form of it and puts it beside a layer's attention. An attention
layer is not told its parent, so torch's hook on registering modules notes it.
Can go when vLLM gives an attention layer its rotary module.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from cache_policies.errors import PolicyError
from cache_policies.retention.rope import Rope, refuse_rotary, rotary_parameters

# Model types that turn neighbouring channels instead of halves; for models of vLLM's Transformers
# backend, whose rotary module is not beside the attention.
INTERLEAVED = ("chatglm", "cohere", "ernie4_5", "glm", "glm4", "gptj")
_parents: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[torch.nn.Module]]
_parents = weakref.WeakKeyDictionary()


@cache
def watch() -> None:
    """From now on, remember in which module attention layers are."""

    def note(parent: torch.nn.Module, _name: str, child: torch.nn.Module | None) -> None:
        if child is not None and hasattr(child, "impl"):
            _parents[child] = weakref.ref(parent)

    register_module_module_registration_hook(note)


def parent_of(attention: torch.nn.Module) -> torch.nn.Module | None:
    """The module that an attention layer was put into."""
    return _parents[attention]() if attention in _parents else None


def rope_of(
    attention: torch.nn.Module,
    head_size: int,
    vllm_config: VllmConfig,
    device: torch.device | None = None,
) -> Rope:
    """The rotary embedding of an attention layer; one that turns nothing where there is none.

    Args:
        attention: the layer.
        head_size: its channels of a head.
        vllm_config: of the engine.
        device: where the table shall be; None: wherever it is.

    """
    hf_config, parent = vllm_config.model_config.hf_text_config, parent_of(attention)
    try:
        refuse_rotary(hf_config)
    except PolicyError:  # no request that needs it comes here, but biases of keys do
        # Under M-RoPE the table holds for text, whose three positions are equal.
        if "mrope_section" not in rotary_parameters(hf_config):
            return Rope.none(head_size, device)
    for child in parent.children() if parent is not None else ():
        if isinstance(child, RotaryEmbeddingBase) or hasattr(child, "long_short_cos_sin_cache"):
            break
    else:
        child = _configured(hf_config, head_size, vllm_config)
    # The module is moved, which all layers share, and not a table for each of them.
    return rope_from(child if device is None else child.to(device))


def rope_from(module: Any) -> Rope:
    """The table of one of vLLM's rotary modules."""
    table = getattr(module, "long_short_cos_sin_cache", None)
    if table is None:
        return Rope(module.cos_sin_cache, module.head_size, not module.is_neox_style)
    # LongRoPE keeps two tables in one, and takes the second for every position or for none.
    short = module.original_max_position_embeddings
    return Rope(table[short:] if module.use_long_rope else table[:short], module.head_size)


def _configured(hf_config: Any, head_size: int, vllm_config: VllmConfig) -> torch.nn.Module:
    with set_current_vllm_config(vllm_config):
        return get_rope(
            head_size,
            max_position=getattr(hf_config, "max_position_embeddings", 8192),
            is_neox_style=hf_config.model_type not in INTERLEAVED,
            rope_parameters=rotary_parameters(hf_config),
            dtype=torch.float32,
        )
