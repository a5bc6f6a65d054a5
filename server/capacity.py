"""What a policy costs and holds, computed from the page declaration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cache_policies.pages.plan import Plan
from cache_policies.policy.layouts import is_edge, layouts
from cache_policies.step.request import Engine, span_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from cache_policies.policy import Policy


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its cache.

    Attributes:
        layers: attention layers.
        num_kv_heads: KV heads of a layer.
        head_size: channels of a KV head.
        dtype: dtype the model runs in.

    """

    layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype) -> ModelShape:
        """Read ``config.json`` of a model folder."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Capacity:
    """A policy on a model with so much memory.

    Attributes:
        bytes_per_token: store bytes of a token in all layers.
        ring_bytes: bytes of a request's recent window in all layers.
        request_bytes: bytes of a request of the given length, in whole pages.
        requests: requests of the given length that fit together, ring included.
        ratio: 16-bit bytes of such a request divided by its bytes under the policy.

    """

    bytes_per_token: float
    ring_bytes: int
    request_bytes: int
    requests: int
    ratio: float


def capacity(
    policy: Policy, shape: ModelShape, memory: int, tokens: int, page_tokens: int = 128
) -> Capacity:
    """Capacity of ``memory`` bytes for requests with prompts of ``tokens`` tokens each.

    Requests are counted once their prompts are complete and what is dropped is given back.

    Raises:
        PolicyError: the policy cannot store this shape.

    """
    both = layouts(policy, shape.head_size, page_tokens, shape.dtype)
    plan = Plan.of(both[0])
    edges = [is_edge(policy, layer, shape.layers) for layer in range(shape.layers)]
    page_bytes = sum(both[edge].head_bytes for edge in edges) * shape.num_kv_heads
    engine = Engine(plan, shape.layers, longest=2 * tokens, room=2**31)
    span = span_of(policy.method, engine, tokens)
    pages = span.pages(tokens) - len(span.given_back(tokens))
    half = tokens * 4 * shape.head_size * shape.num_kv_heads * shape.layers
    return Capacity(
        bytes_per_token=page_bytes / page_tokens,
        ring_bytes=plan.ring_pages * page_bytes,
        request_bytes=pages * page_bytes,
        requests=memory // page_bytes // pages,
        ratio=half / (pages * page_bytes),
    )


FAR = 2**17  # tokens: whole pages, and more than a budget keeps


def bytes_by_length(policy: Policy, shape: ModelShape) -> tuple[float, float]:
    """Constant and slope of a long request's bytes as a function of its tokens, but for part pages.

    Raises:
        PolicyError: the policy cannot store this shape.

    """
    near, far = (capacity(policy, shape, 0, tokens).request_bytes for tokens in (FAR, 2 * FAR))
    slope = (far - near) / FAR
    return near - slope * FAR, slope
