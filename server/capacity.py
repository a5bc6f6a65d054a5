"""What a policy costs and holds, computed from the page declaration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache_policies.errors import PolicyError
from cache_policies.pages.plan import Plan
from cache_policies.policy.layouts import is_edge, layouts
from cache_policies.step.request import Engine, span_of

if TYPE_CHECKING:
    from cache_policies.policy import Policy
    from server.model_shape import ModelShape


@dataclass(frozen=True)
class Capacity:
    """A policy on a model with so much memory.

    Attributes:
        bytes_per_token: store bytes of a token in all layers that grow.
        ring_bytes: bytes of a request's recent window in all of them.
        constant_bytes: bytes of a request in layers that do not grow.
        request_bytes: bytes of a request of the given length, in whole pages, all of these
            included.
        requests: requests of the given length that fit together.
        ratio: bytes of such a request with 16-bit tokens in the layers that grow, divided by its
            bytes under the policy.

    """

    bytes_per_token: float
    ring_bytes: int
    constant_bytes: int
    request_bytes: int
    requests: int
    ratio: float


def capacity(
    policy: Policy, shape: ModelShape, memory: int, tokens: int, page_tokens: int = 128
) -> Capacity:
    """Capacity of ``memory`` bytes for requests with prompts of ``tokens`` tokens each.

    Requests are counted once their prompts are complete and what is dropped is given back.
    Of a model without attention every policy holds the same: its constant bytes.

    Raises:
        PolicyError: the policy cannot store this shape.

    """
    constant = shape.constant_bytes
    if not shape.layers:
        if not constant:
            raise PolicyError("a model of no layers with a cache")
        return Capacity(0.0, 0, constant, constant, memory // constant, 1.0)
    both = layouts(policy, shape.head_size, page_tokens, shape.dtype)
    plan = Plan.of(both[0])
    edges = [is_edge(policy, layer, shape.layers) for layer in range(shape.layers)]
    page_bytes = sum(both[edge].head_bytes for edge in edges) * shape.num_kv_heads
    engine = Engine(plan, shape.layers, longest=2 * tokens, room=2**31)
    span = span_of(policy.method, engine, tokens)
    pages = span.pages(tokens) - len(span.given_back(tokens))
    half = tokens * 4 * shape.head_size * shape.num_kv_heads * shape.layers + constant
    needed = pages * page_bytes + constant
    return Capacity(
        bytes_per_token=page_bytes / page_tokens,
        ring_bytes=plan.ring_pages * page_bytes,
        constant_bytes=constant,
        request_bytes=needed,
        requests=memory // needed,
        ratio=half / needed,
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
