"""What of a model's configuration decides the size of its cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WINDOW_PAGE = 128  # tokens; vLLM's block on a CPU
LOCAL = ("sliding_attention", "chunked_attention")
ATTENTION_FREE = ("rwkv5", "rwkv7")


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its cache.

    Attributes:
        layers: layers of full attention, whose cache grows and which a policy is for; zero in a
            model without attention.
        num_kv_heads: KV heads of a layer; zero without attention.
        head_size: channels of a KV head; zero without attention.
        dtype: dtype the model runs in.
        constant_bytes: bytes of a long request that do not grow with it: the pages of sliding
            windows and chunks, and the states of state-space and other linear layers.

    """

    layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    constant_bytes: int = 0

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype) -> ModelShape:
        """Read ``config.json`` of a model folder."""
        found: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if "model_type" not in found:
            return cls.of(SimpleNamespace(**found), dtype)
        from transformers import AutoConfig  # knows the kinds of layers that a file leaves out

        from linear_models.configs import register_configs

        register_configs()
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return cls.of(config.get_text_config(), dtype)

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, states: str = "auto") -> ModelShape:
        """Read a configuration of the transformers library, of the text model.

        Args:
            config: of the text model.
            dtype: dtype the model runs in.
            states: vLLM's ``mamba_ssm_cache_dtype``, where an engine has settled it.

        """
        state = float32_state_bytes(config, dtype)
        if state is None:
            state = state_bytes(config, dtype, _recurrent(config, dtype, states))
        if getattr(config, "model_type", None) in ATTENTION_FREE:
            return cls(0, 0, 0, dtype, config.num_hidden_layers * state)
        heads = getattr(config, "num_attention_heads", None)
        if heads is None:
            return cls(0, 0, 0, dtype, config.num_hidden_layers * state)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kinds = list(_kinds(config))
        token = 2 * kv_heads * size * dtype.itemsize
        constant = sum(token * _window_tokens(config, kind) for kind in kinds)
        constant += kinds.count("state") * state
        return cls(kinds.count("full"), kv_heads, size, dtype, constant)


def _kinds(config: Any) -> Iterator[str]:
    """Kind of every layer with a cache: ``full``, one of ``LOCAL``, or ``state``."""
    if hasattr(config, "mamba_d_ssm"):  # Falcon-H1: attention and state in every layer
        yield from ("full", "state") * config.num_hidden_layers
        return
    listed = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if listed is None:
        yield from ("full",) * config.num_hidden_layers
        return
    griffin = getattr(config, "model_type", None) == "recurrent_gemma"
    for name in listed:
        if name in LOCAL:
            yield name
        elif griffin and name == "attention":
            yield "sliding_attention"
        elif "attention" in name and "linear" not in name:
            yield "full"
        elif name not in {"mlp", "moe"}:
            yield "state"


def _window_tokens(config: Any, kind: str) -> int:
    """Most tokens that the pages of a local layer hold at once, by vLLM's count of them."""
    if kind == "sliding_attention":
        return (-(-(config.sliding_window - 1) // WINDOW_PAGE) + 1) * WINDOW_PAGE
    return int(config.attention_chunk_size) if kind == "chunked_attention" else 0


def _recurrent(config: Any, dtype: torch.dtype, states: str) -> torch.dtype:
    """Dtype of the states of recurrences: the engine's, or what vLLM would choose here."""
    if states == "auto" and torch.cpu._is_avx512_bf16_supported():
        states = "float32"  # vllm/platforms/cpu.py: whatever the model's configuration says
    if states == "auto":
        states = getattr(config, "mamba_ssm_cache_dtype", None) or "auto"
    return getattr(torch, states, dtype)


def state_bytes(config: Any, dtype: torch.dtype, recurrent: torch.dtype) -> int:
    """Bytes of the state of one layer: of its convolution, and of its recurrence in its own dtype.

    Sources: vLLM's ``MambaStateShapeCalculator``; Mamba, arXiv 2312.00752; Mamba 2, arXiv
    2405.21060; gated delta net, arXiv 2412.06464.
    """

    def first(*names: str, default: int = 0) -> int:
        return next((int(v) for n in names if (v := getattr(config, n, None)) is not None), default)

    tail = first("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim", default=4) - 1
    state = first("mamba_d_state", "ssm_state_size", "state_size")
    heads = first("mamba_n_heads", "mamba_num_heads")
    width = first("mamba_d_head", "mamba_head_dim")
    alone = getattr(config, "num_attention_heads", None) is None  # no other layer has such names
    if alone and not heads:
        heads, width = first("num_heads"), first("head_dim")
    if keys := first("linear_num_key_heads"):
        key, value = config.linear_key_head_dim, config.linear_value_head_dim
        channels = 2 * key * keys + value * config.linear_num_value_heads
        size = config.linear_num_value_heads * value * key
    elif heads:
        channels = heads * width + 2 * first("mamba_n_groups", "n_groups") * state
        size = heads * width * state
    else:
        channels = first("mamba_expand", "expand", default=2) * first("hidden_size")
        channels = first("intermediate_size", default=channels) if alone else channels
        size = channels * state
    return tail * channels * dtype.itemsize + size * recurrent.itemsize


def float32_state_bytes(config: Any, dtype: torch.dtype) -> int | None:
    """Bytes of the state of one layer whose recurrence is in float32; none for other models.

    Sources: RWKV-5, arXiv 2404.05892; RWKV-7, arXiv 2503.14456; Griffin, arXiv 2402.19427.
    """
    kind = getattr(config, "model_type", None)
    if kind in ATTENTION_FREE:  # matrices of all heads, and a token before each of two mixes
        matrices = config.num_attention_heads * config.head_size**2
        return matrices * 4 + 2 * config.hidden_size * dtype.itemsize
    if kind == "recurrent_gemma":
        tail = (config.conv1d_width - 1) * config.lru_width
        return tail * dtype.itemsize + config.lru_width * 4
    return None
