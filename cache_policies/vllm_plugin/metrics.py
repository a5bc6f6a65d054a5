"""Prometheus metrics of compression, counted where the pages are: in the engine's processes.

They reach ``/metrics`` through prometheus_client's multiprocess mode, which ``kvthrift serve``
switches on (``PROMETHEUS_MULTIPROC_DIR``), whatever the number of API processes.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from cache_policies.vllm_plugin.facts import processed_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.request import Request

    from cache_policies.policy import Method
    from cache_policies.step.clock import Clock
    from cache_policies.vllm_plugin.facts import KVCacheFacts
    from cache_policies.vllm_plugin.manager import RingStoreManager


def method_name(method: Method) -> str:
    """A method without its parameters, of which there are too many for a label."""
    return "+".join(part.name for part in method.parts) or str(method)


class CacheMetrics:
    """The metrics; one object per process, since a registry takes each name once."""

    def __init__(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            # the process that wrote last; sums would count processes that are gone
            return Gauge(f"kvthrift_{name}", text, labels, multiprocess_mode="mostrecent")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvthrift_{name}", text, labels)

        self._seen: set[str] = set()
        self._engine = "0"
        self.capacity = gauge("kv_capacity_bytes", "KV cache pool, all layers.", "engine")
        self.used = gauge("kv_used_bytes", "Pages of the pool that requests own.", "engine")
        self.pages = gauge("kv_capacity_pages", "Pages of the pool.", "engine")
        self.used_pages = gauge("kv_used_pages", "Pages that requests own.", "engine")
        self.held = gauge(
            "kv_held_tokens", "Tokens that running requests hold.", "engine", "policy"
        )
        self.running = gauge("requests_running", "Running requests.", "engine", "policy")
        self.per_token = gauge("kv_token_bytes", "Store bytes of a token, all layers.")
        self.ratio = gauge(
            "kv_compression_ratio",
            "16-bit bytes of the running requests' computed tokens over the bytes they own; "
            "while none runs, the last value.",
            "engine",
        )
        self.policy = gauge("policy_info", "The engine's cache policy.", "policy", "codec")
        self.build = gauge("build_info", "Version of kvthrift.", "version")
        self.requests = counter("requests", "Finished requests.", "policy", "finish_reason")
        self.dropped = counter("tokens_dropped", "Tokens dropped from the cache.", "policy")
        self.given_back = counter("pages_given_back", "Pages given back before the end.")
        self.hits = counter("prefix_hit_tokens", "Prompt tokens from the prefix cache.", "codec")

    def start(self, manager: RingStoreManager, engine: int) -> None:
        """Set what does not change.

        Args:
            manager: of the pages.
            engine: which of the data-parallel engines this process is.

        """
        self._engine = str(engine)
        pages = manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null block
        self.pages.labels(self._engine).set(pages)
        self.capacity.labels(self._engine).set(pages * manager.page_bytes)
        self.per_token.set(manager.page_bytes / manager.plan.page_tokens)
        self.policy.labels(manager.policy, manager.codec).set(1)
        self.build.labels(version("kvthrift")).set(1)

    def step(self, manager: RingStoreManager, running: Iterable[Request]) -> None:
        """Set what changes with every step."""
        pool = manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        self.used_pages.labels(self._engine).set(used)
        if manager.given_back:
            self.given_back.inc(manager.given_back)
            manager.given_back = 0
        self.used.labels(self._engine).set(used * manager.page_bytes)
        held: dict[str, int] = {}
        count: dict[str, int] = {}
        computed = owned = 0
        for request in running:
            name = method_name(manager.method(request))
            count[name] = count.get(name, 0) + 1
            done = processed_tokens(request)
            held[name] = held.get(name, 0) + manager.span(request).held(done)
            computed += done
            owned += manager.owned_pages(request.request_id)
        # a label that was set once stays in the files of multiprocess mode
        self._seen |= held.keys()
        for name in self._seen:
            self.held.labels(self._engine, name).set(held.get(name, 0))
            self.running.labels(self._engine, name).set(count.get(name, 0))
        bytes_ = owned * manager.page_bytes
        if bytes_:  # of an idle engine the last value stays
            self.ratio.labels(self._engine).set(computed * manager.half_bytes_per_token / bytes_)

    def finished(self, manager: RingStoreManager, request: Request, facts: KVCacheFacts) -> None:
        """Count a request that ended."""
        name = method_name(manager.method(request))
        self.requests.labels(name, str(request.get_finished_reason())).inc()
        self.dropped.labels(name).inc(facts.dropped_tokens)
        self.hits.labels(manager.codec).inc(facts.cached_tokens)


@lru_cache(maxsize=1)
def _seconds() -> Counter:
    text = (
        "Seconds of the workers in attention over the cache (counting of scores included), in "
        "appending (absorbing included), and in choosing and moving what stays; on a GPU those in "
        "which the work is launched, not done."
    )
    return Counter("kvthrift_cache_seconds", text, ("part",))


def cache_seconds(clock: Clock) -> None:
    """Count what a worker has spent since the last call, a step ago."""
    for part, seconds in clock.take().items():
        _seconds().labels(part).inc(seconds)


@lru_cache(maxsize=1)
def cache_metrics() -> CacheMetrics:
    """The metrics of this process."""
    return CacheMetrics()
