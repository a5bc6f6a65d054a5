"""RWKV-5 "Eagle" (arXiv 2404.05892) for vLLM: no attention, a constant state per request.

Names of modules are those of the checkpoints on the hub; those of the author's own files are
mapped to them. A block's norms, mixes and heads are torch's, its recurrence is ``scans.cpu``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import group_norm, silu
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linear_models.scans import cpu
from linear_models.scans.shift import token_shift
from linear_models.steps import batch_of, refuse_ranks, refuse_speculation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig

    from linear_models.configs import Rwkv5Config
    from linear_models.scans.batch import Batch

MIXED = ("key", "value", "receptance", "gate")


def state_shapes(config: Rwkv5Config) -> tuple[tuple[int, ...], ...]:
    """Of a block: its heads' matrices, and the last token before time mix and channel mix."""
    heads, size = config.num_attention_heads, config.head_size
    return (heads, size, size), (config.hidden_size,), (config.hidden_size,)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Matrices are sums over all tokens, and so in float32."""
    return torch.float32, dtype, dtype


def _linear(inputs: int, outputs: int, name: str, vllm_config: VllmConfig) -> ReplicatedLinear:
    quant = vllm_config.quant_config
    return ReplicatedLinear(
        inputs, outputs, bias=False, quant_config=quant, return_bias=False, prefix=name
    )


def _mix(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, size), requires_grad=False)


class TimeMix(nn.Module):
    """The recurrence over time of a block."""

    time_decay: torch.Tensor
    time_faaaa: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: Rwkv5Config = vllm_config.model_config.hf_config
        hidden, inner = config.hidden_size, config.attention_hidden_size
        self.heads, self.epsilon = config.num_attention_heads, config.group_norm_epsilon
        shape = (self.heads, config.head_size)
        for name in ("time_decay", "time_faaaa"):
            empty = torch.empty(shape, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        for name in MIXED:
            self.register_parameter(f"time_mix_{name}", _mix(hidden))
            self.add_module(name, _linear(hidden, inner, f"{prefix}.{name}", vllm_config))
        self.output = _linear(inner, hidden, f"{prefix}.output", vllm_config)
        self.ln_x = nn.GroupNorm(self.heads, inner, eps=self.epsilon, dtype=torch.float32)

    def forward(
        self, x: torch.Tensor, before: torch.Tensor, states: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Mix ``[tokens, hidden]`` with the tokens before them, and with all that came earlier."""
        key, value, receptance, gate = (
            getattr(self, name)(torch.lerp(before, x, getattr(self, f"time_mix_{name}")[0]))
            for name in MIXED
        )
        out = torch.empty(receptance.shape, dtype=torch.float32)
        decay = torch.exp(-torch.exp(self.time_decay))
        cpu.wkv5(receptance, key, value, decay, self.time_faaaa, states, batch, out)
        out = group_norm(out, self.heads, self.ln_x.weight, self.ln_x.bias, self.epsilon)
        return self.output(out.to(x.dtype) * silu(gate))


class ChannelMix(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: Rwkv5Config = vllm_config.model_config.hf_config
        hidden, inner = config.hidden_size, config.intermediate_size
        self.time_mix_key, self.time_mix_receptance = _mix(hidden), _mix(hidden)
        self.key = _linear(hidden, inner, f"{prefix}.key", vllm_config)
        self.receptance = _linear(hidden, hidden, f"{prefix}.receptance", vllm_config)
        self.value = _linear(inner, hidden, f"{prefix}.value", vllm_config)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Mix ``[tokens, hidden]`` with the tokens before them."""
        key = self.key(torch.lerp(before, x, self.time_mix_key[0]))
        receptance = self.receptance(torch.lerp(before, x, self.time_mix_receptance[0]))
        return torch.sigmoid(receptance) * self.value(torch.relu(key).square())


class Block(nn.Module, MambaBase):  # type: ignore[misc]
    """A layer, which vLLM gives the states of."""

    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.dtype, self.prefix = vllm_config.model_config.dtype, prefix
        hidden, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.pre_ln = None if index else nn.LayerNorm(hidden, epsilon)
        self.ln1, self.ln2 = nn.LayerNorm(hidden, epsilon), nn.LayerNorm(hidden, epsilon)
        self.attention = TimeMix(vllm_config, f"{prefix}.attention")
        self.feed_forward = ChannelMix(vllm_config, f"{prefix}.feed_forward")
        self.kv_cache = tuple(torch.empty(0) for _ in range(3))
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.MAMBA1  # whose metadata is plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer on ``[tokens, hidden]``."""
        every = get_forward_context().attn_metadata
        if every is None:  # a run that measures memory
            return x + self.feed_forward(x, x)
        batch = batch_of(every[self.prefix])
        matrices, before_time, before_channels = self.kv_cache
        x = x[: batch.num_tokens]
        x = x if self.pre_ln is None else self.pre_ln(x)
        y = self.ln1(x)
        x = x + self.attention(y, token_shift(y, before_time, batch), matrices, batch)
        y = self.ln2(x)
        return x + self.feed_forward(y, token_shift(y, before_channels, batch))


class Rwkv5Model(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: Rwkv5Config = vllm_config.model_config.hf_config
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(vllm_config, i, f"{prefix}.blocks.{i}") for i in range(config.num_hidden_layers)
        )
        self.ln_out = nn.LayerNorm(config.hidden_size)
        half = vllm_config.model_config.dtype == torch.float16  # float32 and bfloat16 hold all
        self.rescale_every = config.rescale_every if half else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run all blocks on embeddings ``[tokens, hidden]``."""
        tokens = len(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.rescale_every and (i + 1) % self.rescale_every == 0:
                x = x / 2
        x = self.ln_out(x)
        return x if len(x) == tokens else nn.functional.pad(x, (0, 0, 0, tokens - len(x)))

    def rescale(self) -> None:
        """Make what later blocks add as much smaller as their input is; once, after loading."""
        for i, block in enumerate(self.blocks if self.rescale_every else ()):
            assert isinstance(block, Block)
            for linear in (block.attention.output, block.feed_forward.value):
                linear.weight.data /= 2 ** (i // self.rescale_every)


class Rwkv5ForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching):  # type: ignore[misc]
    """Entry of ``register.ARCHITECTURES``."""

    # the names of the author's files
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "emb.": "rwkv.embeddings.",
            "blocks.": "rwkv.blocks.",
            "ln_out.": "rwkv.ln_out.",
        },
        orig_to_new_substr={".att.": ".attention.", ".ffn.": ".feed_forward.", ".ln0.": ".pre_ln."},
        orig_to_new_suffix={f".time_mix_{name[0]}": f".time_mix_{name}" for name in MIXED},
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse_ranks(vllm_config)
        refuse_speculation(vllm_config)
        config = self.config = vllm_config.model_config.hf_config
        self.rwkv = Rwkv5Model(vllm_config, maybe_prefix(prefix, "rwkv"))
        self.head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "head")
        )
        if config.tie_word_embeddings:
            self.head = self.head.tie_weights(self.rwkv.embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        return state_shapes(vllm_config.model_config.hf_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        return state_dtypes(vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return (get_temporal_copy_spec,) * 3

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.rwkv.embeddings(input_ids)

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
        return self.rwkv(inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            weights, mapper=self.hf_to_vllm_mapper
        )
        self.rwkv.rescale()
        return loaded
