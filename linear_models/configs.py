"""Configurations of published models that the transformers library does not know."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class Rwkv5Config(PretrainedConfig):  # type: ignore[misc]
    """RWKV-5 "Eagle" (arXiv 2404.05892), as its checkpoints on the hub are configured.

    Attributes:
        head_size: items of a key and of a value of a head.
        attention_hidden_size: of all heads; ``hidden_size`` where not given.
        intermediate_size: of the channel mix; 3.5 times ``hidden_size`` in steps of 32.
        layer_norm_epsilon: of all norms but those of the heads.
        group_norm_epsilon: of these. 64e-5 is that of the models' training and of their author's
            library; the hub's own code has 1e-5.
        rescale_every: in float16, values are halved after so many layers; 0 for never.
        num_attention_heads: follows from the sizes. Published files say a head's size here.

    """

    model_type = "rwkv5"

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        head_size: int = 64,
        attention_hidden_size: int | None = None,
        intermediate_size: int | None = None,
        layer_norm_epsilon: float = 1e-5,
        group_norm_epsilon: float = 64e-5,
        rescale_every: int = 6,
        **more: Any,
    ) -> None:
        more.pop("num_attention_heads", None)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.head_size = num_hidden_layers, head_size
        self.attention_hidden_size = attention_hidden_size or hidden_size
        self.num_attention_heads = self.attention_hidden_size // head_size
        self.intermediate_size = intermediate_size or hidden_size * 7 // 2 // 32 * 32
        self.layer_norm_epsilon = layer_norm_epsilon
        self.group_norm_epsilon = group_norm_epsilon
        self.rescale_every = rescale_every
        more.setdefault("tie_word_embeddings", False)
        super().__init__(**more)


CONFIGS = (Rwkv5Config,)


def register_configs() -> None:
    """Tell the transformers library of them, so that no remote code is asked for."""
    for config in CONFIGS:
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
