"""What an engine whose own method is bounded needs, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cache_policies.vllm_plugin import work
from tests.scheduling.counting import LONGEST, PAGE, Engine

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_bounded_engine_is_sized_for_its_own_method(llama: Path) -> None:
    """It needs three pages for any length; what asks for more than there is ends with an error."""
    policy = "streaming-llm(sinks=4,window=124,interval=64)+fp16"
    engine = Engine(llama, policy, 5, asynchronous=False)
    spec = engine.spec
    assert spec.max_memory_usage_bytes(engine.config) == (2 + 1) * spec.page_size_bytes
    engine.add("whole", [5] * 900, 100, "all")
    engine.add("long", [5] * 900, 100, "nonsense")  # the engine's own
    engine.add("answer", [5] * 30, 600, "all")
    engine.add("short", [5] * 400, 100, "all")
    finished, computed = 0, set()
    while engine.scheduler.requests and finished < 1200:
        engine.step()
        computed |= set(engine.states)
        finished += 1
    assert engine.errors == {"whole", "answer"}
    assert computed == {"long", "short"}, "what is refused is not computed"
    assert engine.reasons["whole"].startswith(
        "1000 tokens of prompt and answer under all need 8 pages of the cache, which has 4; ask for"
    )
    assert not engine.scheduler.requests
    assert engine.pool.get_num_free_blocks() == 5 - 1


def test_an_engine_whose_method_holds_the_prompt_is_sized_for_it(llama: Path) -> None:
    for policy in ("snapkv(budget=100)+fp16", "infllm(topk=1,local=128,prefill=bounded)+fp16"):
        spec = Engine(llama, policy, 20, asynchronous=False).spec
        assert spec.most_pages(LONGEST) == LONGEST // PAGE


def test_a_cut_for_which_all_others_would_wait_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama, "fp16", 100, asynchronous=False)
    each = engine.scheduler.policy_managers[0].key_numbers
    for name in ("MOST_ON_CPU", "MOST_ON_GPU"):  # vLLM 0.33 is tested without a platform
        monkeypatch.setattr(work, name, each * 600 * 600)
    engine.add("fits", [5] * 600, 9, "r-kv(budget=100)")
    engine.add("prompt", [5] * 601, 9, "r-kv(budget=100)")
    engine.add("chunks", [5] * 601, 9, "r-kv(budget=100,prefill=bounded)")
    engine.add("answer", [5] * 100, 800, "r-kv(budget=500,interval=128)")
    engine.add("merged", [5] * 900, 9, "snapkv(budget=500,merge=values)")
    engine.add("alone", [5] * 900, 9, "snapkv(budget=500)")
    for _ in range(1200):
        engine.step()
    assert engine.errors == {"prompt", "answer", "merged"}
    assert engine.reasons["prompt"].startswith(
        "r-kv(budget=100) compares 3.6e+05 pairs of keys of every head at once for 610 tokens"
    )
