"""Unquantized pages: the model's own dtype, float16 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cache_policies.pages.codecs import octets
from cache_policies.pages.codecs.base import Codec, Views
from cache_policies.pages.codecs.packing import LANES, to_half
from cache_policies.pages.field import Field


@dataclass(frozen=True)
class Raw(Codec):
    """Stores keys and values as the model produced them."""

    name: ClassVar[str] = "raw"
    keeps: ClassVar[str] = "every token in the model's dtype"
    loses: ClassVar[str] = "nothing"
    QUANTIZES: ClassVar[bool] = False

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Stored dtype for a model dtype."""
        return model_dtype

    def fields(
        self, head_size: int, page_tokens: int, model_dtype: torch.dtype, packed: str = LANES
    ) -> tuple[Field, ...]:
        dtype = self.dtype(model_dtype)
        return (
            Field("key", dtype, octets.shape(page_tokens, head_size)),
            Field("value", dtype, (page_tokens, head_size)),
        )

    def write(self, views: Views, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        stored = views["key"].dtype
        key, value = (to_half(x) if stored == torch.float16 else x.to(stored) for x in (key, value))
        octets.write(views["key"], start, key)
        views["value"][:, start : start + value.shape[1]] = value

    def read(self, views: Views, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return octets.read(views["key"], count).float(), views["value"][:, :count].float()


@dataclass(frozen=True)
class Fp16(Raw):
    """Stores float16; values beyond its range are clamped to it."""

    name: ClassVar[str] = "fp16"
    keeps: ClassVar[str] = "every token in float16"
    loses: ClassVar[str] = "float32's last 13 mantissa bits"

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float16


@dataclass(frozen=True)
class Bf16(Raw):
    """Stores bfloat16."""

    name: ClassVar[str] = "bf16"
    keeps: ClassVar[str] = "every token in bfloat16"
    loses: ClassVar[str] = "float32's last 16 mantissa bits"

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16
