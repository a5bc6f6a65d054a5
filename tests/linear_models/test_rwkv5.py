"""RWKV-5 in float16: weights that are made smaller, and quantized ones, which cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cache_policies.errors import PolicyError
from linear_models.rwkv5 import Block, refuse_quantized_half

GPTQ = SimpleNamespace(get_name=lambda: "gptq")


def block(smaller: int, **weights: torch.Tensor) -> Any:
    module = SimpleNamespace(**weights)
    return SimpleNamespace(
        smaller=smaller, attention=SimpleNamespace(output=module),
        feed_forward=SimpleNamespace(value=module),
    )  # fmt: skip


def test_weights_of_a_block_whose_input_is_whole_stay_as_they_are() -> None:
    Block.rescale(block(1, qweight=torch.ones(2)))
    whole, smaller = block(1, weight=torch.ones(2)), block(4, weight=torch.ones(2))
    for one in (whole, smaller):
        Block.rescale(one)
    assert whole.attention.output.weight.tolist() == [1, 1]
    assert smaller.attention.output.weight.tolist() == [1 / 16] * 2  # both are the same here


@pytest.mark.parametrize(
    ("dtype", "quantization", "every", "refused"),
    [
        (torch.float16, GPTQ, 6, True),
        (torch.float16, GPTQ, 0, False),
        (torch.float16, None, 6, False),
        (torch.bfloat16, GPTQ, 6, False),
        (torch.float32, GPTQ, 6, False),
    ],
)
def test_quantized_weights_in_float16_are_refused(
    dtype: torch.dtype, quantization: Any, every: int, *, refused: bool
) -> None:
    model = SimpleNamespace(dtype=dtype, hf_config=SimpleNamespace(rescale_every=every))
    config: Any = SimpleNamespace(model_config=model, quant_config=quantization)
    if not refused:
        refuse_quantized_half(config)
        return
    with pytest.raises(PolicyError, match="which gptq weights cannot be; give --dtype bfloat16"):
        refuse_quantized_half(config)
