"""Bodies of the policy routes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Parameter(BaseModel):
    """A parameter of a codec or method."""

    name: str = Field(examples=["budget"])
    type: Literal["integer", "number", "word"]
    default: int | float | str = Field(examples=[1024])


class PolicyTerm(BaseModel):
    """A codec, retention or retrieval method."""

    name: str = Field(examples=["snapkv"])
    kind: Literal["codec", "retention", "retrieval"] = Field(
        description="codec: how tokens are stored, fixed per server; retention: which tokens stay; "
        "retrieval: which pages a query reads, sparse-prefill among them. A request may choose one "
        "retention method, one retrieval method and sparse-prefill together."
    )
    keeps: str = Field(examples=["the prompt's best tokens by its last queries"])
    loses: str = Field(examples=["tokens that the prompt's last queries do not look at"])
    parameters: list[Parameter]
    allowed: bool = Field(description="whether a request to this server may use it")
    why_not: str | None = Field(default=None, description="where it is not allowed")


class PolicyList(BaseModel):
    """All methods, and what this server runs."""

    model: str
    server_policy: str | None = Field(
        description="canonical policy of the server; null: vLLM's own cache, no method allowed",
        examples=["kivi-4bit"],
    )
    aliases: dict[str, str] = Field(
        description="model names that stand for a method", examples=[{"fast": "snapkv(budget=512)"}]
    )
    policies: list[PolicyTerm]


class Shape(BaseModel):
    """What of a model decides the size of its cache."""

    model_config = ConfigDict(extra="forbid")

    layers: int = Field(
        ge=0,
        le=10_000,
        examples=[32],
        description="of full attention, whose cache grows; 0 in a model without attention",
    )
    num_kv_heads: int = Field(ge=0, le=10_000, examples=[8])
    head_size: int = Field(ge=0, le=1024, examples=[128])
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    constant_bytes: int = Field(
        default=0,
        ge=0,
        le=1 << 60,
        description="of a request in layers that do not grow: sliding windows, constant states",
    )

    @model_validator(mode="after")
    def _has_a_cache(self) -> Shape:
        if self.layers and not (self.num_kv_heads and self.head_size):
            raise ValueError("layers of full attention have KV heads: num_kv_heads, head_size")
        if not self.layers and not self.constant_bytes:
            raise ValueError("neither layers nor constant_bytes: nothing is held")
        return self


class EstimateRequest(BaseModel):
    """What to estimate."""

    model_config = ConfigDict(extra="forbid")

    model_shape: Shape | None = Field(default=None, description="null: the served model's")
    memory_bytes: int = Field(
        default=4 << 30, gt=0, le=1 << 60, description="of the KV cache", examples=[4 << 30]
    )
    context_tokens: int = Field(
        default=8192, gt=0, le=1 << 24, description="prompt of each request", examples=[8192]
    )
    policies: list[str] = Field(
        default=["fp16", "int8", "flexgen-4bit", "kivi-4bit", "kivi-2bit"],
        min_length=1,
        max_length=64,
        examples=[["fp16", "kivi-4bit", "snapkv(budget=1024)+kivi-4bit"]],
    )


class PolicyEstimate(BaseModel):
    """One policy; everything but the name is null where it cannot store the shape."""

    policy: str
    bytes_per_token: float | None = Field(default=None, description="store bytes, all layers")
    window_bytes: int | None = Field(
        default=None, description="of a request's recent tokens in full precision"
    )
    constant_bytes: int | None = Field(
        default=None, description="of a request in layers that do not grow, whatever the policy"
    )
    capacity_tokens: int | None = Field(
        default=None, description="prompt tokens of the requests that fit together"
    )
    concurrent_requests: int | None = Field(default=None, description="that fit together")
    compression_ratio: float | None = Field(
        default=None, description="16-bit bytes of such a request over its bytes"
    )
    error: str | None = None


class Estimate(BaseModel):
    """Answer of an estimate, from the declaration of the pages; nothing is measured."""

    model_shape: Shape
    memory_bytes: int
    context_tokens: int
    estimates: list[PolicyEstimate]


class MethodUse(BaseModel):
    """Running requests of one method."""

    running_requests: int
    held_tokens: int


class Stats(BaseModel):
    """The pool at the engine's last step."""

    server_policy: str | None
    capacity_pages: int
    used_pages: int
    capacity_bytes: int
    used_bytes: int
    token_bytes: float = Field(description="store bytes of a token, all layers")
    compression_ratio: float | None = Field(
        description="16-bit bytes of the running requests' computed tokens over the bytes they own"
    )
    tokens_dropped: int = Field(description="since the start, by finished requests")
    pages_given_back: int = Field(description="before the end of their request, since the start")
    prefix_hit_tokens: int
    by_policy: dict[str, MethodUse]
