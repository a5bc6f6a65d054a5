"""Bits by layer: the first and last layers of a model under a codec of their own.

All layers of a request share one row of vLLM's block table, hence one plan: the same ring and the
same number of tokens absorbed at once. Pages of different layers may differ in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from cache_policies.pages.codecs import CODECS
from cache_policies.errors import PolicyError
from cache_policies.pages.layout import PageLayout

if TYPE_CHECKING:
    import torch

    from cache_policies.pages.codecs.base import Codec
    from cache_policies.policy.policy import Policy


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


def is_edge(policy: Policy, layer: int, layers: int) -> bool:
    """Whether a layer has the codec of the term ``layers``.

    Raises:
        PolicyError: all layers have.

    """
    return policy.edges is not None and policy.edges.has(layer, layers)


@lru_cache(maxsize=256)
def layouts(
    policy: Policy, head_size: int, page_tokens: int, model_dtype: torch.dtype
) -> tuple[PageLayout, PageLayout]:
    """Page layouts of the inner and of the edge layers; they have the same plan.

    Raises:
        PolicyError: a codec cannot store this shape.

    """
    codecs = (policy.codec, policy.edges.built if policy.edges else policy.codec)
    residual = max(codec.residual for codec in codecs)
    own = [PageLayout(codec, head_size, page_tokens, model_dtype, residual) for codec in codecs]
    ring = max(layout.ring_pages for layout in own)
    inner, edge = (replace(layout, least_ring_pages=ring) for layout in own)
    return inner, edge
