"""Mamba 1 in the place of vLLM's layer, whose scan its builds for CPUs lack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from cache_policies.errors import PolicyError
from linear_models.limits import refuse_speculation
from linear_models.scans import cpu
from linear_models.steps import batch_of

if TYPE_CHECKING:
    from linear_models.scans.batch import Batch


def refuse_layer(prefix: str, activation: str, width: int, size: int) -> None:
    """Refuse what the kernels do not compute.

    Args:
        prefix: name of the layer.
        activation: after the convolution.
        width: tokens of the convolution.
        size: states of a channel.

    Raises:
        PolicyError: naming the layer.

    """
    reasons = (
        (activation not in {"silu", "swish"}, f"activation {activation!r}, which is not silu"),
        (not 2 <= width <= cpu.MAX_WIDTH, f"a convolution over {width} tokens"),
        (size > cpu.MAX_SIZE, f"{size} states of a channel"),
    )
    for found, reason in reasons:
        if found:
            raise PolicyError(f"the Mamba 1 scan for CPUs does not know {reason}; {prefix} has it")


class _AsLoaded(UnquantizedLinearMethod):  # type: ignore[misc]
    """Leaves a weight as it was loaded.

    In bfloat16, on CPUs that have it, vLLM packs those of convolutions in place for its operator.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing."""


class CpuMambaMixer(MambaMixer):  # type: ignore[misc]
    """vLLM's layer and its weights; convolution and scan are those of ``scans.cpu``.

    Tokens stay rows throughout, and a request that decodes is a prompt of one token.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        refuse_layer(self.prefix, self.activation, self.conv_kernel_size, self.ssm_state_size)
        refuse_speculation(get_current_vllm_config())
        self.conv1d.quant_method = _AsLoaded()
        self._small: _Small | None = None

    def forward_impl(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """Run the layer: ``[tokens, hidden]`` to ``output`` of the same shape."""
        every = get_forward_context().attn_metadata
        metadata = None if every is None else every.get(self.prefix)
        projected = self.in_proj(hidden_states)[0]
        if metadata is None:  # a run that measures memory
            self.out_proj(projected.chunk(2, dim=-1)[0].contiguous())
            return
        batch = batch_of(metadata)
        tokens = batch.num_tokens
        mixed = self._mix(projected[:tokens], batch)
        output[:tokens] = self.out_proj(mixed)[0]

    def _mix(self, projected: torch.Tensor, batch: Batch) -> torch.Tensor:
        x, gate = projected.chunk(2, dim=-1)
        conv, states = self.kv_cache
        if is_conv_state_dim_first():
            conv = conv.transpose(-1, -2)
        small = self._small = self._small or self._converted()
        convolved = torch.empty(x.shape, dtype=x.dtype)
        cpu.causal_conv(x, small.weight, small.conv_bias, conv, batch, convolved)
        dt, b, c = self._ssm_transform(convolved)
        out = torch.empty_like(convolved)
        cpu.selective_scan(
            convolved, dt.transpose(-2, -1), self.A, b, c, small.d, small.dt_bias, gate, states,
            batch, out,
        )  # fmt: skip
        return out

    def _converted(self) -> _Small:
        """Once: weights do not change while serving."""
        return _Small(
            self.conv1d.weight.detach().float().squeeze(1).contiguous(),
            _float(self.conv1d.bias),
            self.D.detach().float(),
            _float(self.dt_proj.bias),
        )


class _Small(NamedTuple):
    """The layer's small parameters, in float32."""

    weight: torch.Tensor
    conv_bias: torch.Tensor | None
    d: torch.Tensor
    dt_bias: torch.Tensor | None


def _float(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().float()
