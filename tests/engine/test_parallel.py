"""One engine on several ranks: tensor parallel and pipeline parallel, two processes each.

An engine's starting is most of what such a test takes: each does all of its asking, from a process
that has vLLM imported already.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine
RNG = random.Random(17)
PROMPTS = [[RNG.randrange(256) for _ in range(n)] for n in (3, 128, 300, 700, 713, 726)]
ADAPTIVE = "snapkv(budget=400,heads=adaptive)"


def held(facts: list[dict[str, Any]], ranks: int = 1) -> list[tuple[int, float, int]]:
    """Pages and bytes of each request on one of the ranks, and its kept tokens."""
    return [(f["pages"], f["bytes"] / ranks, f["kept_tokens"]) for f in facts]


def test_tensor_parallel(program: Program, tiny: str) -> None:
    """Heads that compete for places do so within their rank, which has one: as if uniform."""
    methods = [None, None, None, None, "snapkv(budget=200)", ADAPTIVE]
    arguments = {"model": tiny, "policy": "raw", "prompts": PROMPTS}
    one = program("mixed", **arguments, methods=[*methods[:-1], "snapkv(budget=400)"])
    two = program("mixed", **arguments, methods=methods, tensor_parallel_size=2)
    assert two["tokens"] == one["tokens"]
    assert two["free"] == two["total"]
    assert held(two["facts"]) == held(one["facts"], 2)


def test_pipeline_stages_know_every_requests_method(program: Program, tiny: str) -> None:
    """Prompts in one chunk, for stages share steps otherwise; eager ones do not start on a CPU."""
    methods = [None, "snapkv(budget=200)", "h2o(heavy=100,recent=60)", "quest(topk=1)"]
    arguments = {"model": tiny, "policy": "kivi-4bit", "prompts": PROMPTS[2:],
                 "methods": methods, "max_num_batched_tokens": 4096}  # fmt: skip
    one = program("mixed", **arguments)
    stages = {"pipeline_parallel_size": 2, "enforce_eager": False,
              "compilation_config": {"mode": 2, "backend": "eager"}}  # fmt: skip
    two = program("mixed", **arguments, **stages)
    assert two["tokens"] == one["tokens"]
    assert held(two["facts"]) == held(one["facts"], 2)
