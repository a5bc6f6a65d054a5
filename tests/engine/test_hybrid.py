"""Gemma 3: sliding-window layers keep vLLM's own backend, full layers are ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from server.models import ModelError, get_model

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine


# words that the model continues with little doubt
PROMPT = [2, *([818, 3823, 8864, 37423, 38167, 1024, 506, 31770, 4799, 236761] * 70)]
MEMORY = 256 << 20


@pytest.fixture(scope="module")
def gemma() -> str:
    try:
        return str(get_model("gemma3-270m"))
    except ModelError as error:
        pytest.skip(f"Gemma 3 cannot be fetched: {error}")


@pytest.fixture(scope="module")
def stock(program: Program, gemma: str) -> Any:
    return program(
        "generate", model=gemma, policy=None, prompts=[PROMPT], max_tokens=12,
        kv_cache_memory_bytes=MEMORY,
    )  # fmt: skip


def test_a_model_with_sliding_windows_gives_the_same_tokens(
    program: Program, gemma: str, stock: Any
) -> None:
    ours = program(
        "generate", model=gemma, policy="kivi-4bit", prompts=[PROMPT], max_tokens=12,
        kv_cache_memory_bytes=MEMORY,
    )  # fmt: skip
    assert ours["results"][0]["tokens"] == stock["results"][0]["tokens"]
    assert ours["free"] == ours["total"]


def test_methods_cut_the_full_layers_only(program: Program, gemma: str, stock: Any) -> None:
    methods = [None, "snapkv(budget=200)", "streaming-llm(window=124)", "quest(topk=1)", "h2o"]
    got = program(
        "mixed", model=gemma, policy="fp16", prompts=[PROMPT] * len(methods), methods=methods,
        max_tokens=12, kv_cache_memory_bytes=MEMORY,
    )  # fmt: skip
    assert got["free"] == got["total"]
    assert all(len(tokens) == 12 for tokens in got["tokens"])
    assert got["tokens"][:2] == stock["results"][0]["tokens"] * 2


def test_edge_layers_are_refused(program: Program, gemma: str) -> None:
    message = program("refused", model=gemma, policy="kivi-2bit+layers")
    assert "layers of another kind than full attention; layer 0 is one" in message
