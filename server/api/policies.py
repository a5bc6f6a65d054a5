"""The policy routes: which methods there are, what a policy would hold, what the pool holds."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse
from prometheus_client.parser import text_string_to_metric_families

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs import CODECS
from cache_policies.parameters import parameters
from cache_policies.policy import method_classes, parse
from cache_policies.policy.layers import EdgeLayers
from cache_policies.retention import retention_methods
from cache_policies.retrieval import PREFILL, RETRIEVAL
from cache_policies.vllm_plugin.config import refuse_method, why_no_policy
from server.api.page import page
from server.api.schemas import (
    Estimate,
    EstimateRequest,
    MethodUse,
    Parameter,
    PolicyEstimate,
    PolicyList,
    PolicyTerm,
    Shape,
    Stats,
)
from server.capacity import capacity
from server.model_shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cache_policies.pages.codecs.base import Codec
    from server.api.state import ServerState

router = APIRouter(tags=["cache policies"])
TYPES: dict[type, Any] = {int: "integer", float: "number", str: "word"}


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.kvthrift
    return state


@router.get("/v1/cache_policies")
async def list_policies(request: Request) -> PolicyList:
    """Every codec and method: parameters, what is lost, and whether this server takes it."""
    state = _state(request)
    serving = state.policy.codec_name if state.policy else None
    terms = [
        _layout_term(name, entry.cls, dict(entry.fixed), serving=name == serving)
        for name, entry in CODECS.items()
    ]
    edges = state.policy is not None and state.policy.edges is not None
    terms.append(_layout_term(EdgeLayers.name, EdgeLayers, {}, serving=edges))
    terms += [_method(name, "retention", state) for name in retention_methods()]
    terms += [_method(name, "retrieval", state) for name in (*RETRIEVAL, *PREFILL)]
    policy = str(state.policy) if state.policy else None
    names = state.names
    return PolicyList(
        model=names.first, server_policy=policy, aliases=names.aliases, policies=terms
    )


def _parameters(settable: Mapping[str, Any]) -> list[Parameter]:
    return [Parameter(name=k, type=TYPES[type(v)], default=v) for k, v in settable.items()]


def _layout_term(
    name: str, cls: type[Codec | EdgeLayers], fixed: dict[str, Any], *, serving: bool
) -> PolicyTerm:
    return PolicyTerm(
        name=name,
        kind="codec",
        keeps=cls.keeps,
        loses=cls.loses,
        parameters=_parameters(parameters(cls, fixed)),
        allowed=serving,
        why_not=None if serving else "the codec is the server's: kvthrift serve --cache-policy",
    )


def _method(name: str, kind: Any, state: ServerState) -> PolicyTerm:
    cls = method_classes()[name]
    why_not = None
    if state.policy is None:
        why_not = why_no_policy(state.vllm_config)
    else:
        try:
            refuse_method(parse(name).method, state.vllm_config)
        except PolicyError as error:
            why_not = str(error)
    return PolicyTerm(
        name=name,
        kind=kind,
        keeps=cls.keeps,
        loses=cls.loses,
        parameters=_parameters(cls.settable()),
        allowed=why_not is None,
        why_not=why_not,
    )


@router.post("/v1/cache_policies/estimate")
async def estimate(request: Request, asked: EstimateRequest) -> Estimate:
    """Bytes per token, capacity and concurrency of policies, from the declaration of the pages."""
    shape = asked.model_shape or _state(request).shape
    found = [_estimate(text, shape, asked) for text in asked.policies]
    return Estimate(
        model_shape=shape,
        memory_bytes=asked.memory_bytes,
        context_tokens=asked.context_tokens,
        estimates=found,
    )


def _estimate(text: str, shape: Shape, asked: EstimateRequest) -> PolicyEstimate:
    dtype = getattr(torch, shape.dtype)
    model = ModelShape(
        shape.layers, shape.num_kv_heads, shape.head_size, dtype, shape.constant_bytes
    )
    try:
        policy = parse(text)
        size = capacity(policy, model, asked.memory_bytes, asked.context_tokens)
    except PolicyError as error:
        return PolicyEstimate(policy=text, error=str(error))
    return PolicyEstimate(
        policy=str(policy),
        bytes_per_token=size.bytes_per_token,
        window_bytes=size.ring_bytes,
        constant_bytes=size.constant_bytes,
        capacity_tokens=size.requests * asked.context_tokens,
        concurrent_requests=size.requests,
        compression_ratio=round(size.ratio, 4),
    )


@router.get(
    "/v1/cache_policies/stats", responses={503: {"description": "no policy, or no step yet"}}
)
async def stats(request: Request) -> Stats:
    """The live pool: pages, bytes and tokens held, by method."""
    return read_stats(_state(request))


def read_stats(state: ServerState) -> Stats:
    """The engine's metrics as one object.

    Raises:
        HTTPException: 503 where the engine has none.

    """
    found = list(text_string_to_metric_families(state.metrics_text()))
    samples = [s for family in found for s in family.samples if s.name.startswith("kvthrift_")]

    def value(name: str) -> float:
        return sum(s.value for s in samples if s.name == f"kvthrift_{name}")

    def by(label: str, name: str) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for s in samples:
            if s.name == f"kvthrift_{name}":
                sums[s.labels[label]] += s.value
        return sums

    if not value("kv_capacity_pages"):
        raise HTTPException(503, state.why_no_stats)
    running, held = by("policy", "requests_running"), by("policy", "kv_held_tokens")
    return Stats(
        server_policy=str(state.policy) if state.policy else None,
        capacity_pages=int(value("kv_capacity_pages")),
        used_pages=int(value("kv_used_pages")),
        capacity_bytes=int(value("kv_capacity_bytes")),
        used_bytes=int(value("kv_used_bytes")),
        token_bytes=value("kv_token_bytes"),
        compression_ratio=_mean(
            by("engine", "kv_compression_ratio"), by("engine", "kv_used_bytes")
        ),
        tokens_dropped=int(value("tokens_dropped_total")),
        pages_given_back=int(value("pages_given_back_total")),
        prefix_hit_tokens=int(value("prefix_hit_tokens_total")),
        by_policy={
            name: MethodUse(running_requests=int(n), held_tokens=int(held.get(name, 0)))
            for name, n in sorted(running.items())
        },
    )


def _mean(ratios: dict[str, float], used: dict[str, float]) -> float | None:
    """Compression of all engines: weighted by the bytes used, while any are."""
    found = {engine: ratio for engine, ratio in ratios.items() if ratio}
    weights = [used.get(engine, 0) for engine in found]
    if not found:
        return None
    return fmean(found.values(), weights if sum(weights) else None)


@router.get("/policies", include_in_schema=False)
async def policies_page(request: Request) -> HTMLResponse:
    """The same for a person."""
    state = _state(request)
    try:
        live = read_stats(state)
    except HTTPException:
        live = None
    listed = await list_policies(request)
    sizes = await estimate(request, EstimateRequest(memory_bytes=_pool(live)))
    return HTMLResponse(page(listed, sizes, live))


def _pool(live: Stats | None) -> int:
    return live.capacity_bytes if live else 4 << 30
