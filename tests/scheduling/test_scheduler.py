"""vLLM's scheduler with our block manager, and a worker that only counts.

No model runs, so these tests also run on a vLLM of which only the Python files are there
(``make test-vllm-next``): block manager, scheduler, specs and entry points of the next release.
"""

from __future__ import annotations

import inspect
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import (
    CompilationMode,
    VllmConfig,
)
from vllm.platforms import current_platform
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin.config import method_of, refuse_engine
from cache_policies.vllm_plugin.guard import PolicyGuard
from cache_policies.vllm_plugin.mailbox import SLOT_KEY, mailbox_of, remove_mailbox, slot_of
from cache_policies.vllm_plugin.manager import RingStoreManager
from cache_policies.vllm_plugin.rows import Rows
from cache_policies.vllm_plugin.scheduler import PolicyAsyncScheduler, PolicyScheduler
from tests.scheduling.counting import LAYERS, PAGE, Engine

if TYPE_CHECKING:
    from pathlib import Path

METHODS = [
    "all", "snapkv(budget=100)", "h2o(heavy=60,recent=60)", "streaming-llm(window=60)",
    "tova(budget=150,interval=16)", "lagkv(budget=300)", "infllm(topk=1,local=128)", "nonsense",
]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["fp16", "kivi-4bit"])
def test_a_storm_leaves_every_page_free(llama: Path, policy: str, *, asynchronous: bool) -> None:
    engine = Engine(llama, policy, 26, asynchronous=asynchronous)
    assert type(engine.scheduler) is (PolicyAsyncScheduler if asynchronous else PolicyScheduler)
    rng, free = random.Random(3), engine.pool.get_num_free_blocks()
    hits = preemptions = 0
    for number in range(120):
        prompt = [7] * rng.choice((3, 200)) + [
            rng.randrange(256) for _ in range(rng.randrange(500))
        ]
        engine.add(f"r{number}", prompt, rng.randrange(1, 300), rng.choice(METHODS))
        for _ in range(rng.randrange(12)):
            engine.step()
            alive = list(engine.scheduler.requests.values())
            preemptions += sum(r.num_preemptions for r in alive)
            hits += sum(engine.scheduler._hit_tokens.values())
            _no_page_is_private_twice(engine)
            _pages_owned_are_those_of_the_rows(engine)
        if rng.random() < 0.1 and engine.scheduler.requests:
            name = rng.choice(list(engine.scheduler.requests))
            engine.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
    for _ in range(5000):
        if not (engine.scheduler.has_requests() or engine.in_flight):
            break
        engine.step()
    assert not engine.scheduler.requests
    assert not engine.errors
    assert hits
    assert preemptions
    assert engine.pool.get_num_free_blocks() == free
    assert not engine.manager._lacking


def _pages_owned_are_those_of_the_rows(engine: Engine) -> None:
    for name, row in engine.manager.req_to_blocks.items():
        assert engine.manager.owned_pages(name) == sum(not block.is_null for block in row)


class Uncounted(list[Any]):
    """A row that nobody may go through."""

    def __iter__(self) -> Any:
        raise AssertionError("every page of the row was looked at")


def test_pages_owned_are_known_without_going_through_the_row(llama: Path) -> None:
    engine = Engine(llama, "fp16", 60, asynchronous=False)
    engine.add("r", [5] * 500, 8, "snapkv(budget=100)")
    for _ in range(5):
        engine.step()
    assert any(block.is_null for block in engine.manager.req_to_blocks["r"])
    _pages_owned_are_those_of_the_rows(engine)
    owned = engine.manager.owned_pages("r")
    engine.manager.req_to_blocks["r"] = Uncounted(engine.manager.req_to_blocks["r"])
    assert engine.manager.owned_pages("r") == owned


def _no_page_is_private_twice(engine: Engine) -> None:
    rows = engine.manager.req_to_blocks.values()
    own = [b.block_id for row in rows for b in row if b.block_hash is None and not b.is_null]
    assert len(own) == len(set(own))


def _watch_preemptions(scheduler: Any) -> list[tuple[str, int]]:
    """Filled as requests are preempted: which, and the tokens of its answer that are known."""
    preempt, seen = scheduler._preempt_request, []

    def noted(request: Request, *rest: Any, **more: Any) -> None:
        seen.append((request.request_id, request.num_output_tokens))
        preempt(request, *rest, **more)

    scheduler._preempt_request = noted
    return seen


def test_asynchronous_scheduling_preempts_at_other_tokens(llama: Path) -> None:
    """Why tokens after a preemption differ between the two: what is attended to in full differs."""
    methods = ["all", "snapkv(budget=100)", "tova(budget=90)", "lagkv(budget=270)"]
    answered = []
    for asynchronous in (False, True):
        engine = Engine(llama, "raw", 9, asynchronous=asynchronous)
        answered.append(_watch_preemptions(engine.scheduler))
        for number, method in enumerate(methods):
            prompt = [(7 * number + 13 * i) % 251 for i in range(280 + 9 * number)]
            engine.add(f"r{number}", prompt, 110, method)
        while engine.scheduler.has_requests() or engine.in_flight:
            engine.step()
    assert answered == [[("r3", 25)], [("r3", 22)]]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_pages_are_published_only_when_their_tokens_are_known(
    llama: Path, *, asynchronous: bool
) -> None:
    engine = Engine(llama, "fp16", 60, asynchronous=asynchronous)
    engine.add("r", [5] * 250, 200, "all")
    for _ in range(140):
        engine.step()
    request = engine.scheduler.requests["r"]
    published = engine.manager.num_cached_block["r"]
    assert published == request.num_tokens // PAGE - (request.num_tokens % PAGE == 0)
    assert published <= len(request.block_hashes)


def test_a_method_that_the_model_cannot_serve_ends_with_an_error(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(method: Any, _: Any) -> None:
        if not method.is_plain:
            raise PolicyError("no")

    monkeypatch.setattr("cache_policies.vllm_plugin.scheduler.refuse_method", refuse)
    engine = Engine(llama, "fp16", 60, asynchronous=False)
    engine.add("bad", [5] * 30, 4, "snapkv(budget=100)")
    engine.add("unknown", [5] * 30, 4, "snappkv")  # a server refuses this at admission
    engine.add("good", [5] * 30, 4, "all")
    for _ in range(8):
        engine.step()
    assert engine.errors == {"bad", "unknown"}
    assert not engine.scheduler.requests


SPARSE = "sparse-prefill(exact=0,topk=1)+fp16"


def test_a_slot_that_a_client_names_is_not_given_back(llama: Path) -> None:
    engine = Engine(llama, SPARSE, 60, asynchronous=False)
    box = mailbox_of(engine.config)
    free = sorted(box._free)
    for name, slot in (("taken", box._free[0]), ("none", "x")):
        extra = {"cache_policy": "snappkv", SLOT_KEY: slot}
        engine.scheduler.add_request(
            Request(name, [5] * 30, SamplingParams(max_tokens=4, extra_args=extra), None)
        )
    for _ in range(4):
        engine.step()
    assert engine.errors == {"taken", "none"}
    assert sorted(box._free) == free
    remove_mailbox(engine.config)


def test_samples_that_share_their_parameters_have_slots_of_their_own(llama: Path) -> None:
    """As vLLM gives them to an engine in the caller's process."""
    engine = Engine(llama, SPARSE, 60, asynchronous=False)
    box, shared = mailbox_of(engine.config), SamplingParams(max_tokens=2, ignore_eos=True)
    free = sorted(box._free)
    for name in ("one", "other"):
        engine.scheduler.add_request(Request(name, [5] * 30, shared, None))
    slots = {slot_of(request.sampling_params) for request in engine.scheduler.requests.values()}
    assert len(slots) == 2
    while engine.scheduler.has_requests() or engine.in_flight:
        engine.step()
    assert sorted(box._free) == free
    assert not shared.extra_args
    remove_mailbox(engine.config)


def test_a_prompt_streamed_in_pieces_ends_with_an_error(llama: Path) -> None:
    engine = Engine(llama, "fp16", 60, asynchronous=False)
    parameters = SamplingParams(max_tokens=4, temperature=0)
    engine.scheduler.add_request(
        Request("s", [5] * 30, parameters, None, block_hasher=engine.hasher, resumable=True)
    )
    for _ in range(4):
        engine.step()
    assert engine.errors == {"s"}
    assert not engine.scheduler.requests


def test_workers_are_told_how_long_a_prompt_of_embeddings_is(llama: Path) -> None:
    engine = Engine(llama, "fp16", 60, asynchronous=False)
    parameters = SamplingParams(extra_args={"cache_policy": "snapkv(budget=100)"})
    engine.scheduler.add_request(
        Request("e", None, parameters, None, prompt_embeds=torch.zeros(300, 256))
    )
    (new,) = engine.scheduler.schedule().scheduled_new_reqs
    rows = Rows(engine.config)
    rows.plan, rows.layers = engine.spec.plan, LAYERS
    rows.update(
        BatchUpdate(
            batch_size=1, removed=[], moved=[],
            added=[(0, new.sampling_params, new.prompt_token_ids, [])],
        )
    )  # fmt: skip
    state = rows.state(0)
    assert state is not None
    assert state.span == engine.manager.span(engine.scheduler.requests["e"])


def test_what_a_runner_cannot_do_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Engine(llama, "fp16", 60, asynchronous=False).config
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", False)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)
    monkeypatch.setattr(config.compilation_config, "mode", CompilationMode.NONE)
    refuse_engine(config)
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    with pytest.raises(PolicyError, match=r"on a CPU, .* drop --enforce-eager"):
        refuse_engine(config)
    monkeypatch.setattr(config.compilation_config, "mode", CompilationMode.DYNAMO_TRACE_ONCE)
    refuse_engine(config)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(PolicyError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        refuse_engine(config)
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 1)
    monkeypatch.setattr(config.parallel_config, "enable_dbo", True)
    with pytest.raises(PolicyError, match="drop --enable-dbo"):
        refuse_engine(config)
    monkeypatch.setattr(config.parallel_config, "enable_dbo", False)
    refuse_engine(config)
    monkeypatch.setattr(config.cache_config, "sliding_window", 4096)
    refuse_engine(config)  # on V2 the builder refuses it, which has seen the layers
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", False)
    refuse_engine(config)  # on a CPU too
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    with pytest.raises(PolicyError, match=r"sliding windows .* give --disable-sliding-window"):
        refuse_engine(config)
    monkeypatch.setattr(config.cache_config, "sliding_window", None)
    refuse_engine(config)
    monkeypatch.setattr(config.model_config, "dtype", torch.bfloat16)
    monkeypatch.setattr(config.cache_config, "cache_dtype", "bfloat16")
    refuse_engine(config)  # where a checkpoint asks for fp8, and its user for none of it
    for other in ("fp8", "float16"):
        monkeypatch.setattr(config.cache_config, "cache_dtype", other)
        with pytest.raises(PolicyError, match=f"--kv-cache-dtype {other}: .* drop it, or where"):
            refuse_engine(config)
    monkeypatch.setattr(config.cache_config, "cache_dtype", "auto")
    monkeypatch.setattr(config.model_config, "is_diffusion", True)
    with pytest.raises(PolicyError, match="diffusion models"):
        refuse_engine(config)


def test_our_overrides_take_what_vllm_gives() -> None:
    """A method of vLLM that changed its parameters would fail in the middle of a run."""
    for ours, theirs in (
        (RingStoreManager, FullAttentionManager),
        (PolicyScheduler, PolicyScheduler.__mro__[1]),
    ):
        for name, method in vars(ours).items():
            original = getattr(theirs, name, None)
            if not inspect.isfunction(method) or original is None or name == "__init__":
                continue
            expected = list(inspect.signature(original).parameters.values())[1:]
            given = {p.name: object() for p in expected if p.kind is p.KEYWORD_ONLY}
            positional = [object() for p in expected if p.kind is p.POSITIONAL_OR_KEYWORD]
            inspect.signature(method).bind(None, *positional, **given)


def test_the_guard_is_a_processor_of_both_runners() -> None:
    assert issubclass(PolicyGuard, LogitsProcessor)
    assert issubclass(PolicyGuard, SlotLogitsProcessor)
    assert not inspect.isabstract(PolicyGuard)


def test_a_request_without_a_method_takes_the_engines() -> None:
    assert method_of(SamplingParams(), None).is_plain
