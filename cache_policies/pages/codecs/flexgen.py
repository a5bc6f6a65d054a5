"""FlexGen 4 bit: keys and values per token, min-max, in groups along the head dimension.

Source: Sheng et al., "FlexGen", arXiv 2303.06865, and its repository. Every token is
encoded as soon as it has been computed: there is no recent window. The original stores the
inverse scale; here the scale itself is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs.affine import AffineCodec

GROUPS = (16, 32, 64)


@dataclass(frozen=True)
class FlexGen(AffineCodec):
    """FlexGen's 4-bit cache.

    Attributes:
        group: channels that share a scale (the authors use 64, LongCTX-Bench 32).

    """

    name: ClassVar[str] = "flexgen-4bit"
    keeps: ClassVar[str] = "every token"
    loses: ClassVar[str] = "precision of all tokens, the newest too"

    group: int = 32

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise PolicyError(f"group={self.group} is not one of {GROUPS}")

    @property
    def divisor(self) -> int:
        return self.group

    @property
    def key_bits(self) -> int:
        return 4

    @property
    def value_bits(self) -> int:
        return 4

    @property
    def keys_per_channel(self) -> bool:
        return False
