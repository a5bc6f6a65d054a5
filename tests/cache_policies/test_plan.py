"""Both sides of the plan, simulated: a scheduler that owns pages, a worker that uses them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.plan import Plan

PAGE = 128
PLANS = st.sampled_from(
    [Plan(PAGE, 1, 0), Plan(PAGE, 128, 6), Plan(PAGE, 128, 4), Plan(PAGE, 64, 3), Plan(PAGE, 32, 1)]
)


@dataclass
class Pool:
    """Free pages and published ones, with an owner count a page."""

    size: int
    free: list[int] = field(default_factory=list)
    owners: dict[int, int] = field(default_factory=dict)
    published: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.size))

    def take(self) -> int:
        page = self.free.pop(0)
        for key in [k for k, p in self.published.items() if p == page]:
            del self.published[key]  # reused: no longer a hit
        self.owners[page] = 1
        return page

    def touch(self, page: int) -> None:
        if page in self.free:
            self.free.remove(page)
            self.owners[page] = 0
        self.owners[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.owners[page] -= 1
            if self.owners[page] == 0:
                del self.owners[page]
                self.free.append(page)

    def check(self) -> None:
        assert len(self.free) == len(set(self.free))
        assert len(self.free) + len(self.owners) == self.size
        assert not set(self.free) & set(self.owners)


@dataclass
class Request:
    prompt: str
    length: int
    computed: int = 0
    row: list[int] = field(default_factory=list)


class Worker:
    """Writes token positions into page slots, and reads back what the plan says is there."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.store: dict[tuple[int, int], tuple[str, int]] = {}
        self.rings: dict[int, list[int]] = {}

    def step(self, request: Request, fresh: int, ring_id: int) -> None:
        plan, before = self.plan, request.computed
        for token in range(plan.stored(before)):
            index, slot = plan.store_slot(token)
            assert self.store[request.row[index], slot] == (request.prompt, token)
        ring = self.rings.get(ring_id, []) if before else []
        pending = [*ring[: plan.in_ring(before)], *range(before, before + fresh)]
        assert pending == list(range(plan.stored(before), before + fresh))
        absorbed = plan.stored(before + fresh) - plan.stored(before)
        for token in pending[:absorbed]:
            index, slot = plan.store_slot(token)
            self.store[request.row[index], slot] = (request.prompt, token)
        self.rings[ring_id] = pending[absorbed:]
        assert len(self.rings[ring_id]) < plan.quantum


@settings(max_examples=60, deadline=None)
@given(plan=PLANS, seed=st.integers(0, 10**6))
def test_manager_and_worker_agree_over_chunks_preemption_and_hits(plan: Plan, seed: int) -> None:
    rng = random.Random(seed)
    pool = Pool(40)
    worker = Worker(plan)
    running: list[Request] = []
    waiting = [
        Request(rng.choice("ab"), rng.choice((5, 127, 128, 129, 300, 640, 900))) for _ in range(12)
    ]
    waiting = [r for r in waiting if plan.pages(r.length) <= pool.size]
    for _ in range(3000):
        if not waiting and not running:
            break
        if waiting and len(running) < 4 and _admit(plan, pool, waiting[0]):
            running.append(waiting.pop(0))
        for request in list(running):
            fresh = min(rng.choice((1, 1, 17, 128, 200)), request.length - request.computed)
            while len(pool.free) < plan.pages(request.computed + fresh) - len(request.row):
                victim = running[-1]  # preempt the youngest, as vLLM does
                pool.release(victim.row)
                victim.row, victim.computed = [], 0
                waiting.insert(0, running.pop())
                if victim is request:
                    break
            if request not in running:
                break
            _step(plan, pool, worker, request, fresh)
            if request.computed == request.length:
                pool.release(request.row)
                running.remove(request)
            pool.check()
    assert not waiting, "every request finishes"
    assert not running
    assert len(pool.free) == pool.size


def _admit(plan: Plan, pool: Pool, request: Request) -> bool:
    hits: list[int] = []
    limit = (request.length - 1) // PAGE
    while len(hits) < limit and (request.prompt, len(hits)) in pool.published:
        hits.append(pool.published[request.prompt, len(hits)])
    taken = sum(page in pool.free for page in hits)
    if plan.pages(request.length) - len(hits) + taken > len(pool.free):
        return False
    for page in hits:
        pool.touch(page)
    request.row = [pool.take() for _ in range(plan.ring_pages)] + hits
    request.computed = len(hits) * PAGE
    assert plan.in_ring(request.computed) == 0, "a hit ends on a page, hence with an empty ring"
    return True


def _step(plan: Plan, pool: Pool, worker: Worker, request: Request, fresh: int) -> None:
    after = request.computed + fresh
    while len(request.row) < plan.pages(after):
        request.row.append(pool.take())
    worker.step(request, fresh, id(request))
    for index in range(plan.full_pages(after)):
        key = request.prompt, index
        pool.published.setdefault(key, request.row[plan.ring_pages + index])
    request.computed = after


@given(plan=PLANS, computed=st.integers(0, 5000), fresh=st.integers(0, 600))
def test_counts_grow_and_add_up(plan: Plan, computed: int, fresh: int) -> None:
    assert plan.stored(computed) + plan.in_ring(computed) == computed
    assert 0 <= plan.in_ring(computed) < plan.quantum
    assert plan.pages(computed) <= plan.pages(computed + fresh)
    assert plan.full_pages(computed) <= plan.store_pages(computed)
