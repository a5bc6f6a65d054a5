"""RWKV-7 "Goose" (arXiv 2503.14456) for vLLM: a delta rule over a constant state per request.

Names of modules follow the checkpoints on the hub; those of the author's files are mapped to
them. Of a block, the products, norms and gates are torch's, its recurrence is ``scans.cpu``'s.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import group_norm, normalize
from vllm.model_executor.models.interfaces import IsAttentionFree
from vllm.model_executor.models.utils import WeightsMapper

from cache_policies.errors import PolicyError
from linear_models.base import empty, linear
from linear_models.rwkv import AUTHORS_NAMES, AUTHORS_PARTS, RwkvBlock, RwkvForCausalLM
from linear_models.scans import cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm.config import VllmConfig

    from linear_models.configs import Rwkv7Config
    from linear_models.scans.batch import Batch

MIXED = "rwkvag"  # receptance, decay, key, value, rate and gate, in the order of an old file's x_x
TRANSPOSED = re.compile(r"^blocks\.\d+\.att\.[wavg][12]$")


class LowRank(nn.Module):
    """Two products over few channels, with a function between them."""

    def __init__(
        self, rank: int, between: Callable[[torch.Tensor], torch.Tensor] | None, prefix: str,
        vllm_config: VllmConfig, *, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, self.between = vllm_config.model_config.hf_config.hidden_size, between
        self.down = linear(hidden, rank, f"{prefix}.down", vllm_config)
        self.up = linear(rank, hidden, f"{prefix}.up", vllm_config, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run on ``[tokens, hidden]``."""
        inner = self.down(x)
        return self.up(inner if self.between is None else self.between(inner))


class FirstValues:
    """Values of the first block in the running step, which those of later ones are mixed with."""

    values: torch.Tensor


class TimeMix(nn.Module):
    """The recurrence over time of a block."""

    first: FirstValues

    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__()
        config: Rwkv7Config = vllm_config.model_config.hf_config
        hidden, self.heads, self.size = config.hidden_size, config.num_heads, config.head_dim
        self.epsilon = config.norm_eps * self.size  # as its author's 64e-5 follows from 1e-5
        for name in MIXED:
            self.register_parameter(f"x_{name}", empty(hidden))
        self.r_proj = linear(hidden, hidden, f"{prefix}.r_proj", vllm_config)
        self.k_proj = linear(hidden, hidden, f"{prefix}.k_proj", vllm_config)
        self.v_proj = linear(hidden, hidden, f"{prefix}.v_proj", vllm_config)
        self.o_proj = linear(hidden, hidden, f"{prefix}.o_proj", vllm_config)
        self.k_k, self.k_a = empty(hidden), empty(hidden)
        self.r_k = empty(self.heads, self.size)

        def low_rank(name: str, rank: int, between: Callable[..., torch.Tensor] | None) -> LowRank:
            bias = name != "g"
            return LowRank(rank, between, f"{prefix}.{name}_lora", vllm_config, bias=bias)

        self.w_lora = low_rank("w", config.decay_low_rank_dim, torch.tanh)
        self.a_lora = low_rank("a", config.a_low_rank_dim, None)
        self.v_lora = low_rank("v", config.v_low_rank_dim, None) if index else None
        self.g_lora = low_rank("g", config.gate_low_rank_dim, torch.sigmoid)
        self.g_norm = nn.GroupNorm(self.heads, hidden, eps=self.epsilon, dtype=torch.float32)

    def forward(
        self, x: torch.Tensor, before: torch.Tensor, states: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Mix ``[tokens, hidden]`` with the tokens before them, and with all that came earlier."""
        receptance, decay, key, value, rate, gate = (
            torch.lerp(x, before, getattr(self, f"x_{name}")) for name in MIXED
        )
        r, w, k = self.r_proj(receptance), self.w_lora(decay), self.k_proj(key)
        v, rate = self._values(value), torch.sigmoid(self.a_lora(rate))
        removed = normalize(self._heads(k * self.k_k), dim=-1).flatten(1)
        k = k * (1 + (rate - 1) * self.k_a)
        out = torch.empty(r.shape, dtype=torch.float32)
        cpu.wkv7(r, w, k, v, removed, rate, states, batch, out)
        out = group_norm(out, self.heads, self.g_norm.weight, self.g_norm.bias, self.epsilon)
        current = (self._heads(r * k) * self.r_k).sum(-1, keepdim=True) * self._heads(v)
        return self.o_proj((out.to(x.dtype) + current.flatten(1)) * self.g_lora(gate))

    def _values(self, x: torch.Tensor) -> torch.Tensor:
        """Values of the block, mixed with the first one's."""
        v = self.v_proj(x)
        if self.v_lora is None:
            self.first.values = v
            return v
        return torch.lerp(v, self.first.values, torch.sigmoid(self.v_lora(x)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (self.heads, self.size))


class ChannelMix(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: Rwkv7Config = vllm_config.model_config.hf_config
        hidden, inner = config.hidden_size, config.intermediate_size
        self.x_k = empty(hidden)
        self.key = linear(hidden, inner, f"{prefix}.key", vllm_config)
        self.value = linear(inner, hidden, f"{prefix}.value", vllm_config)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Mix ``[tokens, hidden]`` with the tokens before them."""
        return self.value(torch.relu(self.key(torch.lerp(x, before, self.x_k))).square())


class Block(RwkvBlock):
    """A time mix and a channel mix."""

    attention: TimeMix

    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__(vllm_config, index, prefix)
        self.attention = TimeMix(vllm_config, index, f"{prefix}.attention")
        self.feed_forward = ChannelMix(vllm_config, f"{prefix}.feed_forward")


def refuse_variant(config: Rwkv7Config) -> None:
    """Refuse what a configuration may ask for and this model does not have.

    Raises:
        PolicyError: naming it.

    """
    reasons = (
        (config.attn is not None, "layers of attention"),
        (set(config.value_dim) != {config.hidden_size}, "values wider than keys"),
        (config.hidden_act != "sqrelu", f"activation {config.hidden_act!r}, which is not sqrelu"),
        (not config.norm_first, "no norm of the embeddings (norm_first)"),
        (not config.norm_bias, "norms without a bias (norm_bias)"),
    )
    for found, reason in reasons:
        if found:
            raise PolicyError(f"RWKV-7 with {reason} is not known here")


class Rwkv7ForCausalLM(RwkvForCausalLM, IsAttentionFree):  # type: ignore[misc]
    """Entry of ``register.ARCHITECTURES``."""

    LAYER = Block
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            # values of the first block are not mixed
            re.compile(r"^(blocks\.0\.att\.v[012]$|model\.layers\.0\.attn\.v_lora\.)"): None,
            re.compile(r"\.att\.([wav])0$"): r".attention.\1_lora.up.bias",
            re.compile(r"\.att\.([wavg])1$"): r".attention.\1_lora.down.weight",
            re.compile(r"\.att\.([wavg])2$"): r".attention.\1_lora.up.weight",
        },
        orig_to_new_substr={
            ".pre_norm.": ".pre_ln.",
            ".attn_norm.": ".ln1.",
            ".ffn_norm.": ".ln2.",
            ".lora.0.": ".down.",
            ".lora.2.": ".up.",
            ".attn.": ".attention.",
            ".att.receptance.": ".attention.r_proj.",
            ".att.key.": ".attention.k_proj.",
            ".att.value.": ".attention.v_proj.",
            ".att.output.": ".attention.o_proj.",
            ".att.ln_x.": ".attention.g_norm.",
            **AUTHORS_PARTS,
        },
        orig_to_new_prefix={
            **AUTHORS_NAMES,
            "model.layers.": "model.blocks.",
            "model.norm.": "model.ln_out.",
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        refuse_variant(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        first = FirstValues()
        for block in self.model.blocks:
            assert isinstance(block, Block)
            block.attention.first = first

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(_as_here(weights))


def _as_here(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows and columns as here: the author's products are from the right, old files stack mixes."""
    for name, weight in weights:
        stem, _, last = name.rpartition(".")
        if last == "x_x":
            yield from ((f"{stem}.x_{m}", w) for m, w in zip(MIXED, weight, strict=True))
        elif TRANSPOSED.search(name):
            yield name, weight.T
        else:
            yield name, weight.flatten() if weight.shape[:2] == (1, 1) else weight
