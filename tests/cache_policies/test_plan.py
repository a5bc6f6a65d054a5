"""Both sides of the plan, simulated: a scheduler that owns pages, a worker that uses them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.pages.plan import Plan, Span
from cache_policies.policy import Method, parse_method
from cache_policies.step.request import Engine, published_tokens, readable_tokens, span_of

PAGE = 128
PLANS = st.sampled_from(
    [Plan(PAGE, 1, 0), Plan(PAGE, 128, 6), Plan(PAGE, 128, 4), Plan(PAGE, 64, 3), Plan(PAGE, 32, 1)]
)
METHODS = (
    "all", "snapkv(budget=200)", "snapkv(ratio=0.5)", "tova(budget=150,interval=40)",
    "pyramidkv(budget=220)", "streaming-llm(sinks=4,window=200,interval=1)", "infllm",
    "h2o(heavy=100,recent=60,prefill=bounded)", "h2o(heavy=300,recent=20,interval=300)",
    "keydiff(budget=180)", "streaming-llm(sinks=4,window=300,prefill=full,interval=64)",
    "infllm(prefill=bounded)", "quest",
)  # fmt: skip
LAYERS = 4


@dataclass
class Pool:
    """Free pages and published ones, with an owner count a page."""

    size: int
    free: list[int] = field(default_factory=list)
    owners: dict[int, int] = field(default_factory=dict)
    published: dict[tuple[str, int], int] = field(default_factory=dict)
    contents: dict[int, dict[int, tuple[str, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.size))

    def take(self) -> int:
        page = self.free.pop(0)
        for key in [k for k, p in self.published.items() if p == page]:
            del self.published[key]  # reused: no longer a hit
        self.owners[page] = 1
        self.contents[page] = {}  # poisoned: whoever reads what another wrote fails
        return page

    def touch(self, page: int) -> None:
        if page in self.free:
            self.free.remove(page)
            self.owners[page] = 0
        self.owners[page] += 1

    def release(self, pages: list[int | None]) -> None:
        for page in reversed(pages):
            if page is None:
                continue
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
    text: str
    prompt: int
    length: int
    method: Method
    span: Span
    computed: int = 0
    row: list[int | None] = field(default_factory=list)
    ring: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def restart(self) -> None:
        self.row, self.ring, self.held, self.computed = [], [], [], 0


class Worker:
    """Writes token numbers into page slots, and reads back what the plan says is there.

    The worker acts on a copy of the row to which pages are only ever added, as vLLM's do.
    """

    def __init__(self, plan: Plan, pool: Pool, rng: random.Random) -> None:
        self.plan, self.pool, self.rng = plan, pool, rng

    def step(self, request: Request, row: list[int], fresh: int) -> None:
        span, before = request.span, request.computed
        after = before + fresh
        assert len(request.held) == span.held(before)
        self._check(request, row, span.store_row(before))
        held = [*request.held, *range(before, after)]
        if not span.is_cut(before, after):
            self._write(request, row, held, span.store_row(before), len(request.held))
            return
        moves = span.moved(after) and not span.moved(before)
        if moves and not span.private:
            first = span.first_cut
            assert first is not None
            self._write(request, row, held[:first], span.plan.ring_pages, len(request.held))
        kept = sorted(self.rng.sample(range(len(held)), span.held(after)))
        self._write(request, row, [held[i] for i in kept], span.store_row(after), 0)

    def _write(
        self, request: Request, row: list[int], held: list[int], base: int, old: int
    ) -> None:
        stored = self.plan.stored(len(held))
        for i in range(self.plan.stored(old), stored):
            page = row[base + i // PAGE]
            assert self.pool.owners[page] == 1 or old == 0, "a shared page is written"
            self.pool.contents[page][i % PAGE] = request.text, held[i]
        request.held, request.ring = held, held[stored:]
        assert len(request.ring) < self.plan.quantum

    def _check(self, request: Request, row: list[int], base: int) -> None:
        stored = self.plan.stored(len(request.held))
        for i, token in enumerate(request.held[:stored]):
            assert self.pool.contents[row[base + i // PAGE]][i % PAGE] == (request.text, token)
        assert request.ring == request.held[stored:]


@settings(max_examples=120, deadline=None)
@given(plan=PLANS, seed=st.integers(0, 10**6), caching=st.booleans())
def test_manager_and_worker_agree_over_chunks_preemption_and_hits(
    plan: Plan, seed: int, caching: bool
) -> None:
    rng = random.Random(seed)
    pool = Pool(40)
    worker = Worker(plan, pool, rng)
    running: list[Request] = []
    waiting = [_request(plan, pool, rng, caching) for _ in range(12)]
    assert all(r.span.pages(r.length) <= pool.size for r in waiting)
    rows: dict[int, list[int]] = {}
    for _ in range(4000):
        if not waiting and not running:
            break
        if waiting and len(running) < 4 and _admit(pool, waiting[0], caching):
            running.append(waiting.pop(0))
            rows[id(running[-1])] = [p for p in running[-1].row if p is not None]
        for request in list(running):
            if request not in running:
                continue
            fresh = min(rng.choice((1, 1, 17, 128, 200)), request.length - request.computed)
            _give_back(pool, request)
            while len(pool.free) < request.span.pages(request.computed + fresh) - len(request.row):
                victim = running.pop()  # preempt the youngest, as vLLM does
                pool.release(victim.row)
                victim.restart()
                waiting.insert(0, victim)
                if victim is request:
                    break
            if request not in running:
                break
            _step(pool, worker, request, rows[id(request)], fresh, caching)
            if request.computed == request.length:
                pool.release(request.row)
                running.remove(request)
            pool.check()
    assert not waiting, "every request finishes"
    assert not running
    assert len(pool.free) == pool.size


def _request(plan: Plan, pool: Pool, rng: random.Random, caching: bool) -> Request:
    method = parse_method(rng.choice(METHODS))
    prompt = rng.choice((5, 127, 128, 129, 300, 640, 900))
    engine = Engine(plan, LAYERS, 1300, pool.size if caching else None)
    span = span_of(method, engine, prompt)
    return Request(rng.choice("ab"), prompt, prompt + rng.choice((1, 40, 400)), method, span)


def _admit(pool: Pool, request: Request, caching: bool) -> bool:
    hits: list[int] = []
    limit = (request.prompt - 1) // PAGE if caching else 0
    readable = readable_tokens(request.method, request.span)
    limit = limit if readable is None else min(limit, readable // PAGE)
    while len(hits) < limit and (request.text, len(hits)) in pool.published:
        hits.append(pool.published[request.text, len(hits)])
    taken = sum(page in pool.free for page in hits)
    span = request.span
    if span.pages(request.prompt) - len(hits) + taken > len(pool.free):
        return False
    for page in hits:
        pool.touch(page)
    request.row = [*(pool.take() for _ in range(span.plan.ring_pages)), *hits]
    request.computed = len(hits) * PAGE
    request.held = list(range(request.computed))
    assert span.plan.in_ring(request.computed) == 0, "a hit ends on a page: the ring is empty"
    return True


def _give_back(pool: Pool, request: Request) -> None:
    for index in request.span.given_back(request.computed):
        pool.release([request.row[index]])
        request.row[index] = None


def _step(
    pool: Pool, worker: Worker, request: Request, row: list[int], fresh: int, caching: bool
) -> None:
    after = request.computed + fresh
    while len(request.row) < request.span.pages(after):
        page = pool.take()
        request.row.append(page)
        row.append(page)
    worker.step(request, row, fresh)
    limit = published_tokens(request.method, request.span) if caching else 0
    full = request.span.plan.full_pages(after if limit is None else min(after, limit))
    for index in range(full):
        owner = request.row[request.span.plan.ring_pages + index]
        if owner is not None:
            pool.published.setdefault((request.text, index), owner)
    request.computed = after


@given(plan=PLANS, computed=st.integers(0, 5000), fresh=st.integers(0, 600))
def test_counts_grow_and_add_up(plan: Plan, computed: int, fresh: int) -> None:
    assert plan.stored(computed) + plan.in_ring(computed) == computed
    assert 0 <= plan.in_ring(computed) < plan.quantum
    assert plan.pages(computed) <= plan.pages(computed + fresh)
    assert plan.full_pages(computed) <= plan.store_pages(computed)


@given(
    plan=PLANS,
    method=st.sampled_from(METHODS),
    prompt=st.integers(1, 3000),
    computed=st.integers(0, 5000),
    room=st.sampled_from([None, 30, 10**6]),
)
def test_rows_only_grow_and_hold_what_is_held(
    plan: Plan, method: str, prompt: int, computed: int, room: int | None
) -> None:
    span = span_of(parse_method(method), Engine(plan, LAYERS, 8000, room), prompt)
    assert span.pages(computed) <= span.pages(computed + 1)
    end = span.store_row(computed) + plan.store_pages(span.held(computed))
    assert end <= span.pages(computed)
    if span.private:
        assert span.pages(computed) <= plan.pages(computed) + 1


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("streaming-llm(sinks=4,window=508,interval=1)", 512),
        ("h2o(heavy=256,recent=256,prefill=bounded)", 512 + 127),
        ("keydiff(budget=512,interval=64)", 512 + 63),
    ],
)
def test_bounded_methods_hold_the_budget_through_prefill_and_decode(method: str, most: int) -> None:
    engine = Engine(Plan(PAGE, 1, 0), LAYERS, 10**4, 10**6)
    span = span_of(parse_method(method), engine, 7000)
    assert max(span.held(c) for c in range(9000)) == most
    assert max(span.held(c) for c in range(7001)) == 512
    assert span.pages(9000) == -(-most // PAGE)


def test_a_prompt_of_8k_under_a_budget_gives_its_pages_back() -> None:
    engine = Engine(Plan(PAGE, 1, 0), LAYERS, 10**4, 10**6)
    span = span_of(parse_method("snapkv(budget=1024)"), engine, 8192)
    assert span.pages(8191) == 64
    assert len(span.given_back(8191)) == 0
    assert len(span.given_back(8192)) == 64
    assert span.pages(8192) - len(span.given_back(8192)) == 8
    assert span.pages(8192) == 72
