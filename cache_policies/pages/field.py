"""The declaration of one array inside a page; codecs declare, layouts place."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Field:
    """One array inside a page, per KV head.

    Attributes:
        name: e.g. ``key`` or ``value_scale``.
        dtype: element type.
        shape: shape for one KV head, without the head axis.

    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes for one KV head."""
        return prod(self.shape) * self.dtype.itemsize
