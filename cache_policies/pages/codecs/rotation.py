"""Orthonormal Hadamard rotation over the channels of a head: outlier channels spread over all.

A product with a rotated query does not change, (Hq).(Hk) = q.k, and sums of rotated values are
rotated sums. In Sylvester's order H is symmetric, and so its own inverse.
"""

from __future__ import annotations

import torch


def block(head_size: int) -> int:
    """Channels that are mixed: the largest power of two that divides the head size."""
    return head_size & -head_size


def rotate(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., head_size]`` rotated in blocks of channels, or rotated back."""
    size = block(x.shape[-1])
    mixed, half = x.unflatten(-1, (-1, size)), 1
    while half < size:
        pairs = mixed.unflatten(-1, (-1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        mixed = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    return mixed.flatten(-2) * size**-0.5
