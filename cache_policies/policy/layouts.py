"""The page layouts that follow from a policy.

All layers of a request share one row of vLLM's block table, hence one plan: the same ring and the
same number of tokens absorbed at once. Pages of different layers may differ in bytes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from cache_policies.pages.codecs.packing import LANES
from cache_policies.pages.layout import PageLayout

if TYPE_CHECKING:
    import torch

    from cache_policies.policy.policy import Policy


def is_edge(policy: Policy, layer: int, layers: int) -> bool:
    """Whether a layer has the codec of the term ``layers``.

    Raises:
        PolicyError: all layers have.

    """
    return policy.edges is not None and policy.edges.has(layer, layers)


@lru_cache(maxsize=256)
def layouts(
    policy: Policy,
    head_size: int,
    page_tokens: int,
    model_dtype: torch.dtype,
    packing: str = LANES,
) -> tuple[PageLayout, PageLayout]:
    """Page layouts of the inner and of the edge layers; they have the same plan.

    ``packing`` is ``Kernel.packing``; what only counts bytes may leave it out.

    Raises:
        PolicyError: a codec cannot store this shape.

    """
    codecs = (policy.codec, policy.edges.built if policy.edges else policy.codec)
    residual = max(codec.residual for codec in codecs)
    own = [PageLayout(codec, head_size, page_tokens, model_dtype, residual) for codec in codecs]
    own = [replace(layout, packing=packing) for layout in own]
    ring = max(layout.ring_pages for layout in own)
    inner, edge = (replace(layout, least_ring_pages=ring) for layout in own)
    return inner, edge
