"""RecurrentGemma (Griffin, arXiv 2402.19427) for vLLM: gated recurrences and local attention.

Names of modules are those of the checkpoints on the hub. The local attention is vLLM's own, with
its sliding window; the convolution and the recurrence are ``scans.cpu``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import softplus
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    get_conv_copy_spec,
    get_temporal_copy_spec,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linear_models.scans import cpu
from linear_models.steps import batch_of, refuse_ranks, refuse_speculation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import RecurrentGemmaConfig
    from vllm.config import VllmConfig

    from linear_models.scans.batch import Batch


def state_shapes(config: RecurrentGemmaConfig) -> tuple[tuple[int, ...], ...]:
    """Of a recurrent block: the last inputs of its convolution, and its recurrence."""
    return (config.conv1d_width - 1, config.lru_width), (config.lru_width,)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """A recurrence sums over all tokens, and so in float32."""
    return dtype, torch.float32


def _linear(
    inputs: int, outputs: int, bias: bool, name: str, vllm_config: VllmConfig
) -> ReplicatedLinear:
    quant = vllm_config.quant_config
    return ReplicatedLinear(
        inputs, outputs, bias=bias, quant_config=quant, return_bias=False, prefix=name
    )


def _empty(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Gates(nn.Module):
    """The recurrence and its gates, whose weights are blocks of channels."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.lru_width
        block = width // heads
        self.recurrent_param = _empty(width, dtype=torch.float32)
        self.input_gate_weight = _empty(heads, block, block)
        self.input_gate_bias = _empty(heads, block)
        self.recurrent_gate_weight = _empty(heads, block, block)
        self.recurrent_gate_bias = _empty(heads, block)

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
        self.weight = _empty(config.lru_width, 1, config.conv1d_width, dtype=torch.float32)
        self.bias = _empty(config.lru_width, dtype=torch.float32)


class RecurrentBlock(nn.Module, MambaBase):  # type: ignore[misc]
    """Convolution and recurrence beside a gate."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.dtype, self.prefix = vllm_config.model_config.dtype, prefix
        hidden, width = config.hidden_size, config.lru_width
        self.linear_y = _linear(hidden, width, True, f"{prefix}.linear_y", vllm_config)
        self.linear_x = _linear(hidden, width, True, f"{prefix}.linear_x", vllm_config)
        self.linear_out = _linear(width, hidden, True, f"{prefix}.linear_out", vllm_config)
        self.conv_1d = Convolution(config)
        self.rg_lru = Gates(config)
        self.act_fn = get_act_fn(config.hidden_activation)
        self.kv_cache = (torch.empty(0), torch.empty(0))
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.MAMBA1  # whose metadata is plain

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the block on ``[tokens, hidden]``."""
        gate, mixed = self.act_fn(self.linear_y(x)), self.linear_x(x)
        every = get_forward_context().attn_metadata
        if every is not None:  # else a run that measures memory
            batch = batch_of(every[self.prefix])
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
            return _linear(hidden, count * size, bias, f"{prefix}.{name}", vllm_config)

        self.q_proj = projection("q_proj", heads)
        self.k_proj = projection("k_proj", kv_heads)
        self.v_proj = projection("v_proj", kv_heads)
        self.o_proj = _linear(heads * size, hidden, True, f"{prefix}.o_proj", vllm_config)
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
        self.gate_proj = _linear(hidden, inner, True, f"{prefix}.gate_proj", vllm_config)
        self.up_proj = _linear(hidden, inner, True, f"{prefix}.up_proj", vllm_config)
        self.down_proj = _linear(inner, hidden, True, f"{prefix}.down_proj", vllm_config)
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
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
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


class RecurrentGemmaForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):  # type: ignore[misc]
    """Entry of ``register.ARCHITECTURES``."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"lm_head.": None})  # the embeddings

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse_ranks(vllm_config)
        refuse_speculation(vllm_config)
        config = self.config = vllm_config.model_config.hf_config
        self.model = RecurrentGemmaModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = self.model.embed_tokens
        self.logits_processor = LogitsProcessor(
            config.vocab_size, soft_cap=config.logits_soft_cap or None
        )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        return state_shapes(vllm_config.model_config.hf_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        return state_dtypes(vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return get_conv_copy_spec, get_temporal_copy_spec

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Hidden states ``[tokens, hidden]`` of a step."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(inputs_embeds, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            weights, mapper=self.hf_to_vllm_mapper
        )
        return loaded
