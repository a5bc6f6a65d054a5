"""vLLM's scheduler, telling the block manager which policy a request chose.

A block manager is given request ids only. vLLM's option ``--scheduler-cls`` names another
scheduler; ``RingStoreSpec`` sets it, so that a policy is all a user has to ask for. Can go when
vLLM hands the request to its block managers.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from cache_policies.errors import PolicyError
from cache_policies.step.request import readable_tokens
from cache_policies.vllm_plugin.config import POLICY_KEY, PROMPT_KEY, ROOM_KEY, refuse_method
from cache_policies.vllm_plugin.facts import KV_CACHE, KVCacheFacts, facts_of
from cache_policies.vllm_plugin.hosts import watch_executor
from cache_policies.vllm_plugin.mailbox import (
    SLOT_KEY,
    mailbox_of,
    remove_mailbox,
    slot_of,
)
from cache_policies.vllm_plugin.metrics import cache_metrics
from cache_policies.vllm_plugin.room import Room
from cache_policies.vllm_plugin.versions import end_with_error, say_why
from cache_policies.vllm_plugin.work import refuse_work

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

logger = init_logger("vllm.kvthrift.scheduler")


class PolicyScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, telling the block manager what requests chose."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.room = Room.of(managers, self.vllm_config)
        self.policy_managers = self.room.ours
        self._hit_tokens: dict[str, int] = {}
        self._refused: dict[str, str] = {}  # since the last step's outputs, and why
        pool = self.kv_cache_config
        for manager in self.policy_managers:
            layers = len(pool.kv_cache_groups[manager.kv_cache_group_id].layer_names)
            # vLLM states the size of the whole allocation with each part of it
            page_bytes = pool.kv_cache_tensors[0].size // pool.num_blocks
            manager.attach(
                self.requests, self.max_model_len, layers, page_bytes,
                self.room.row(self.max_model_len), self.room.step_tokens,
            )  # fmt: skip
        # Workers count the pool's pages themselves, and know nothing of other groups of layers.
        told = self.policy_managers and len(managers) > 1 and self.kv_cache_manager.enable_caching
        self._told = {ROOM_KEY: self.room.row(self.max_model_len)} if told else {}
        self._metrics = cache_metrics()
        for manager in self.policy_managers[:1]:
            self._metrics.start(manager, self.vllm_config.parallel_config.data_parallel_index)
        watch_executor(self.vllm_config)

    def add_request(self, request: Request) -> None:
        # Samples of one prompt share theirs where the engine runs in the caller's process.
        params = request.sampling_params = copy(request.sampling_params)
        told = self._told
        if request.prompt_token_ids is None:
            # V1's workers learn a prompt's length from its tokens, which embeddings have none of.
            told = {**told, PROMPT_KEY: request.num_prompt_tokens}
        if told and params is not None:
            params.extra_args = {**(params.extra_args or {}), **told}
        try:
            self._refuse(request)
            self._give_slot(request)
        except PolicyError as error:
            self._end(request, str(error))
        super().add_request(request)

    def _end(self, request: Request, reason: str) -> None:
        """Let a request end with an error that only the engine can know of, not computed at all."""
        logger.warning("request %s is refused: %s", request.request_id, reason)
        known = request.sampling_params.extra_args or {}
        # at its end it is counted as one under the engine's method, which was given no slot
        extra = {k: v for k, v in known.items() if k not in {POLICY_KEY, SLOT_KEY}}
        request.sampling_params.extra_args = extra
        # Until then it waits, by what vLLM has for that, for a grammar that never comes.
        request.structured_output_request = None
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        self._refused[request.request_id] = reason
        end_with_error(self, request.request_id, reason)

    def _refuse(self, request: Request) -> None:
        if self.policy_managers and request.resumable:
            raise PolicyError("a cache policy cannot serve prompts that are streamed in pieces")
        for manager in self.policy_managers:
            refuse_method(manager.method(request), self.vllm_config)
        if self.policy_managers:
            self._refuse_size(request)

    def _refuse_size(self, request: Request) -> None:
        """Refuse what would wait forever, for the pool is sized for the engine's own method.

        And what would let all others wait.
        """
        longest = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        for manager in self.policy_managers[:1]:
            refuse_work(
                manager.method(request), request.num_prompt_tokens, longest,
                self.max_num_scheduled_tokens, manager.key_numbers,
            )  # fmt: skip
        # the last token of an answer is never computed
        needed = self.room.needed(request, max(request.num_prompt_tokens, longest - 1))
        if needed > self.room.pages:
            raise PolicyError(
                f"{longest} tokens of prompt and answer under "
                f"{self.policy_managers[0].method(request)} need {needed} pages of the cache, "
                f"which has {self.room.pages}; ask for fewer tokens (max_tokens), or leave out "
                f"{POLICY_KEY}: the cache is sized for the engine's own"
            )

    def _give_slot(self, request: Request) -> None:
        """Tell the workers where to note what a sparse prefill of this request reads."""
        params = request.sampling_params
        if params is None or not any(m.method(request).prefill for m in self.policy_managers):
            return
        slot = mailbox_of(self.vllm_config).take()
        extra = {k: v for k, v in (params.extra_args or {}).items() if k != SLOT_KEY}
        params.extra_args = extra if slot is None else {**extra, SLOT_KEY: slot}

    def _facts(self, request: Request, hit: int) -> KVCacheFacts:
        slot = self._slot(request)
        share = None if slot is None else mailbox_of(self.vllm_config).share(slot)
        return facts_of(self.policy_managers, request, hit, share)

    def _slot(self, request: Request) -> int | None:
        sparse = any(m.method(request).prefill for m in self.policy_managers)
        return slot_of(request.sampling_params) if sparse else None

    def _connector_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Send along what the request held, by the way that KV connectors have to responses.

        vLLM calls this when a request ends, before its pages are freed. Can go when a block
        manager may add to a request's output.
        """
        delay, params = super()._connector_finished(request)
        hit = self._hit_tokens.pop(request.request_id, 0)
        if self.policy_managers:
            facts = self._facts(request, hit)
            self._metrics.finished(self.policy_managers[0], request, facts)
            if (slot := self._slot(request)) is not None:
                mailbox_of(self.vllm_config).give_back(slot)
            params = {**(params or {}), KV_CACHE: facts.as_dict()}
        return delay, params

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """Send along what a request holds with each output that a stop string may end.

        vLLM matches stop strings in the API process; the engine then sees an abort, which has no
        output. Can go when a stop string ends a request in the engine.
        """
        refused, self._refused = self._refused, {}
        batches = super().update_from_output(*args, **kwargs)
        say_why(batches, refused)
        for batch in batches.values() if self.policy_managers else ():
            for output in batch.outputs:
                request = self.requests.get(output.request_id)
                if request and request.sampling_params and request.sampling_params.stop:
                    hit = self._hit_tokens.get(request.request_id, 0)
                    facts = self._facts(request, hit)
                    output.kv_transfer_params = {KV_CACHE: facts.as_dict()}
        return batches

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Bring the metrics up to date with the step that has ended."""
        for manager in self.policy_managers[:1]:
            self._metrics.step(manager, self.running)
        return super().make_stats(*args, **kwargs)

    def shutdown(self) -> None:
        super().shutdown()
        remove_mailbox(self.vllm_config)

    def _get_local_prefix_cache_hit(
        self, request: Request, *limits: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Take no more of the prefix cache than the request's method allows."""
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request, *limits)
        for manager in self.policy_managers:
            limit = readable_tokens(manager.method(request), manager.span(request))
            if limit is not None and hit > limit:
                # Sliding-window layers found only the pages before the end of the hit: of a
                # shorter one they would read pages that are not there.
                alone = len(self.kv_cache_manager.coordinator.single_type_managers) == 1
                hit = limit // self.block_size * self.block_size if alone else 0
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, hit)
        if request.num_preemptions == 0:  # later hits may be the request's own pages
            self._hit_tokens[request.request_id] = hit
        return blocks, hit, boundary, diverged


class PolicyAsyncScheduler(PolicyScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same where a step is scheduled before the tokens of the one before are known."""
