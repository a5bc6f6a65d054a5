"""The same tokens on vLLM's model runners and schedulers: V1, V2, V2 with async scheduling.

V2 runs in Triton's interpreter (see ``interpreter``), so the cases are few and short.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.conftest import RUNNERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine
RNG = random.Random(17)
PROMPTS = [[RNG.randrange(256) for _ in range(n)] for n in (3, 127, 300)]
METHODS = [None, "snapkv(budget=100)", "h2o(heavy=60,recent=60)", "streaming-llm(window=60)"]
LONG = [[RNG.randrange(256) for _ in range(280 + 9 * i)] for i in range(len(METHODS))]
SMALL = {"max_model_len": 512, "max_num_seqs": 8}
PAGE = 128 * 512 * 4  # raw: two layers of two heads in float32
NEXT = pytest.mark.next  # on vLLM's next release too
NEXT_IF_ASYNC = pytest.mark.parametrize(
    "v2", ["v2", pytest.param("v2-async", marks=NEXT)], indirect=True
)


@pytest.fixture(params=RUNNERS)
def v2(request: pytest.FixtureRequest, program: Program) -> Program:
    """Programs on a V2 runner."""
    environment = RUNNERS[request.param]

    def run(name: str, **arguments: Any) -> Any:
        return program(name, environment, **arguments)

    run.runner = request.param  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def v1(program: Program) -> Callable[..., Any]:
    """Programs on V1, each run once."""
    known: dict[str, Any] = {}

    def run(name: str, **arguments: Any) -> Any:
        key = f"{name} {sorted(arguments.items())}"
        if key not in known:
            known[key] = program(name, **arguments)
        return known[key]

    return run


def test_an_engine_without_a_policy_starts_and_is_vllms(
    v1: Program, v2: Program, tiny: str
) -> None:
    arguments = {"model": tiny, "policy": None, "prompts": PROMPTS[:2], "max_tokens": 8, **SMALL}
    stock = v2("generate", **arguments)
    assert stock["impl"] == "CPUAttentionBackendImpl"
    assert stock["runner"] == "vllm.v1.worker.cpu.model_runner"
    asynchronous = v2.runner == "v2-async"  # type: ignore[attr-defined]
    assert stock["scheduler"] == ("AsyncScheduler" if asynchronous else "Scheduler")
    for got, expected in zip(stock["results"], v1("generate", **arguments)["results"], strict=True):
        assert got["tokens"] == expected["tokens"]
        assert got["logprobs"][0] == pytest.approx(expected["logprobs"][0], abs=2e-3)


@pytest.mark.parametrize("policy", ["raw", pytest.param("kivi-4bit", marks=NEXT)])
def test_a_policy_gives_the_tokens_of_v1(v1: Program, v2: Program, tiny: str, policy: str) -> None:
    """Raw on V1 gives those of stock vLLM, see ``test_engine``."""
    arguments = {"model": tiny, "policy": policy, "prompts": PROMPTS, "max_tokens": 8, **SMALL,
                 "max_num_batched_tokens": {"raw": 256}.get(policy, 512)}  # fmt: skip
    got = v2("generate", **arguments)
    asynchronous = v2.runner == "v2-async"  # type: ignore[attr-defined]
    assert got["scheduler"] == ("PolicyAsyncScheduler" if asynchronous else "PolicyScheduler")
    assert got["impl"] == "RingStoreImpl"
    assert got["free"] == got["total"]
    expected = v1("generate", **arguments)["results"]
    assert [r["tokens"] for r in got["results"]] == [r["tokens"] for r in expected]


@NEXT
def test_methods_share_a_batch(v1: Program, v2: Program, tiny: str) -> None:
    arguments = {"model": tiny, "policy": "fp16", "prompts": LONG, "methods": METHODS,
                 "max_tokens": 6, "max_num_batched_tokens": 2048, **SMALL}  # fmt: skip
    got, expected = v2("mixed", **arguments), v1("mixed", **arguments)
    assert got["tokens"] == expected["tokens"]
    assert got["free"] == got["total"]


@NEXT_IF_ASYNC
def test_a_prefix_hit_equals_a_fresh_run(v2: Program, tiny: str) -> None:
    methods = ["snapkv(budget=100)", "snapkv(budget=100)", "h2o(heavy=60,recent=60)", "all"]
    got = v2(
        "mixed", model=tiny, policy="fp16", prompts=[LONG[0]] * 4, methods=methods,
        max_tokens=4, together=False, max_num_batched_tokens=128, **SMALL,
    )  # fmt: skip
    assert got["cached"] == [0, 128, 0, 256]
    assert got["tokens"][0] == got["tokens"][1]


@NEXT_IF_ASYNC
def test_preemption_keeps_the_policy(v1: Program, v2: Program, tiny: str) -> None:
    """Tokens differ from where a request was preempted on: its answer is attended to in full
    when it starts over. Asynchronous scheduling preempts at other steps.
    """
    methods = ["all", "snapkv(budget=100)", "tova(budget=90)", "knorm(budget=90)"]
    arguments = {"model": tiny, "policy": "raw", "prompts": LONG, "methods": methods,
                 "max_tokens": 110, **SMALL}  # fmt: skip
    roomy = v1("mixed", **arguments)
    small = v2("mixed", **arguments, kv_cache_memory_bytes=10 * PAGE)
    assert small["preemptions"] > 0
    assert small["free"] == small["total"]
    for got, expected, same in zip(
        small["tokens"], roomy["tokens"], small["undisturbed"], strict=True
    ):
        assert got[:same] == expected[:same]
    assert small["tokens"][0] == roomy["tokens"][0]  # of the one that drops nothing


def test_a_bad_method_is_refused_at_admission(v2: Program, tiny: str) -> None:
    first, second = v2("rejected", model=tiny, policy=None, methods=["snapkv"], **SMALL)
    assert "runs without a cache policy" in first
    assert second == "length"


def test_a_storm_of_policies_leaves_every_page_free(v2: Program, tiny: str) -> None:
    result = v2(
        "storm", model=tiny, policy="fp16", requests=40, seed=3, kv_cache_memory_bytes=6 * PAGE,
        methods=[m or "all" for m in METHODS], longest=300, **SMALL,
    )  # fmt: skip
    assert result["finished"] + result["cancelled"] == 40
    assert result["cancelled"] > 0
    assert result["owned_twice"] == 0
    assert result["leaked"] == 0
    assert result["known"] <= 1  # the last one
