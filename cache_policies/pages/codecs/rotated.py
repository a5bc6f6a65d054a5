"""Rotated codecs: Hadamard rotation per head, then min-max per token.

Source: the rotation of QuaRot (Ashkboos et al., arXiv 2404.00456), applied to keys after rotary
embedding and to values; queries are rotated too and outputs rotated back, so that no matrix of the
model changes. Every token is encoded alone and at once: no recent window, no calibration, and a
kept token moves without loss. Outlier channels, a large key bias among them, are spread over all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cache_policies.pages.codecs.affine import AffineCodec
from cache_policies.pages.codecs.packing import check_bits
from cache_policies.pages.codecs.rotation import rotate

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Rotated(AffineCodec):
    """Rotated keys and values, one scale and minimum for a token's key and one for its value.

    Attributes:
        k_bits: bits of a key code.
        v_bits: bits of a value code.

    """

    name: ClassVar[str] = "rotated"
    keeps: ClassVar[str] = "every token"
    loses: ClassVar[str] = "precision of all tokens, spread evenly over their channels"
    ROTATES: ClassVar[bool] = True

    k_bits: int = 4
    v_bits: int = 4

    def __post_init__(self) -> None:
        check_bits("k_bits", self.k_bits, BITS)
        check_bits("v_bits", self.v_bits, BITS)

    def channel_group(self, head_size: int) -> int:
        return head_size

    @property
    def key_bits(self) -> int:
        return self.k_bits

    @property
    def value_bits(self) -> int:
        return self.v_bits

    @property
    def keys_per_channel(self) -> bool:
        return False

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        return rotate(x)
