"""Models of many families, tiny and random: the tokens of transformers, and pages of their own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from server.model_shape import ModelShape
from tests.engine.tiny_models import agree, make_model

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine

WINDOWS = ("gemma2", "gemma3", "gpt-oss", "llama4")
STATES = ("granite4", "falcon-h1", "nemotron-h", "qwen3-next", "jamba")
HALF = ("qwen3-next",)  # vLLM has it for CPUs in bfloat16 only
METHODS = [
    "snapkv(budget=128)", "streaming-llm(window=124)", "h2o(heavy=64,recent=64)",
    "pyramidkv(budget=128)", "quest(topk=1)", "all",
]  # fmt: skip
_random = random.Random(1)
PROMPTS = [[_random.randrange(3, 500) for _ in range(n)] for n in (600, 300, 40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def of(family: str) -> str:
        if family not in made:
            dtype = getattr(torch, _dtype(family))
            made[family] = make_model(family, tmp_path_factory.mktemp(family), dtype)
        return made[family]

    return of


def _dtype(family: str) -> str:
    return "bfloat16" if family in HALF else "float32"


def _run(program: Program, models: Any, family: str, policy: str | None, **options: Any) -> Any:
    return program(
        "family", model=models(family), policy=policy, prompts=PROMPTS, dtype=_dtype(family),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("family", [*WINDOWS, *STATES])
def test_raw_answers_as_transformers_does(program: Program, models: Any, family: str) -> None:
    # chunks must reach the ends of pages, where states are taken: 384 tokens in Qwen3-Next
    got = _run(
        program, models, family, "raw", max_num_batched_tokens=512 if family in HALF else 256
    )
    assert agree(models(family), PROMPTS, got["tokens"]) == [8] * len(PROMPTS)
    assert got["again"] == got["tokens"]
    assert got["cached"][0] > 0 or family in HALF  # see docs/models.md
    assert got["free"] == got["total"]
    shape = ModelShape.from_folder(Path(models(family)), getattr(torch, _dtype(family)))
    ours = [layers for name, *_, layers in got["specs"] if name == "RingStoreSpec"]
    assert shape.layers == sum(ours)
    states = [size * layers for name, _, size, layers in got["specs"] if name == "MambaSpec"]
    if states:
        assert shape.constant_bytes == sum(states)


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "granite4", "jamba"])
def test_smaller_pages_leave_windows_and_states_as_they_are(
    program: Program, models: Any, family: str
) -> None:
    """Near enough to give the same tokens, if nothing of its pages is read as numbers."""
    codec = "fp16" if family == "granite4" else "int8"  # int8 turns one near tie of 24 there
    got = _run(program, models, family, codec, methods=METHODS)
    assert agree(models(family), PROMPTS, got["tokens"]) == [8] * len(PROMPTS)
    assert got["again"] == got["tokens"]
    assert got["cached"][0] > 0
    assert got["free"] == got["total"]
    assert got["methods"][METHODS.index("all")] == got["tokens"][0]
    assert all(len(tokens) == 8 for tokens in got["methods"])
    ours = sum(layers for name, *_, layers in got["specs"] if name == "RingStoreSpec")
    assert got["numbers"] == [[i, ours] for i in range(ours)]
    assert got["kept"][0]["kept_tokens"] == 128 + 7
    if family not in STATES:
        assert got["layout"] == "BLHNC"


@pytest.mark.parametrize(
    ("family", "policy", "memory"),
    [
        ("gemma3", "kivi-4bit", 100 << 15),
        ("granite4", "int8", 5 << 17),
        ("jamba", "int8", 5 << 17),
    ],
)
def test_a_storm_beside_windows_and_states_leaves_every_page_free(
    program: Program, models: Any, family: str, policy: str, memory: int
) -> None:
    result = program(
        "storm", model=models(family), policy=policy, requests=80, seed=5, max_model_len=1024,
        kv_cache_memory_bytes=memory, methods=METHODS, longest=600,
    )  # fmt: skip
    assert result["finished"] + result["cancelled"] == 80
    assert result["cancelled"] > 5
    assert result["preemptions"] > 0
    assert result["owned_twice"] == 0
    assert result["leaked"] == 0
