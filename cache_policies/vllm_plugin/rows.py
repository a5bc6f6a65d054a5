"""Which request is in which row of a worker's batch, and what is known of it.

vLLM tells its logits processors which rows were added, moved and removed before every step,
with each request's parameters and prompt. A request that is not scheduled in a step, or is
preempted, leaves the batch and comes back later; it is recognized by its list of output
tokens, which vLLM keeps for as long as the request lives. Under asynchronous scheduling vLLM makes
that list anew once the request has an answer; then it is recognized by its parameters.
"""

from __future__ import annotations

import sys
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from cache_policies.step.request import Engine, RequestState, span_of
from cache_policies.vllm_plugin.config import PROMPT_KEY, ROOM_KEY, method_of, settings
from cache_policies.vllm_plugin.mailbox import mailbox_of, slot_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

    from cache_policies.pages.plan import Plan

# References to a list that only ``Rows.away`` holds: its tuple, the loop's variable and the
# argument of getrefcount.
_ONLY_OURS = 3


class Rows:
    """The rows of one worker.

    Args:
        vllm_config: of the engine.

    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        asked = settings(vllm_config)
        assert asked is not None
        self.default = asked.policy.method
        self.vllm_config = vllm_config
        self.cache, self.model = vllm_config.cache_config, vllm_config.model_config
        self.row: dict[int, tuple[list[int], RequestState | None, Any]] = {}
        self.away: dict[int, tuple[list[int], RequestState | None, Any]] = {}
        self.table: Any = None  # V2's, which the guard is given
        # set by the metadata builder, which knows the page size
        self.plan: Plan | None = None
        self.layers = 0

    def update(self, update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added, then moved rows."""
        if update is None:
            return
        for index in update.removed:
            self._leave(index)
        for index, params, prompt, output in update.added:
            self._leave(index)
            back = self._returning(params, output)
            self.row[index] = back or (output, None, (params, _prompt_tokens(params, prompt)))
        for first, second, direction in update.moved:
            one, other = self.row.pop(first, None), self.row.pop(second, None)
            if one is not None:
                self.row[second] = one
            if other is not None and direction.name == "SWAP":
                self.row[first] = other
        for key in list(self.away):
            output = self.away[key][0]
            if sys.getrefcount(output) <= _ONLY_OURS:
                del self.away[key]

    def take_slot(self, slot: int, params: Any, prompt: int) -> None:
        """A request takes a slot of the V2 runner's table, anew after a preemption."""
        self.row[slot] = [], None, (params, prompt)

    def state(self, index: int) -> RequestState | None:
        """State of the request in a row of the batch (V2: a slot); None for plain requests."""
        entry = self.row.get(index)
        if entry is None:  # a dummy batch: nothing was added
            return None
        output, state, (params, prompt) = entry
        if state is None:
            method = method_of(params, self.default)
            if method.is_plain:
                return None
            state = RequestState(method, span_of(method, self._engine(params), prompt))
            slot = slot_of(params)
            if method.prefill is not None and slot is not None:
                state.reading.report = partial(mailbox_of(self.vllm_config).write, slot)
            self.row[index] = output, state, (params, prompt)
        return state

    def _returning(
        self, params: Any, output: list[int]
    ) -> tuple[list[int], RequestState | None, Any] | None:
        """The entry of a request that was away; None for a new one, which has no answer yet."""
        key = id(output)
        if key not in self.away and output:
            same = [k for k, (_, _, (known, _)) in self.away.items() if known is params]
            key = same[0] if len(same) == 1 else key
        back = self.away.pop(key, None)
        return None if back is None else (output, *back[1:])

    def _engine(self, params: Any) -> Engine:
        assert self.plan is not None
        room = None
        if self.cache.enable_prefix_caching:  # what layers of other kinds hold the scheduler knows
            room = (params.extra_args or {}).get(ROOM_KEY, self.cache.num_gpu_blocks - 1)
        return Engine(self.plan, self.layers, self.model.max_model_len, room)

    def _leave(self, index: int) -> None:
        entry = self.row.pop(index, None)
        if entry is not None:
            self.away[id(entry[0])] = entry


def _prompt_tokens(params: Any, prompt: list[int] | None) -> int:
    if prompt is not None:
        return len(prompt)
    return int((params.extra_args or {}).get(PROMPT_KEY, 0))  # 0: of a dummy batch


_ROWS: dict[str, Rows] = {}
_LISTENING: set[type] = set()


def rows_of(vllm_config: VllmConfig) -> Rows:
    """The rows of this worker's engine; the logits processor fills them."""
    key = vllm_config.instance_id
    if key not in _ROWS:
        _ROWS[key] = Rows(vllm_config)
    return _ROWS[key]


def forget_removed() -> None:
    """Have V2 tell which slots of its table are freed, and drop what is known of their requests.

    Slots are taken again last in, first out, so without it a burst of long requests would leave
    what its methods counted behind. Can go when V2 tells logits processors of removed requests.
    """
    from vllm.v1.worker.gpu.states import RequestState as Table

    if Table in _LISTENING:
        return
    _LISTENING.add(Table)
    remove = Table.remove_request

    @wraps(remove)
    def removed(table: Any, req_id: str) -> Any:
        slot = remove(table, req_id)
        for rows in _ROWS.values():
            # what processors are given shares the table's columns
            if rows.table is not None and rows.table.prompt_len is table.prompt_len:
                rows.row.pop(slot, None)
        return slot

    Table.remove_request = removed
