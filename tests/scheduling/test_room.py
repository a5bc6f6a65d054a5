"""What a request takes of a pool that layers of several kinds share, on vLLM's own managers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.sample.logits_processor import BatchUpdate

from cache_policies.vllm_plugin.rows import Rows
from cache_policies.vllm_plugin.spec import RingStoreSpec
from tests.scheduling.counting import LAYERS, LONGEST, PAGE, Engine

if TYPE_CHECKING:
    from pathlib import Path

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(block_size=PAGE, **SHAPE)
STATE = {"shapes": ((64,),), "dtypes": (torch.float32,)}
METHODS = [
    "all", "snapkv(budget=100)", "h2o(heavy=60,recent=60)", "streaming-llm(window=60)",
    "tova(budget=150,interval=16)", "lagkv(budget=300)", "nonsense",
]  # fmt: skip


def window(tokens: int, block: int = 32) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=block, sliding_window=tokens, **SHAPE)


def chunked(tokens: int) -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(block_size=PAGE, attention_chunk_size=tokens, **SHAPE)


def states(mode: str = "align") -> MambaSpec:
    block = PAGE if mode == "align" else LONGEST
    return MambaSpec(block_size=block, mamba_cache_mode=mode, **STATE)


windows = st.builds(
    window, st.sampled_from([20, 64, 100, 300, 513]), st.sampled_from([32, 64, 128])
)
BESIDE = st.one_of(
    st.lists(windows, max_size=2),
    st.builds(lambda tokens: [chunked(tokens)], st.sampled_from([128, 200, 256, 300])),
    st.builds(lambda found: [*found, states()], st.lists(windows, max_size=1)),
    st.just([states("none")]),
    st.just([window(100), FULL]),  # a second group under the policy
)


@dataclass
class Case:
    """An engine, but for its pages, and a request with its preemptions."""

    folder: Path
    policy: str
    beside: list[KVCacheSpec]
    asynchronous: bool
    chunk: int
    caching: bool
    method: str
    prompt: int
    answer: int
    stops: list[int] = field(default_factory=list)

    def engine(self, pages: int) -> Engine:
        """One whose requests can own so many pages."""
        ours = RingStoreSpec.of(FULL, self.policy, tuple(range(LAYERS)), edge=False)
        return Engine(
            self.folder, self.policy, pages + 1, asynchronous=self.asynchronous,
            beside=[ours if spec is FULL else spec for spec in self.beside],
            chunk=self.chunk,
            caching=self.caching and not any(s.block_size == LONGEST for s in self.beside),
        )  # fmt: skip

    def add(self, engine: Engine) -> Any:
        prompt = [(7 * i) % 251 for i in range(self.prompt)]
        engine.add("r", prompt, self.answer, self.method)
        return engine.scheduler.requests["r"]

    def count(self, pages: int) -> int:
        """Pages that the request is counted to take in a pool of so many."""
        engine = self.engine(10**4)
        room = engine.scheduler.room
        for manager in room.ours:
            row = (pages - room.beside(LONGEST)) // len(room.ours)
            manager.attach(engine.scheduler.requests, LONGEST, LAYERS, 1, row, room.step_tokens)
        return int(room.needed(self.add(engine), self.prompt + self.answer - 1))


@dataclass
class Seen:
    """Of a walk: the most pages held, the most that vLLM wanted free to let the request in."""

    held: int = 0
    wanted: int = 0


def walk(case: Case, engine: Engine) -> Seen:
    """Take a request to its end, over the chunks that take most pages once it was preempted."""
    seen, scheduler = Seen(), engine.scheduler
    coordinator, compute = scheduler.kv_cache_manager.coordinator, engine._compute
    ask = coordinator.get_num_blocks_to_allocate

    def asked(*args: Any, **kwargs: Any) -> int:
        pages = int(ask(*args, **kwargs))
        if kwargs.get("apply_admission_cap"):
            seen.wanted = max(seen.wanted, pages)
        return pages

    def computed(scheduled: Any) -> Any:
        free = engine.pool.get_num_free_blocks()
        seen.held = max(seen.held, engine.pool.num_gpu_blocks - 1 - free)
        return compute(scheduled)

    coordinator.get_num_blocks_to_allocate, engine._compute = asked, computed  # type: ignore[method-assign]
    request, stops = case.add(engine), sorted(case.stops)
    for _ in range(3 * LONGEST):
        if not scheduler.requests:
            return seen
        engine.step()
        if "r" in scheduler.requests and stops and request.num_output_tokens >= stops[0]:
            stops.pop(0)
            scheduler.reset_prefix_cache(reset_running_requests=True)
            # a step beside others first, so that the last one has as many tokens as it can
            scheduler.max_num_scheduled_tokens = request.num_tokens % case.chunk or case.chunk
            engine.step()
            scheduler.max_num_scheduled_tokens = case.chunk
    raise AssertionError("the request waits forever")


@settings(max_examples=60, deadline=None)
@given(
    beside=BESIDE,
    policy=st.sampled_from(
        ["fp16", "kivi-4bit", "streaming-llm(sinks=4,window=124,interval=64)+fp16"]
    ),
    method=st.sampled_from(METHODS),
    prompt=st.integers(1, 900),
    answer=st.integers(1, 700),
    chunk=st.sampled_from([128, 200, 256, 512, 1000]),
    stop=st.integers(0, 700),
    asynchronous=st.booleans(),
    caching=st.booleans(),
)
@example(  # let in again with an answer of more tokens than a step's behind the first cut
    beside=[],
    policy="fp16",
    method="snapkv(budget=100)",
    prompt=300,
    answer=600,
    chunk=128,
    stop=0,
    asynchronous=False,
    caching=True,
)
@example(  # a step that begins and ends within a block of chunks
    beside=[chunked(200)],
    method="all",
    prompt=647,
    answer=9,
    chunk=256,
    policy="fp16",
    stop=0,
    asynchronous=False,
    caching=True,
)
@example(  # let in again, a step goes on behind the first cut
    beside=[],
    method="snapkv(budget=100)",
    prompt=300,
    answer=200,
    chunk=512,
    policy="fp16",
    stop=0,
    asynchronous=False,
    caching=True,
)
@example(  # a state behind the step and the one before it
    beside=[states()],
    method="all",
    prompt=500,
    answer=9,
    chunk=256,
    policy="fp16",
    stop=0,
    asynchronous=False,
    caching=True,
)
def test_what_fits_is_served_and_what_does_not_is_refused(
    llama: Path,
    *,
    beside: list[KVCacheSpec],
    policy: str,
    method: str,
    prompt: int,
    answer: int,
    chunk: int,
    stop: int,
    asynchronous: bool,
    caching: bool,
) -> None:
    """In a pool of just the pages that are counted, and of one less; preempted on its way."""
    answer = min(answer, LONGEST - prompt)
    stops = [stop % answer, answer - 1] if answer > 1 else []
    case = Case(
        llama, policy, beside, asynchronous, chunk, caching, method, prompt, answer, stops
    )  # fmt: skip
    for pages in (10**3, case.count(0)):
        engine, count = case.engine(pages), case.count(pages)
        seen = walk(case, engine)
        assert not engine.errors
        assert engine.pool.get_num_free_blocks() == pages
        assert seen.held <= count
        assert seen.wanted <= count
        if not stops:
            continue
        others = sum(not isinstance(spec, SlidingWindowSpec) for spec in beside)
        # with fewer free pages vLLM would not let it in again; of states it asks for fewer
        assert seen.wanted >= count - 2 * others
        if not asynchronous and not others:
            assert seen.held >= count - 2 * len(beside) - 1
    engine = case.engine(case.count(0) - 1)
    case.add(engine)
    while engine.scheduler.requests:
        engine.step()
    assert engine.errors == {"r"}


def smallest(engine: Engine) -> int:
    """Pages with which vLLM starts an engine, but the one that is nobody's."""
    specs = [group.kv_cache_spec for group in engine.scheduler.kv_cache_config.kv_cache_groups]
    return sum(-(-s.max_memory_usage_bytes(engine.config) // s.page_size_bytes) for s in specs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "beside", [[window(100)], [window(300), window(300)], [chunked(256)], [states()]]
)
def test_the_smallest_pool_serves_the_longest_request(
    llama: Path, beside: list[KVCacheSpec], method: str
) -> None:
    for prompt in (1, 600, LONGEST - 1):
        case = Case(
            llama, "fp16", beside, False, 256, True, method, prompt, LONGEST - prompt,
            [LONGEST - prompt - 1] if prompt < LONGEST - 1 else [],
        )  # fmt: skip
        engine = case.engine(smallest(case.engine(10**3)))
        walk(case, engine)
        assert not engine.errors


def test_workers_know_what_a_row_may_take_beside_other_layers(llama: Path) -> None:
    """Prompt and kept tokens have room in the pool, but not beside the windows' pages."""
    case = Case(llama, "fp16", [window(300)], False, 256, True, "snapkv(budget=100)", 900, 9)
    engine = case.engine(smallest(case.engine(10**3)))
    request = case.add(engine)
    (new,) = engine.scheduler.schedule().scheduled_new_reqs
    rows = Rows(engine.config)
    rows.plan, rows.layers = engine.spec.plan, LAYERS
    added = [(0, new.sampling_params, new.prompt_token_ids, [])]
    rows.update(BatchUpdate(batch_size=1, removed=[], moved=[], added=added))
    state = rows.state(0)
    assert state is not None
    assert state.span == engine.manager.span(request)
    assert state.span.private
