"""KIVI: keys per channel, values per token, asymmetric, with a recent window in 16 bit.

Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
arXiv 2402.02750. Keys are stored after rotary embedding. Differences: the original keeps
exactly the last 128 *values* in full precision, while here keys and values leave the ring
together, ``residual`` tokens at a time; and the window is 16 bit whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs.affine import AffineCodec
from cache_policies.pages.codecs.packing import check_bits

GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Kivi(AffineCodec):
    """KIVI with any mix of 2, 4 and 8 bit.

    Attributes:
        k_bits: bits of a key code.
        v_bits: bits of a value code.
        group: tokens that share a key scale, and channels that share a value scale.
        residual: recent tokens in 16 bit; absorbed together when that many have gathered.

    """

    name: ClassVar[str] = "kivi"
    keeps: ClassVar[str] = "every token; the last 0..residual-1 in 16 bit"
    loses: ClassVar[str] = "precision of older tokens"

    k_bits: int = 4
    v_bits: int = 4
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        check_bits("k_bits", self.k_bits)
        check_bits("v_bits", self.v_bits)
        if self.group not in GROUPS:
            raise PolicyError(f"group={self.group} is not one of {GROUPS}")
        if self.residual < 32 or self.residual % 32 or self.residual % self.group:
            raise PolicyError(
                f"residual={self.residual} is not a positive multiple of 32 and of "
                f"group={self.group}"
            )

    @property
    def divisor(self) -> int:
        return self.group

    @property
    def key_bits(self) -> int:
        return self.k_bits

    @property
    def value_bits(self) -> int:
        return self.v_bits

    @property
    def keys_per_channel(self) -> bool:
        return True
