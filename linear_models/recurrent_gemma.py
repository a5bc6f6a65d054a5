"""RecurrentGemma (Griffin, arXiv 2402.19427) for vLLM: gated recurrences and local attention.

Names of modules are those of the checkpoints on the hub. The local attention is vLLM's own, with
its sliding window; the convolution and the recurrence are ``scans.cpu``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import softplus
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    get_conv_copy_spec,
    get_temporal_copy_spec,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import IsHybrid
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from linear_models.base import RecurrentForCausalLM, StateLayer, empty, linear
from linear_models.scans import cpu

if TYPE_CHECKING:
    from transformers import RecurrentGemmaConfig
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from linear_models.scans.batch import Batch


class Gates(nn.Module):
    """The recurrence and its gates, whose weights are blocks of channels."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.lru_width
        block = width // heads
        self.recurrent_param = empty(width, dtype=torch.float32)
        self.input_gate_weight = empty(heads, block, block)
        self.input_gate_bias = empty(heads, block)
        self.recurrent_gate_weight = empty(heads, block, block)
        self.recurrent_gate_bias = empty(heads, block)

    def forward(self, x: torch.Tensor, states: torch.Tensor, batch: Batch) -> None:
        """Run on ``[tokens, channels]``, in place."""
        blocks = x.unflatten(1, self.input_gate_bias.shape).transpose(0, 1)
        input_gate, gate = (
            torch.baddbmm(bias[:, None], blocks, weight).transpose(0, 1).flatten(1)
            for weight, bias in (
                (self.input_gate_weight, self.input_gate_bias),
                (self.recurrent_gate_weight, self.recurrent_gate_bias),
            )
        )
        rate = -8 * softplus(self.recurrent_param)
        cpu.rg_lru(x, input_gate, gate, rate, states, batch, x)


class Convolution(nn.Module):
    """Weights of one over time, of each channel for itself."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        self.weight = empty(config.lru_width, 1, config.conv1d_width, dtype=torch.float32)
        self.bias = empty(config.lru_width, dtype=torch.float32)


class RecurrentBlock(StateLayer):
    """Convolution and recurrence beside a gate."""

    COPIES = (get_conv_copy_spec, get_temporal_copy_spec)

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        config: RecurrentGemmaConfig = self.config
        hidden, width = config.hidden_size, config.lru_width
        self.linear_y = linear(hidden, width, f"{prefix}.linear_y", vllm_config, bias=True)
        self.linear_x = linear(hidden, width, f"{prefix}.linear_x", vllm_config, bias=True)
        self.linear_out = linear(width, hidden, f"{prefix}.linear_out", vllm_config, bias=True)
        self.conv_1d = Convolution(config)
        self.rg_lru = Gates(config)
        self.act_fn = get_act_fn(config.hidden_activation)

    @staticmethod
    def state_shapes(config: RecurrentGemmaConfig) -> tuple[tuple[int, ...], ...]:
        """Of the last inputs of its convolution, and of its recurrence."""
        return (config.conv1d_width - 1, config.lru_width), (config.lru_width,)

    @staticmethod
    def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """A recurrence sums over all tokens, and so in float32."""
        return dtype, torch.float32

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the block on ``[tokens, hidden]``."""
        gate, mixed = self.act_fn(self.linear_y(x)), self.linear_x(x)
        batch = self.step()
        if batch is not None:
            conv, states = self.kv_cache
            weight, bias = self.conv_1d.weight.squeeze(1), self.conv_1d.bias
            convolved = torch.zeros_like(mixed)
            cpu.causal_conv(mixed, weight, bias, conv, batch, convolved, activate=False)
            self.rg_lru(convolved, states, batch)
            mixed = convolved
        return self.linear_out(mixed * gate)


class AttentionBlock(nn.Module):
    """Attention to the last ``attention_window_size`` tokens."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        hidden, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def projection(name: str, count: int) -> ReplicatedLinear:
            bias = config.attention_bias
            return linear(hidden, count * size, f"{prefix}.{name}", vllm_config, bias=bias)

        self.q_proj = projection("q_proj", heads)
        self.k_proj = projection("k_proj", kv_heads)
        self.v_proj = projection("v_proj", kv_heads)
        self.o_proj = linear(heads * size, hidden, f"{prefix}.o_proj", vllm_config, bias=True)
        self.rotary = get_rope(
            size,
            max_position=vllm_config.model_config.max_model_len,
            rope_parameters=dict(config.rope_parameters),
        )
        self.attn = Attention(
            heads,
            size,
            size**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=config.attention_window_size,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Attend with ``[tokens, hidden]``."""
        query, key = self.rotary(positions, self.q_proj(x), self.k_proj(x))
        return self.o_proj(self.attn(query, key, self.v_proj(x)))


class Mlp(nn.Module):
    """Gated feed-forward part; a configuration counts both of its halves."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        hidden, inner = config.hidden_size, config.intermediate_size // 2
        self.gate_proj = linear(hidden, inner, f"{prefix}.gate_proj", vllm_config, bias=True)
        self.up_proj = linear(hidden, inner, f"{prefix}.up_proj", vllm_config, bias=True)
        self.down_proj = linear(inner, hidden, f"{prefix}.down_proj", vllm_config, bias=True)
        self.act_fn = get_act_fn(config.hidden_activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run on ``[tokens, hidden]``."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A temporal block, recurrent or attention, and a feed-forward part."""

    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        local = config.layers_block_type[index] == "attention"
        temporal = AttentionBlock if local else RecurrentBlock
        self.temporal_pre_norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block = temporal(vllm_config, f"{prefix}.temporal_block")
        self.channel_pre_norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = Mlp(vllm_config, f"{prefix}.mlp_block")

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run on ``[tokens, hidden]``."""
        x = x + self.temporal_block(self.temporal_pre_norm(x), positions)
        return x + self.mlp_block(self.channel_pre_norm(x))


class RecurrentGemmaModel(nn.Module):
    """Scaled embeddings, layers and the last norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: RecurrentGemmaConfig = vllm_config.model_config.hf_config
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(vllm_config, i, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.final_norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        # published in bfloat16, and so rounded to it
        self.normalizer = float(torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run all layers on embeddings ``[tokens, hidden]``."""
        x = x * self.normalizer
        for layer in self.layers:
            x = layer(x, positions)
        return self.final_norm(x)


class RecurrentGemmaForCausalLM(RecurrentForCausalLM, IsHybrid):  # type: ignore[misc]
    """Entry of ``register.ARCHITECTURES``."""

    LAYER = RecurrentBlock
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "lm_head.": None,  # the embeddings
            "model.embed_tokens.": "model.embeddings.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        self.model = RecurrentGemmaModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = self.model.embeddings
        self.logits_processor = LogitsProcessor(
            self.config.vocab_size, soft_cap=self.config.logits_soft_cap or None
        )
