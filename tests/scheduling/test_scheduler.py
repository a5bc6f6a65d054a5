"""vLLM's scheduler with our block manager, and a worker that only counts.

No model runs, so these tests also run on a vLLM of which only the Python files are there
(``make test-vllm-next``): block manager, scheduler, specs and entry points of the next release.
"""

from __future__ import annotations

import inspect
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    CompilationMode,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

from cache_policies.errors import PolicyError
from cache_policies.step.request import RequestState
from cache_policies.vllm_plugin.config import method_of, refuse_engine
from cache_policies.vllm_plugin.guard import PolicyGuard
from cache_policies.vllm_plugin.manager import RingStoreManager
from cache_policies.vllm_plugin.rows import Rows
from cache_policies.vllm_plugin.scheduler import PolicyAsyncScheduler, PolicyScheduler
from cache_policies.vllm_plugin.spec import RingStoreSpec

if TYPE_CHECKING:
    from pathlib import Path

PAGE, LAYERS, LONGEST = 128, 2, 1024
METHODS = [
    "all", "snapkv(budget=100)", "h2o(heavy=60,recent=60)", "streaming-llm(window=60)",
    "tova(budget=150,interval=16)", "lagkv(budget=300)", "infllm(topk=1,local=128)", "nonsense",
]  # fmt: skip


class Engine:
    """Scheduler and counting workers; steps in flight where scheduling is asynchronous."""

    def __init__(self, folder: Path, policy: str, pages: int, *, asynchronous: bool) -> None:
        model = ModelConfig(str(folder), tokenizer_mode="auto", skip_tokenizer_init=True,
                            dtype="float32", max_model_len=LONGEST)  # fmt: skip
        self.config = VllmConfig(
            model_config=model,
            additional_config={"cache_policy": policy},
            device_config=DeviceConfig("cpu"),
            cache_config=CacheConfig(block_size=PAGE, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=256, max_num_seqs=8, max_model_len=LONGEST,
                is_encoder_decoder=False, enable_chunked_prefill=True,
            ),
        )  # fmt: skip
        self.config.scheduler_config.async_scheduling = asynchronous
        stock = FullAttentionSpec(
            block_size=PAGE, num_kv_heads=2, head_size=64, dtype=torch.float32
        )
        self.spec = RingStoreSpec.of(stock, policy, tuple(range(LAYERS)), edge=False)
        names = [f"model.layers.{i}.attn" for i in range(LAYERS)]
        self.config.cache_config.num_gpu_blocks = pages
        page = self.spec.page_size_bytes
        tensor = KVCacheTensor(LAYERS * pages * page, names, pages * page, page)
        kv = KVCacheConfig(pages, [tensor], [KVCacheGroupSpec(names, self.spec)])
        self.spec.max_memory_usage_bytes(self.config)
        self.scheduler: Any = self.config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=PAGE,
            log_stats=True,
        )
        hashing = get_hash_fn_by_name("sha256")
        init_none_hash(hashing)
        self.hasher = get_request_block_hasher(PAGE, hashing)
        self.manager: RingStoreManager = self.scheduler.policy_managers[0]
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.depth = 2 if asynchronous else 1
        self.states: dict[str, RequestState] = {}
        self.errors: set[str] = set()

    @property
    def pool(self) -> Any:
        return self.manager.block_pool

    def add(self, name: str, prompt: list[int], max_tokens: int, method: str) -> None:
        parameters = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True,
            extra_args={"cache_policy": method} if method != "nonsense" else None,
        )  # fmt: skip
        self.scheduler.add_request(
            Request(name, prompt, parameters, None, block_hasher=self.hasher)
        )

    def step(self) -> None:
        """Schedule a step; the outcome of the oldest one comes back."""
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.in_flight.append((scheduled, self._compute(scheduled)))
        if self.in_flight and (
            len(self.in_flight) >= self.depth or not self.scheduler.has_requests()
        ):
            batches = self.scheduler.update_from_output(*self.in_flight.popleft())
            self.errors |= {
                o.request_id
                for batch in batches.values()
                for o in batch.outputs
                if str(o.finish_reason) == "error"
            }

    def _compute(self, scheduled: Any) -> ModelRunnerOutput:
        """What a worker does with a step: it follows the plan and fails where it is broken."""
        names = list(scheduled.num_scheduled_tokens)
        known = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        known.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        tokens = []
        for name in names:
            request, before = self.scheduler.requests[name], known[name]
            after = before + scheduled.num_scheduled_tokens[name]
            method, span = self.manager.method(request), self.manager.span(request)
            state = self.states.setdefault(name, RequestState(method, span))
            state.advance(before, after)
            row = self.manager.req_to_blocks[name]
            assert len(row) >= span.pages(after)
            store = span.store_row(before)
            used = [*range(self.manager.plan.ring_pages), *range(store, span.pages(after))]
            assert not any(row[i].is_null for i in used), "a page that is read was given back"
            # the token of a prompt that is not complete is thrown away
            tokens.append([before % 50] if after >= request.num_prompt_tokens else [])
        return ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration; there are no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


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
    monkeypatch.setitem(config.model_config.__dict__, "is_diffusion", True)
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
