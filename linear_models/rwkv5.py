"""RWKV-5 "Eagle" (arXiv 2404.05892) for vLLM: no attention, a constant state per request.

Names of modules are those of the checkpoints on the hub; those of the author's own files are
mapped to them. A block's norms, mixes and heads are torch's, its recurrence is ``scans.cpu``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import group_norm, silu
from vllm.model_executor.models.interfaces import IsAttentionFree
from vllm.model_executor.models.utils import WeightsMapper

from cache_policies.errors import PolicyError
from linear_models.base import empty, linear
from linear_models.rwkv import AUTHORS_NAMES, AUTHORS_PARTS, RwkvBlock, RwkvForCausalLM
from linear_models.scans import cpu

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig

    from linear_models.configs import Rwkv5Config
    from linear_models.scans.batch import Batch

MIXED = ("key", "value", "receptance", "gate")


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
            self.register_parameter(name, empty(*shape, dtype=torch.float32))
        for name in MIXED:
            self.register_parameter(f"time_mix_{name}", empty(1, 1, hidden))
            self.add_module(name, linear(hidden, inner, f"{prefix}.{name}", vllm_config))
        self.output = linear(inner, hidden, f"{prefix}.output", vllm_config)
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
        self.time_mix_key, self.time_mix_receptance = empty(1, 1, hidden), empty(1, 1, hidden)
        self.key = linear(hidden, inner, f"{prefix}.key", vllm_config)
        self.receptance = linear(hidden, hidden, f"{prefix}.receptance", vllm_config)
        self.value = linear(inner, hidden, f"{prefix}.value", vllm_config)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Mix ``[tokens, hidden]`` with the tokens before them."""
        key = self.key(torch.lerp(before, x, self.time_mix_key[0]))
        receptance = self.receptance(torch.lerp(before, x, self.time_mix_receptance[0]))
        return torch.sigmoid(receptance) * self.value(torch.relu(key).square())


class Block(RwkvBlock):
    """A time mix and a channel mix."""

    attention: TimeMix
    feed_forward: ChannelMix

    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__(vllm_config, index, prefix)
        self.attention = TimeMix(vllm_config, f"{prefix}.attention")
        self.feed_forward = ChannelMix(vllm_config, f"{prefix}.feed_forward")
        half = self.dtype == torch.float16  # float32 and bfloat16 hold all
        every = self.config.rescale_every if half else 0
        self.halves = bool(every) and (index + 1) % every == 0
        self.smaller = 2 ** (index // every) if every else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer on ``[tokens, hidden]``; in float16, halve what it returns now and then."""
        x = super().forward(x)
        return x / 2 if self.halves else x

    def rescale(self) -> None:
        """Make what it adds as much smaller as its input is; once, after loading."""
        if self.smaller == 1:  # quantized weights have no such tensor
            return
        for module in (self.attention.output, self.feed_forward.value):
            module.weight.data /= self.smaller


def refuse_quantized_half(vllm_config: VllmConfig) -> None:
    """Refuse weights that would have to be made smaller, and are codes.

    Raises:
        PolicyError: naming the dtypes that need it not.

    """
    half = vllm_config.model_config.dtype == torch.float16
    if (
        half
        and vllm_config.quant_config is not None
        and vllm_config.model_config.hf_config.rescale_every
    ):
        raise PolicyError(
            "RWKV-5 in float16 halves its values every few layers and its weights with them, which "
            f"{vllm_config.quant_config.get_name()} weights cannot be; give --dtype bfloat16 or "
            "float32"
        )


class Rwkv5ForCausalLM(RwkvForCausalLM, IsAttentionFree):  # type: ignore[misc]
    """Entry of ``register.ARCHITECTURES``."""

    LAYER = Block
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={**AUTHORS_NAMES, "rwkv.": "model."},
        orig_to_new_substr=AUTHORS_PARTS,
        orig_to_new_suffix={f".time_mix_{name[0]}": f".time_mix_{name}" for name in MIXED},
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        refuse_quantized_half(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        for block in self.model.blocks:
            assert isinstance(block, Block)
            block.rescale()
        return loaded
