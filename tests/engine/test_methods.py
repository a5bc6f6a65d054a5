"""Retention and retrieval in unmodified vLLM, on a tiny random model."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine
RNG = random.Random(11)
METHODS = [
    "snapkv(budget=200)", None, "h2o(heavy=100,recent=60)", "streaming-llm(sinks=4,window=124)",
    "infllm(topk=1,local=128)", "tova(budget=150,interval=16)", "expected-attention(ratio=0.25)",
    "quest(topk=1)", "keydiff(ratio=0.5)", "pyramidkv(budget=150)",
    "lagkv(budget=300,merge=values)", "random(budget=100)", "knorm(budget=90,prefill=bounded)",
    "streaming-llm(sinks=4,window=96,positions=cache)", "r-kv(budget=150)", "compactor(budget=150)",
    "snapkv(budget=600)+quest(topk=1)", "tova(budget=600,interval=8)+quest(topk=1)",
    "streaming-llm(window=600)+infllm(topk=1,local=128)",
    "sparse-prefill(topk=1,exact=128)", "snapkv(budget=200)+sparse-prefill(coverage=0.5,exact=0)",
    "snapkv(budget=400,heads=adaptive)", "h2o(ratio=0.5,interval=8,heads=adaptive)",
    "h2o(heavy=200,recent=100,prefill=bounded,heads=adaptive)",
]  # fmt: skip
PROMPTS = [[RNG.randrange(256) for _ in range(700 + 13 * i)] for i in range(len(METHODS))]
PAGE = 128 * 256 * 4  # fp16: two layers of two heads


def test_requests_of_different_policies_share_a_batch(program: Program, tiny: str) -> None:
    """Chunks differ between the runs, so only the methods that do not depend on them compare."""
    arguments = {"model": tiny, "policy": "fp16", "prompts": PROMPTS, "methods": METHODS}
    alone = program("mixed", **arguments, together=False)
    got = program("mixed", **arguments)
    assert got["free"] == got["total"]
    assert all(len(tokens) == 24 for tokens in got["tokens"])
    same = [i for i, m in enumerate(METHODS) if m is None or not _depends_on_chunks(m)]
    assert [got["tokens"][i] for i in same] == [alone["tokens"][i] for i in same]
    for method, facts in zip(METHODS, alone["facts"], strict=True):
        if method and "sparse" in method:
            assert 0 < facts["read_share"] < 0.9
        else:
            assert "read_share" not in facts


def test_a_prompt_of_embeddings_has_a_method_too(program: Program, tiny: str) -> None:
    methods = ["snapkv(budget=200)", "tova(budget=150,interval=16)", "lagkv(budget=300)", "all"]
    arguments = {"model": tiny, "policy": "fp16", "prompts": PROMPTS[:4], "methods": methods}
    given = program("embedded", **arguments)
    assert given == program("mixed", **arguments)["tokens"]


def test_every_method_runs_on_quantized_pages(program: Program, tiny: str) -> None:
    got = program("mixed", model=tiny, policy="kivi-4bit", prompts=PROMPTS, methods=METHODS)
    assert got["free"] == got["total"]
    assert all(len(tokens) == 24 for tokens in got["tokens"])


def _depends_on_chunks(method: str) -> bool:
    bounded = ("streaming-llm", "keydiff", "infllm")
    return method.startswith(bounded) or "bounded" in method or "sparse" in method


METHODS_OF_A_SMALL_POOL = [
    ["snapkv(budget=100)", "lagkv(budget=270)", "pyramidkv(budget=90)", "tova(budget=90)",
     "snapkv(budget=100)", "lagkv(budget=270)", "pyramidkv(budget=90)",
     "snapkv(budget=300,heads=adaptive)"],
    ["compactor(budget=150)", "r-kv(budget=150)", "lagkv(budget=270,merge=values)",
     "r-kv(budget=90)", "snapkv(budget=300)+quest(topk=1)", "knorm(budget=90,merge=values)",
     "compactor(budget=270)", "knorm(budget=300)+quest(topk=1)"],
]  # fmt: skip


@pytest.mark.parametrize("methods", METHODS_OF_A_SMALL_POOL, ids=["older", "newer"])
def test_preemption_keeps_the_policy(program: Program, tiny: str, methods: list[str]) -> None:
    """The same tokens as with room enough, until a request that starts over sees its own answer
    as a part of the prompt, which is then attended to in full.
    """
    arguments = {"model": tiny, "policy": "raw", "methods": methods, "max_tokens": 400,
                 "prompts": PROMPTS[: len(methods)], "max_model_len": 1280}  # fmt: skip
    roomy = program("mixed", **arguments)
    small = program("mixed", **arguments, kv_cache_memory_bytes=14 * 2 * PAGE)
    assert roomy["preemptions"] == 0
    assert small["preemptions"] > 0
    assert small["free"] == small["total"]
    assert all(len(tokens) == 400 for tokens in small["tokens"])
    assert min(small["undisturbed"]) >= 64
    for got, expected, same in zip(
        small["tokens"], roomy["tokens"], small["undisturbed"], strict=True
    ):
        assert got[:same] == expected[:same]


def test_pages_are_back_after_the_first_decode_step(program: Program, tiny: str) -> None:
    """Read from the pool after every step: SnapKV at the prompt's end, then bounded methods."""
    prompt = [RNG.randrange(256) for _ in range(1950)]
    snapkv, *bounded = program(
        "pool_by_step", model=tiny, policy="fp16", prompt=prompt, max_tokens=200,
        methods=["snapkv(budget=256)", "h2o(heavy=128,recent=128,prefill=bounded)",
                 "streaming-llm(window=252,sinks=4)"],
    )  # fmt: skip
    in_use = dict(step for step in snapkv if len(step) == 2)
    assert in_use[1792] == 14
    assert in_use[1950] == 16 + 2
    assert in_use[1951] == 3
    for steps in bounded:
        used = [step[-1] for step in steps]
        assert max(used[:7]) == 2
        assert max(used) == 3  # 256 tokens, and up to 127 of the answer until the next cut


def test_prefix_caching_survives(program: Program, tiny: str) -> None:
    """The second and third request hit the prompt's pages, and say what the first one said."""
    methods = ["snapkv(budget=200)", "tova(budget=150)", "snapkv(budget=500)+quest(topk=1)",
               "r-kv(budget=150)", "lagkv(budget=300,merge=values)",
               "snapkv(budget=400,heads=adaptive)", "tova(budget=500)+quest(topk=1)"]  # fmt: skip
    got = program(
        "mixed", model=tiny, policy="fp16",
        prompts=[p for p in PROMPTS[: len(methods)] for _ in range(3)],
        methods=[m for m in methods for _ in range(3)], together=False,
        max_num_batched_tokens=128,
    )  # fmt: skip
    for i in range(0, 3 * len(methods), 3):
        assert got["cached"][i] == 0
        assert got["cached"][i + 1] == got["cached"][i + 2] >= 512
        assert got["tokens"][i] == got["tokens"][i + 1] == got["tokens"][i + 2]


def test_methods_that_must_see_every_query_do_not_hit(program: Program, tiny: str) -> None:
    methods = ["h2o", "all", "h2o", "knorm+infllm", "infllm", "streaming-llm", "tova+quest",
               "compactor", "r-kv(prefill=bounded)", "expected-attention(merge=values)",
               "h2o(heads=adaptive)"]  # fmt: skip
    got = program(
        "mixed", model=tiny, policy="fp16", prompts=[PROMPTS[0]] * len(methods), methods=methods,
        together=False,
    )  # fmt: skip
    assert got["cached"] == [0, 640, 0, 0, 0, 0, 640, 0, 0, 0, 0]


@pytest.mark.parametrize("policy", ["fp16", "kivi-2bit"])
def test_a_storm_of_policies_leaves_every_page_free(
    program: Program, tiny: str, policy: str
) -> None:
    page = {"fp16": PAGE, "kivi-2bit": 128 * 48 * 4}[policy]
    result = program(
        "storm", model=tiny, policy=policy, requests=300, seed=3, max_model_len=1024,
        kv_cache_memory_bytes=40 * page, methods=[m or "all" for m in METHODS],
    )  # fmt: skip
    assert result["finished"] + result["cancelled"] == 300
    assert result["cancelled"] > 30
    assert result["owned_twice"] == 0
    assert result["leaked"] == 0


def test_parallel_sampling_and_an_engine_wide_default(program: Program, tiny: str) -> None:
    result = program(
        "generate", model=tiny, policy="snapkv(budget=150)+int8", prompts=PROMPTS[:2],
        max_tokens=40, sampling={"n": 3, "temperature": 1.0},
    )  # fmt: skip
    for request in result["results"]:
        assert len({tuple(t) for t in request["tokens"]}) == 3
    assert result["free"] == result["total"]


def test_a_bad_policy_of_a_request_is_refused_and_no_other_is_disturbed(
    program: Program, tiny: str
) -> None:
    bad: dict[Any, str] = {
        "snappkv": "unknown cache policy 'snappkv'",
        "snapkv(budget=20)": "not above sinks + window",
        "snapkv+kivi-2bit": "cannot choose the codec",
        7: "non-empty string",
    }
    *results, last = program("rejected", model=tiny, policy="fp16", methods=list(bad))
    for result, named in zip(results, bad.values(), strict=True):
        assert named in result
    assert last == "length"


def test_a_policy_without_an_engine_policy_is_refused(program: Program, tiny: str) -> None:
    first, second = program("rejected", model=tiny, policy=None, methods=["snapkv"])
    assert "runs without a cache policy" in first
    assert second == "length"
