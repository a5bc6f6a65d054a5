"""Requests that start over after a preemption, and bring tokens of their answer along."""

from __future__ import annotations

import pytest

from cache_policies.policy import parse_method
from cache_policies.retention import retention_methods
from cache_policies.step.request import Engine, readable_tokens, span_of
from tests.cache_policies.worker import Text, Worker

PROMPT, ANSWER = 500, 100
TEXT = Text(PROMPT + ANSWER)


@pytest.mark.parametrize(
    ("method", "window"),
    [
        ("snapkv(budget=100)", 32),
        ("pyramidkv(budget=100)", 32),
        ("compactor(budget=100)", 4),
        ("expected-attention(budget=100)", 1),
        ("lagkv(budget=300)", 128),
        ("snapkv(budget=100,heads=adaptive)", 32),
    ],
)
@pytest.mark.parametrize("chunks", [[500, 100], [600], [480, 120], [300, 299, 1]])
def test_the_prompts_window_stays_wherever_a_chunk_ends(
    method: str, window: int, chunks: list[int]
) -> None:
    worker = Worker()
    sequence = worker.start(TEXT, method, PROMPT)
    worker.run(sequence, chunks)
    for held in worker.positions(sequence):
        assert {*range(PROMPT - window, PROMPT + ANSWER)} <= {*held.tolist()}


def test_attention_is_not_counted_for_a_choice_that_will_not_be_made() -> None:
    worker = Worker()
    for method, counts in (("snapkv", False), ("snapkv(budget=100)", True), ("h2o", True)):
        sequence = worker.start(TEXT, method, 300)
        worker.run(sequence, [200, 99])
        worker.step([(sequence, 1)])
        worker.run(sequence, [1] * 5)
        state = sequence.state
        assert state is not None
        if method != "snapkv(budget=100)":  # whose count is given back with the cut
            assert (state.layers[0].mass is not None) is counts


@pytest.mark.parametrize("name", retention_methods())
def test_what_a_method_observes_is_computed(name: str) -> None:
    """A prompt from the prefix cache brings no queries."""
    forms = retention_methods()[name].PREFILL
    for text in (f"{name}(prefill={form})" for form in forms):
        method = parse_method(text)
        retention = method.retention
        assert retention is not None
        if retention.NEEDS_EVERY_QUERY or retention.bounded:
            continue
        prompt = 5000
        begin = prompt - retention.observed_queries
        alone = retention.first_query(begin, prompt, prompt, cuts=True)
        assert alone == retention.first_query(0, prompt, prompt, cuts=True)
        assert retention.recent_queries <= retention.observed_queries


def test_a_window_that_is_only_kept_may_come_from_the_prefix_cache() -> None:
    engine = Engine(Worker().plan, 1, 10_000, 10**6)
    for text, readable in (
        ("streaming-llm(sinks=4,window=8188,prefill=full)", 7899),
        ("keydiff(budget=8192,window=4096,prefill=full)", 7899),
        ("snapkv", 7868),
        ("r-kv", 7892),
    ):
        method = parse_method(text)
        assert readable_tokens(method, span_of(method, engine, 7900)) == readable
