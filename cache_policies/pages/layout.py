"""Where the fields of a page lie: sizes, offsets and views derive from the codec's declaration.

A *page* is one vLLM block of one layer. vLLM sees opaque bytes; here every KV head
owns a contiguous run of ``head_bytes`` bytes in it::

    page of one layer:  | head 0: field, field, ... | head 1: field, field, ... | ...

A ring page is the same run of bytes read differently: ``ring_tokens`` rows of
``[key | value]`` in 16-bit floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs.packing import LANES

if TYPE_CHECKING:
    from cache_policies.pages.codecs.base import Codec
    from cache_policies.pages.field import Field

ALIGNMENT = 64  # bytes; a cache line, so no field of one head shares a line with the next


@dataclass(frozen=True)
class PageLayout:
    """Where every field of a page lies, for one codec and one layer shape.

    Attributes:
        codec: the codec that owns the fields.
        head_size: channels of one KV head.
        page_tokens: tokens a store page holds (vLLM's block size).
        model_dtype: dtype of the keys and values the model produces.
        shared_residual: tokens absorbed at once where layers of other codecs share the block
            table; 0: the codec's own.
        least_ring_pages: ring pages that they need.
        packing: how codes below a byte lie, as the kernel reads them; same bytes either way.

    """

    codec: Codec
    head_size: int
    page_tokens: int
    model_dtype: torch.dtype
    shared_residual: int = 0
    least_ring_pages: int = 0
    packing: str = LANES

    def __post_init__(self) -> None:
        self.codec.check(self.head_size, self.page_tokens, self.model_dtype)
        if self.codec.residual and self.residual % self.codec.residual:
            raise PolicyError(
                f"{self.codec}: residual {self.codec.residual} does not divide {self.residual}, "
                "that of other layers"
            )

    @property
    def residual(self) -> int:
        """Recent tokens kept in the ring until they are absorbed together; 0: none."""
        return self.shared_residual or self.codec.residual

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The codec's declaration for this shape."""
        return self.codec.fields(self.head_size, self.page_tokens, self.model_dtype, self.packing)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of every field inside one head's run."""
        offsets, position = {}, 0
        for field in self.fields:
            offsets[field.name] = position
            position += field.num_bytes
        return offsets

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one KV head in one page: a multiple of the page's tokens and of 64."""
        used = sum(field.num_bytes for field in self.fields)
        # vLLM states page content per token, so the run must divide by page_tokens too.
        step = max(self.page_tokens, ALIGNMENT)
        return -(-used // step) * step

    @property
    def bytes_per_token(self) -> float:
        """Store bytes of one token in one KV head, keys and values together."""
        return self.head_bytes / self.page_tokens

    @property
    def ring_dtype(self) -> torch.dtype:
        """16-bit type of the recent window; bfloat16 only where the model is bfloat16."""
        return torch.bfloat16 if self.model_dtype == torch.bfloat16 else torch.float16

    @cached_property
    def ring_tokens(self) -> int:
        """Recent tokens one ring page holds."""
        return self.head_bytes // (2 * self.head_size * self.ring_dtype.itemsize)

    @cached_property
    def ring_pages(self) -> int:
        """Ring pages of one request; 0 for codecs that encode a token at once."""
        return max(self.least_ring_pages, -(-self.residual // self.ring_tokens))

    def views(self, page: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of a store page.

        Args:
            page: ``[num_kv_heads, head_bytes]`` uint8, last axis contiguous.

        Returns:
            field name -> ``[num_kv_heads, *field.shape]``, sharing memory with ``page``.

        """
        return {
            field.name: page[:, self.offsets[field.name] :][:, : field.num_bytes]
            .view(field.dtype)
            .unflatten(-1, field.shape)
            for field in self.fields
        }

    def ring_view(self, page: torch.Tensor) -> torch.Tensor:
        """A ring page as ``[num_kv_heads, ring_tokens, 2 * head_size]`` (key, then value)."""
        row_bytes = 2 * self.head_size * self.ring_dtype.itemsize
        used = page[:, : self.ring_tokens * row_bytes]
        return used.view(self.ring_dtype).unflatten(-1, (self.ring_tokens, 2 * self.head_size))
