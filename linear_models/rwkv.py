"""What RWKV-5 and RWKV-7 share: blocks of two mixes, which see the token before each one too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import maybe_prefix

from cache_policies.errors import PolicyError
from linear_models.base import RecurrentForCausalLM, StateLayer
from linear_models.scans import cpu
from linear_models.scans.shift import token_shift

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# names of the author's files, before and within a block
AUTHORS_NAMES = {
    "emb.": "model.embeddings.",
    "blocks.": "model.blocks.",
    "ln_out.": "model.ln_out.",
    "head.": "lm_head.",
}
AUTHORS_PARTS = {".att.": ".attention.", ".ffn.": ".feed_forward.", ".ln0.": ".pre_ln."}


class RwkvBlock(StateLayer):
    """A time mix and a channel mix, which a subclass makes, each behind a norm.

    Attributes:
        attention: called with tokens, those before them, the heads' states and the step.
        feed_forward: called with tokens and those before them.

    """

    COPIES = (get_temporal_copy_spec,) * 3
    attention: nn.Module
    feed_forward: nn.Module

    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        hidden, epsilon = self.config.hidden_size, self.config.layer_norm_epsilon
        self.pre_ln = None if index else nn.LayerNorm(hidden, epsilon)
        self.ln1, self.ln2 = nn.LayerNorm(hidden, epsilon), nn.LayerNorm(hidden, epsilon)

    @staticmethod
    def state_shapes(config: Any) -> tuple[tuple[int, ...], ...]:
        """Of its heads' matrices, and of the last token before time mix and channel mix."""
        heads, size = config.num_attention_heads, config.head_size
        return (heads, size, size), (config.hidden_size,), (config.hidden_size,)

    @staticmethod
    def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Matrices are sums over all tokens, and so in float32."""
        return torch.float32, dtype, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer on ``[tokens, hidden]``."""
        batch = self.step()
        if batch is None:
            return x + self.feed_forward(x, x)
        matrices, before_time, before_channels = self.kv_cache
        x = x[: batch.num_tokens]
        x = x if self.pre_ln is None else self.pre_ln(x)
        y = self.ln1(x)
        x = x + self.attention(y, token_shift(y, before_time, batch), matrices, batch)
        y = self.ln2(x)
        return x + self.feed_forward(y, token_shift(y, before_channels, batch))


class RwkvModel(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, vllm_config: VllmConfig, block: type[RwkvBlock], prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            block(vllm_config, i, f"{prefix}.blocks.{i}") for i in range(config.num_hidden_layers)
        )
        self.ln_out = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run all blocks on embeddings ``[tokens, hidden]``; there are no positions in them."""
        tokens = len(x)
        for block in self.blocks:
            x = block(x)
        x = self.ln_out(x)
        return x if len(x) == tokens else nn.functional.pad(x, (0, 0, 0, tokens - len(x)))


def refuse_heads(size: int) -> None:
    """Refuse heads that the recurrence does not compute.

    Raises:
        PolicyError: naming their size.

    """
    if size % cpu.HEAD_MULTIPLE or size > cpu.MAX_HEAD:
        raise PolicyError(
            f"RWKV heads of {size} are no multiple of {cpu.HEAD_MULTIPLE} up to {cpu.MAX_HEAD}"
        )


class RwkvForCausalLM(RecurrentForCausalLM):
    """A model of the blocks that ``LAYER`` names."""

    LAYER: ClassVar[type[RwkvBlock]]
    model: RwkvModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config = self.config
        refuse_heads(config.head_size)
        self.model = RwkvModel(vllm_config, self.LAYER, maybe_prefix(prefix, "model"))
        head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        tied = config.tie_word_embeddings
        self.lm_head = head.tie_weights(self.model.embeddings) if tied else head
        self.logits_processor = LogitsProcessor(config.vocab_size)
