"""Bits by layer: the first and last layers of a model under a codec of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs import CODECS

if TYPE_CHECKING:
    from cache_policies.pages.codecs.base import Codec


@dataclass(frozen=True)
class EdgeLayers:
    """The term ``layers(first=2,last=2,codec=fp16)`` of a policy.

    Attributes:
        first: layers at the model's beginning that have the codec.
        last: layers at its end.
        codec: name of a codec without parameters.

    """

    name: ClassVar[str] = "layers"
    keeps: ClassVar[str] = "the model's first and last layers at another precision"
    loses: ClassVar[str] = "what their codec loses"

    first: int = 2
    last: int = 2
    codec: str = "fp16"

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 0 or not self.first + self.last:
            raise PolicyError(f"layers: first={self.first}, last={self.last} names no layer")
        if self.codec not in CODECS:
            raise PolicyError(f"layers: codec={self.codec} is not one of {', '.join(CODECS)}")

    @property
    def built(self) -> Codec:
        """The codec."""
        return CODECS[self.codec].build()

    def has(self, layer: int, layers: int) -> bool:
        """Whether layer number ``layer`` of ``layers`` is one of them.

        Raises:
            PolicyError: they are all layers of the model.

        """
        if self.first + self.last >= layers:
            raise PolicyError(
                f"layers(first={self.first},last={self.last}) takes all of the model's {layers} "
                "layers; give their codec as the policy's"
            )
        return layer < self.first or layer >= layers - self.last
