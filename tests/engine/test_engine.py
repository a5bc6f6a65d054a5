"""Unmodified vLLM with our plugin, on a tiny random model."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine
NEXT = pytest.mark.next  # on vLLM's next release too
RNG = random.Random(5)
PROMPTS = [[RNG.randrange(256) for _ in range(n)] for n in (3, 127, 128, 300, 700)]
# Logprobs of one token, computed in another order of summation, in float32.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def stock(program: Program, tiny: str) -> Any:
    return program("generate", model=tiny, policy=None, prompts=PROMPTS)


def _close(a: Any, b: Any) -> None:
    for one, other in zip(a, b, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["logprobs"][0] == pytest.approx(other["logprobs"][0], abs=TOLERANCE)


@NEXT
def test_without_a_policy_vllm_is_as_without_us(program: Program, tiny: str, stock: Any) -> None:
    assert stock["impl"] == "CPUAttentionBackendImpl"
    bare = program("generate", {"VLLM_PLUGINS": ""}, model=tiny, policy=None, prompts=PROMPTS)
    assert bare == stock


@pytest.fixture(scope="module")
def raw(program: Program, tiny: str) -> Any:
    return program("generate", model=tiny, policy="raw", prompts=PROMPTS)


@NEXT
def test_raw_gives_the_tokens_of_stock_vllm(stock: Any, raw: Any) -> None:
    assert raw["impl"] == "RingStoreImpl"
    _close(raw["results"], stock["results"])


def test_raw_does_not_depend_on_chunks_or_batch(program: Program, tiny: str, raw: Any) -> None:
    _close(program("alone", model=tiny, policy="raw", prompts=PROMPTS), raw["results"])
    other = program(
        "generate", model=tiny, policy="raw", prompts=PROMPTS, max_num_batched_tokens=2048
    )
    _close(other["results"], raw["results"])


@pytest.mark.parametrize(
    "policy",
    ["fp16", "int8", "flexgen-4bit", pytest.param("kivi-4bit", marks=NEXT), "kivi-2bit"],
)
def test_a_prefix_hit_equals_a_fresh_run(program: Program, tiny: str, policy: str) -> None:
    """Chunks end where hits end, so both runs attend to the same stored and fresh tokens.

    Where they do not, results differ as they do between two chunk sizes (docs/architecture.md).
    """
    first, again, salted = program(
        "twice", model=tiny, policy=policy, prompts=[PROMPTS[4]], max_num_batched_tokens=128
    )
    assert [r[0]["cached"] for r in (first, again, salted)] == [0, 640, 0]
    _close(first, salted)
    _close(first, again)


@NEXT
def test_requests_of_one_step_do_not_read_each_others_unwritten_pages(
    program: Program, tiny: str
) -> None:
    """Equal prompts that are admitted together: a page is a hit from the next step on only."""
    prompts = [PROMPTS[4], PROMPTS[4][:600], [*PROMPTS[4], 7, 8, 9], PROMPTS[4]]
    together = program(
        "generate", model=tiny, policy="raw", prompts=prompts, max_num_batched_tokens=2048
    )
    alone = program("alone", model=tiny, policy="raw", prompts=prompts, max_num_batched_tokens=2048)
    _close(together["results"], alone)
    assert together["results"][0]["cached"] == 0


@pytest.mark.parametrize("policy", ["raw", pytest.param("kivi-4bit", marks=NEXT)])
def test_a_pool_that_forces_preemption_loses_nothing(
    program: Program, tiny: str, raw: Any, policy: str
) -> None:
    page = {"raw": 128 * 512 * 4, "kivi-4bit": 128 * 80 * 4}[policy]  # two layers of two heads
    small = program(
        "generate", model=tiny, policy=policy, prompts=[*PROMPTS, *PROMPTS], max_tokens=200,
        kv_cache_memory_bytes=18 * page, max_model_len=1024,
    )  # fmt: skip
    assert small["preemptions"] > 0
    assert small["free"] == small["total"]
    assert all(len(r["tokens"][0]) == 200 for r in small["results"])
    if policy == "raw":
        for got, expected in zip(small["results"], raw["results"] * 2, strict=True):
            assert got["tokens"][0][:24] == expected["tokens"][0]


@pytest.mark.parametrize("policy", ["flexgen-4bit", "kivi-2bit"])
def test_cancelled_requests_leave_every_page_free(program: Program, tiny: str, policy: str) -> None:
    page = {"flexgen-4bit": 128 * 80 * 4, "kivi-2bit": 128 * 48 * 4}[policy]
    result = program(
        "storm", model=tiny, policy=policy, requests=200, seed=1, max_model_len=1024,
        kv_cache_memory_bytes=40 * page,
    )  # fmt: skip
    assert result["finished"] + result["cancelled"] == 200
    assert result["cancelled"] > 20
    assert result["owned_twice"] == 0
    assert result["leaked"] == 0


def test_parallel_sampling_and_logprobs(program: Program, tiny: str) -> None:
    result = program(
        "generate", model=tiny, policy="kivi-4bit", prompts=PROMPTS[2:4], max_tokens=150,
        sampling={"n": 3, "temperature": 1.0},
    )  # fmt: skip
    for request in result["results"]:
        assert len(request["tokens"]) == 3
        assert len({tuple(t) for t in request["tokens"]}) > 1
        assert all(len(p) == 150 and max(p) <= 0 for p in request["logprobs"])
    assert result["free"] == result["total"]


@pytest.mark.parametrize("policy", [None, pytest.param("raw", marks=NEXT)])
def test_a_seed_gives_the_same_answer_in_chunks_beside_others_and_after_a_preemption(
    program: Program, tiny: str, policy: str | None
) -> None:
    ask = {"model": tiny, "policy": policy, "prompts": [*PROMPTS[2:], PROMPTS[4]],
           "max_tokens": 150, "max_model_len": 1024,
           "sampling": {"n": 2, "temperature": 1.0, "seed": 7}}  # fmt: skip
    whole = program("generate", **ask, max_num_batched_tokens=4096)
    small = program("generate", **ask, kv_cache_memory_bytes=18 * 128 * 512 * 4)
    assert whole["preemptions"] == 0
    assert small["preemptions"] > 0
    for one, other in zip(whole["results"], small["results"], strict=True):
        assert one["tokens"][0] != one["tokens"][1]
        assert one["tokens"] == other["tokens"]
    assert whole["results"][2]["tokens"] == whole["results"][3]["tokens"]


def test_the_reference_kernel_can_be_forced(program: Program, tiny: str, raw: Any) -> None:
    forced = program(
        "generate", model=tiny, policy=None, prompts=PROMPTS,
        additional_config={"cache_policy": "raw", "cache_kernel": "reference"},
    )  # fmt: skip
    _close(forced["results"], raw["results"])


def test_edge_layers_have_pages_of_their_own(program: Program, tiny: str, raw: Any) -> None:
    """Of two layers, one in 8 bit and one in float32: close to raw, in 5/8 of its bytes."""
    memory = 300 * 2 * 128 * (512 + 132)  # pages of two KV heads: float32, and int8 with scales
    mixed = program(
        "generate", model=tiny, policy="int8+layers(first=1,last=0,codec=raw)", prompts=PROMPTS,
        kv_cache_memory_bytes=memory,
    )  # fmt: skip
    assert mixed["total"] == 300 - 1
    assert mixed["free"] == mixed["total"]
    for got, expected in zip(mixed["results"], raw["results"], strict=True):
        assert got["logprobs"][0][0] == pytest.approx(expected["logprobs"][0][0], abs=0.1)
    fresh, again, _ = program(
        "twice", model=tiny, policy="kivi-4bit+layers(first=0,last=1,codec=raw)",
        prompts=[PROMPTS[4]], max_num_batched_tokens=128,
    )  # fmt: skip
    assert again[0]["cached"] == 640
    _close(fresh, again)


def test_the_entry_point_activates_the_plugin() -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as B;"
        "print(B.CPU_ATTN.get_path())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "cache_policies.vllm_plugin.backend.RingStoreBackend"
