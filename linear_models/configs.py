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


class Rwkv7Config(PretrainedConfig):  # type: ignore[misc]
    """RWKV-7 "Goose" (arXiv 2503.14456), as its checkpoints on the hub are configured.

    Attributes:
        head_dim: items of a key and of a value of a head.
        num_heads: follows from the sizes.
        intermediate_size: of the channel mix; ``hidden_ratio`` times ``hidden_size`` in steps of
            32 where not given.
        decay_low_rank_dim: channels between the two products of the decay; the next three are
            those of the rate, of the mix of values, and of the gate.
        norm_eps: of all norms; those of the heads have ``head_dim`` times as much.
        value_dim: of each layer, or of all.
        attn: which layers are attention instead; none in published models.

    A published ``max_position_embeddings`` is left out: it would limit vLLM, but not the model.

    """

    model_type = "rwkv7"
    attribute_map = {  # noqa: RUF012 - the library's own way
        "head_size": "head_dim",
        "num_attention_heads": "num_heads",
        "layer_norm_epsilon": "norm_eps",
    }

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        head_dim: int = 64,
        hidden_ratio: float | None = 4.0,
        intermediate_size: int | None = None,
        decay_low_rank_dim: int = 64,
        a_low_rank_dim: int = 64,
        v_low_rank_dim: int = 16,
        gate_low_rank_dim: int = 128,
        norm_eps: float = 1e-5,
        norm_first: bool = True,
        norm_bias: bool = True,
        hidden_act: str = "sqrelu",
        value_dim: int | list[int] | None = None,
        attn: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        for unused in ("num_heads", "max_position_embeddings"):
            more.pop(unused, None)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.head_dim = num_hidden_layers, head_dim
        self.num_heads = hidden_size // head_dim
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size or -(
            -int(hidden_size * (hidden_ratio or 4)) // 32 * 32
        )
        self.decay_low_rank_dim, self.a_low_rank_dim = decay_low_rank_dim, a_low_rank_dim
        self.v_low_rank_dim, self.gate_low_rank_dim = v_low_rank_dim, gate_low_rank_dim
        self.norm_eps, self.norm_first, self.norm_bias = norm_eps, norm_first, norm_bias
        self.hidden_act, self.attn = hidden_act, attn
        value_dim = value_dim or hidden_size
        self.value_dim = (
            [value_dim] * num_hidden_layers if isinstance(value_dim, int) else value_dim
        )
        more.setdefault("tie_word_embeddings", False)
        super().__init__(**more)


CONFIGS = (Rwkv5Config, Rwkv7Config)


def register_configs() -> None:
    """Tell the transformers library of them, so that no remote code is asked for."""
    for config in CONFIGS:
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
