"""int8 per token and head: one symmetric scale for a token's key, one for its value.

The scheme vLLM calls ``int8_per_token_head`` and LMDeploy and OpenVINO use for 8 bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cache_policies.pages.codecs import octets
from cache_policies.pages.codecs.base import Codec, Views
from cache_policies.pages.codecs.packing import LANES, to_half
from cache_policies.pages.field import Field


@dataclass(frozen=True)
class Int8(Codec):
    """Symmetric 8-bit codes with one float16 scale per token and KV head."""

    name: ClassVar[str] = "int8"
    keeps: ClassVar[str] = "every token"
    loses: ClassVar[str] = "precision below 1/254 of each vector's largest channel"

    @property
    def takes_key_offset(self) -> bool:
        return True

    def fields(
        self, head_size: int, page_tokens: int, model_dtype: torch.dtype, packed: str = LANES
    ) -> tuple[Field, ...]:
        return (
            Field("key", torch.int8, octets.shape(page_tokens, head_size)),
            Field("key_scale", torch.float16, (page_tokens,)),
            Field("value", torch.int8, (page_tokens, head_size)),
            Field("value_scale", torch.float16, (page_tokens,)),
        )

    def write(self, views: Views, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        span = slice(start, start + key.shape[1])
        codes, views["key_scale"][:, span] = _quantize(key)
        octets.write(views["key"], start, codes)
        views["value"][:, span], views["value_scale"][:, span] = _quantize(value)

    def read(self, views: Views, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = (views[f"{name}_scale"][:, :count, None].float() for name in ("key", "value"))
        codes = octets.read(views["key"], count), views["value"][:, :count]
        key, value = (code.float() * scale for code, scale in zip(codes, scales, strict=True))
        return key, value


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[heads, tokens, channels]`` int8 and scales ``[heads, tokens]`` float16."""
    scale = to_half(x.abs().amax(-1, keepdim=True) / 127)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    codes = (x * inverse).round().clamp(-127, 127).to(torch.int8)
    return codes, scale.squeeze(-1)
