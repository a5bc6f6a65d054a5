"""Large key biases, as Qwen2.5's: found in the model's weights once they are loaded.

Rotary embedding turns a bias with the position. Its mean over the positions is the same for every
key of a head, and is taken away before keys are stored: the scores of a query all shift alike, so
that softmax does not see it. What is left turns, makes every key large, and is warned of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from cache_policies.vllm_plugin.rotary import parent_of, rope_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from cache_policies.pages.codecs.base import Codec
    from cache_policies.retention.rope import Rope

LARGE = 20.0  # norm in one head, where keys without a bias have about the root of their channels

logger = init_logger("vllm.kvthrift")


def key_bias(attention: Any) -> torch.Tensor | None:
    """The bias of an attention layer's keys before rotary embedding, ``[num_kv_heads, head_size]``.

    None where there is none, it is small, or a norm follows it.
    """
    parent = parent_of(attention)
    bias = getattr(getattr(parent, "qkv_proj", None), "bias", None)
    heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
    if not isinstance(bias, torch.Tensor) or bias.numel() != (heads + 2 * kv_heads) * size:
        return None
    if any(getattr(parent, name, None) is not None for name in ("k_norm", "k_layernorm")):
        return None
    keys = bias.detach()[heads * size : (heads + kv_heads) * size].float().view(kv_heads, size)
    return keys if float(keys.norm(dim=-1).max()) > LARGE else None


def mean_bias(bias: torch.Tensor, rope: Rope, positions: int) -> torch.Tensor:
    """The mean of a turning bias over the first positions, ``[num_kv_heads, head_size]``."""
    return (bias @ rope.mean_rotation(0, positions).T.to(bias.device)).contiguous()


def key_offset(attention: Any, codec: Codec, config: VllmConfig) -> torch.Tensor | None:
    """What is to be taken from every key of a layer, ``[num_kv_heads, head_size]``, or None."""
    bias = key_bias(attention) if codec.takes_key_offset else None
    if bias is None:
        return None
    rope = rope_of(attention, attention.head_size, config)
    return mean_bias(bias, rope, config.model_config.max_model_len)


def turning_norm(bias: torch.Tensor, rope: Rope, positions: int) -> float:
    """Norm of what is left of a bias once its mean over ``positions`` is taken away."""
    mean = mean_bias(bias, rope, positions)
    left = bias.square().sum(-1) - mean.square().sum(-1)
    return float(left.clamp(min=0).max().sqrt())


def warn_of_bias(attention: Any, codec: Codec, config: VllmConfig, layer: int) -> None:
    """Say so where a layer's codec loses much of keys with the layer's bias."""
    bias = key_bias(attention) if codec.QUANTIZES else None
    if bias is None:
        return
    longest = config.model_config.max_model_len
    rope = rope_of(attention, attention.head_size, config)
    norm = turning_norm(bias, rope, longest if codec.takes_key_offset else codec.divisor)
    if norm > LARGE:
        logger.warning(
            "kvthrift: the keys of layer %d have a bias of norm %.0f that turns with the position "
            "(as in Qwen2.5), of which %s loses much. raw and fp16 stand it; kivi and rotated with "
            "k_bits=8 lose less; layers(first=..,last=..,codec=fp16) helps where only the first or "
            "last layers have one.",
            layer,
            norm,
            codec,
        )
