"""Keys as ``[token / 8, channel, token % 8]``: one channel of eight tokens is one vector.

Unquantized and int8 pages keep their keys so: scores of eight tokens then need no
horizontal sum. Values stay ``[token, channel]``.
"""

from __future__ import annotations

import torch


def shape(page_tokens: int, head_size: int) -> tuple[int, int, int]:
    """Shape of a key field."""
    return page_tokens // 8, head_size, 8


def write(field: torch.Tensor, start: int, x: torch.Tensor) -> None:
    """Put ``x`` ``[heads, tokens, channels]`` at token ``start`` of ``[heads, *shape]``."""
    token = torch.arange(start, start + x.shape[1])
    field[:, token // 8, :, token % 8] = x.transpose(0, 1)


def read(field: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` tokens, ``[heads, count, channels]``."""
    return field.transpose(2, 3).flatten(1, 2)[:, :count]
