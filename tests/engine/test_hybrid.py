"""Gemma 3: sliding-window layers keep vLLM's own backend, full layers are ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from server.models import ModelError, get_model

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine


def test_a_model_with_sliding_windows_gives_the_same_tokens(program: Program) -> None:
    try:
        model = str(get_model("gemma3-270m"))
    except ModelError as error:
        pytest.skip(f"Gemma 3 cannot be fetched: {error}")
    # words that the model continues with little doubt
    prompt = [2, *([818, 3823, 8864, 37423, 38167, 1024, 506, 31770, 4799, 236761] * 70)]
    stock, ours = (
        program("generate", model=model, policy=policy, prompts=[prompt], max_tokens=12,
                kv_cache_memory_bytes=256 << 20)
        for policy in (None, "kivi-4bit")
    )  # fmt: skip
    assert ours["results"][0]["tokens"] == stock["results"][0]["tokens"]
    assert ours["free"] == ours["total"]
