"""Requests under methods, in one layer on a device without values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cache_policies.pages.plan import Plan
from cache_policies.policy import parse_method
from cache_policies.retention import retention_methods
from cache_policies.retention.rope import Rope
from cache_policies.retrieval import PREFILL, RETRIEVAL
from cache_policies.step.cut import Layer, Tokens
from cache_policies.step.request import Engine, RequestState, span_of
from cache_policies.step.step import Step
from tests.cache_policies.worker import ROPE, SCALE, SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cache_policies.pages.layout import PageLayout

GROUP = 3  # query heads of a KV head
PROMPT, DECODE = 700, [1] * 20  # no multiple of any chunk, nor is its double


def one_method(name: str, form: str = "") -> str:
    """A retention method that drops something soon."""
    cls = retention_methods()[name]
    interval = ",interval=16" if cls.DECODE_CUTS else ""
    return f"{name}(ratio=0.25{interval}{form and f',prefill={form}'})"


METHODS = [
    *(one_method(name, form) for name, cls in retention_methods().items() for form in cls.PREFILL),
    "knorm(ratio=0.25,merge=values)",
    *(
        f"{name}(topk=1,init=128,local=128,prefill={form})"
        for name, cls in RETRIEVAL.items()
        for form in cls.PREFILL
    ),
    "streaming-llm(ratio=0.25,interval=16,positions=cache)",
    "snapkv(ratio=0.5,heads=adaptive)",
    "expected-attention(ratio=0.5,heads=adaptive)",
    *(f"h2o(ratio=0.5,interval=16,heads=adaptive,prefill={form})" for form in ("full", "bounded")),
    "tova(ratio=0.8,interval=16)+quest(topk=1,init=128,local=128)",
    "knorm(ratio=0.8,interval=16)+infllm(topk=1,init=128,local=128,prefill=bounded)",
    *(f"{name}(exact=0)" for name in PREFILL),
    *(f"{one_method('snapkv')}+{name}(exact=0)" for name in PREFILL),
]


def layer_of(kernel: Any, layout: PageLayout, heads: int) -> Layer:
    """A layer of so many KV heads."""
    pages = torch.empty(100, heads, layout.head_bytes, dtype=torch.uint8, device="meta")
    return Layer(0, 1, layout, kernel, pages, Rope(ROPE.table.to("meta"), SIZE), SCALE)


def drive(
    layer: Layer,
    methods: Sequence[str],
    prompt: int,
    around: AbstractContextManager[Any] | None = None,
) -> None:
    """Run requests of one length, each under its own method, through prompt and answer.

    Args:
        layer: a ``layer_of``.
        methods: one a request.
        prompt: tokens of each prompt, which comes in two chunks.
        around: what every step of the layer runs in.

    """
    count, plan = len(methods), Plan.of(layer.layout)
    engine = Engine(plan, 1, 8000, 10**6)
    states = [
        RequestState(chosen, span_of(chosen, engine, prompt))
        for chosen in map(parse_method, methods)
    ]
    table = torch.empty(count, 60, dtype=torch.int32, device="meta")
    computed = 0
    for chunk in (prompt * 2 // 5, prompt * 3 // 5, *DECODE):
        start = np.arange(0, (count + 1) * chunk, chunk, dtype=np.int32)
        for state in states:
            state.advance(computed, computed + chunk)
        before = np.full(count, computed, dtype=np.int32)
        step = Step(plan, start, before, list(states), table)
        tokens = tokens_of(layer, count * chunk)
        with around or nullcontext():
            step.run(layer, tokens, torch.empty_like(tokens.query))
        computed += chunk


def tokens_of(layer: Layer, count: int) -> Tokens:
    """As models hand them over: parts of one tensor."""
    heads = (GROUP * layer.heads, layer.heads, layer.heads)
    wide = torch.empty(count, sum(heads) * SIZE, dtype=layer.layout.model_dtype, device="meta")
    parts = wide.split([n * SIZE for n in heads], 1)
    return Tokens(*(part.unflatten(1, (n, SIZE)) for part, n in zip(parts, heads, strict=True)))
