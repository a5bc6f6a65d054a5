"""What models of recurrences have in common: states of layers, and vLLM's calls of a model."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, SupportsMambaPrefixCaching
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linear_models.steps import batch_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.config import VllmConfig

    from linear_models.scans.batch import Batch


def linear(
    inputs: int, outputs: int, name: str, vllm_config: VllmConfig, *, bias: bool = False
) -> ReplicatedLinear:
    """A product that every rank computes, of quantized weights where the model has them."""
    quant = vllm_config.quant_config
    return ReplicatedLinear(
        inputs, outputs, bias=bias, quant_config=quant, return_bias=False, prefix=name
    )


def empty(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter that is loaded."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class StateLayer(nn.Module, MambaBase):  # type: ignore[misc]
    """A layer with states, for which vLLM finds room.

    Attributes:
        COPIES: for each state, how vLLM copies it from one block to another.

    """

    COPIES: ClassVar[tuple[Callable[..., Any], ...]]

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.dtype, self.prefix = vllm_config.model_config.dtype, prefix
        self.kv_cache = tuple(torch.empty(0, dtype=torch.float32) for _ in self.COPIES)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @staticmethod
    @abstractmethod
    def state_shapes(config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of a request's states."""

    @staticmethod
    @abstractmethod
    def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Their dtypes in a model of this one."""

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.state_shapes(self.config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.state_dtypes(self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.MAMBA1  # whose metadata is plain

    def step(self) -> Batch | None:
        """Requests of the running step; none in a run that measures memory."""
        every = get_forward_context().attn_metadata
        return None if every is None else batch_of(every[self.prefix])


class RecurrentForCausalLM(nn.Module, HasInnerState, SupportsMambaPrefixCaching):  # type: ignore[misc]
    """A model of such layers; a subclass makes its modules.

    Attributes:
        LAYER: the layers with states.
        model: called with embeddings ``[tokens, hidden]`` and positions; has ``embeddings``.
        lm_head: for ``logits_processor``.

    """

    LAYER: ClassVar[type[StateLayer]]
    hf_to_vllm_mapper = WeightsMapper()
    model: nn.Module
    lm_head: nn.Module
    logits_processor: nn.Module

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        return cls.LAYER.state_shapes(vllm_config.model_config.hf_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        return cls.LAYER.state_dtypes(vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return cls.LAYER.COPIES

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.model.embeddings(input_ids)  # type: ignore[operator]
        return embedded

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
        hidden: torch.Tensor = self.model(inputs_embeds, positions)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            weights, mapper=self.hf_to_vllm_mapper
        )
        return loaded
