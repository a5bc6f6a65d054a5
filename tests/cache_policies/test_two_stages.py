"""Retention, then retrieval over what stayed: tokens, pages and attention by definition."""

from __future__ import annotations

import pytest
import torch

from cache_policies.errors import PolicyError
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.policy import parse, parse_method
from cache_policies.retention import retention_methods
from cache_policies.step.request import published_tokens, readable_tokens
from cache_policies.vllm_plugin.metrics import method_name
from tests.cache_policies import oracles
from tests.cache_policies.worker import HEADS, KV_HEADS, PAGE, SCALE, Text, Worker

PROMPT, ANSWER = 1200, 300
TEXT = Text(PROMPT + ANSWER)
GROUP = HEADS // KV_HEADS
QUEST = "quest(topk=2,init=128,local=200)"


def _read_pages(keys: torch.Tensor, query: torch.Tensor, topk: int, local: int) -> list[int]:
    """Quest's pages of one KV head, channel by channel: ``keys`` are the kept ones, in order."""
    full = keys.shape[0] // PAGE
    middle = [p for p in range(1, full) if (p + 1) * PAGE <= keys.shape[0] - local]
    bound = {
        p: sum(
            float(torch.maximum(q * page.amin(0), q * page.amax(0)).sum())
            for q in query
            for page in [keys[p * PAGE : (p + 1) * PAGE]]
        )
        for p in middle
    }
    best = sorted(middle, key=bound.__getitem__)[-topk:]
    return [p for p in range(-(-keys.shape[0] // PAGE)) if p not in middle or p in best]


def _expected(text: Text, kept: torch.Tensor, now: int, **quest: int) -> torch.Tensor:
    """Attention of the token at ``now``: ``[heads, d]``; ``kept`` are positions by KV head."""
    output = torch.zeros(HEADS, text.value.shape[-1])
    for head in range(KV_HEADS):
        group = slice(head * GROUP, (head + 1) * GROUP)
        at = kept[head].long()
        pages = _read_pages(text.key[at, head], text.query[now, group], **quest)
        read = torch.cat([at[p * PAGE : (p + 1) * PAGE] for p in pages] + [torch.tensor([now])])
        weights = (text.query[now, group] @ text.key[read, head].T * SCALE).softmax(-1)
        output[group] = weights @ text.value[read, head]
    return output


@pytest.mark.parametrize("kernel", [None, ReferenceKernel])
@pytest.mark.parametrize("chunks", [[1200], [500, 700], [128, 1, 600, 471]])
@pytest.mark.parametrize("caching", [True, False])
def test_pages_are_chosen_among_the_kept_tokens(
    kernel: type[ReferenceKernel] | None, chunks: list[int], caching: bool
) -> None:
    """Kept set, bounds of its pages and attention from their definitions, token by token."""
    kept = oracles.snapkv(TEXT, PROMPT, keep=900).nonzero()[:, 1].reshape(KV_HEADS, 900)
    worker = Worker("raw", caching=caching, **({"kernel": kernel} if kernel else {}))  # type: ignore[arg-type]
    sequence = worker.start(TEXT, f"snapkv(budget=900)+{QUEST}", PROMPT)
    worker.run(sequence, chunks)
    assert torch.equal(worker.positions(sequence), kept.int())
    for _ in range(140):  # the answer fills a page, which then may be chosen
        now = sequence.computed
        held = torch.cat([kept, torch.arange(PROMPT, now).expand(KV_HEADS, -1)], 1)
        (output,) = worker.step([(sequence, 1)])
        expected = _expected(TEXT, held, now, topk=2, local=200)
        torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)


CUTTING = (
    "knorm(budget=900,interval=20)", "tova(budget=900,interval=20)",
    "h2o(heavy=500,recent=400,interval=20)", "keydiff(budget=900,interval=20)",
    "streaming-llm(sinks=4,window=896,interval=20)", "r-kv(budget=900,interval=20)",
    "knorm(budget=900,interval=20,prefill=bounded)",
)  # fmt: skip


@pytest.mark.parametrize("retention", CUTTING)
def test_summaries_follow_every_cut_of_the_answer(retention: str) -> None:
    """Held tokens stay in the order of the text, and the pages read are those of now."""
    worker = Worker("raw")
    sequence = worker.start(TEXT, f"{retention}+{QUEST}", PROMPT)
    worker.run(sequence, [700, 500])
    for _ in range(70):
        now, held = sequence.computed, worker.positions(sequence)
        assert (held.diff(dim=1) > 0).all(), "a page holds tokens out of order"
        (output,) = worker.step([(sequence, 1)])
        expected = _expected(TEXT, held, now, topk=2, local=200)
        torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)


LONG = [39, 1] * 18  # an answer of 720 tokens in few steps: it outgrows what the prompt counted
STAYING = [
    f"{name}(ratio=0.75{',interval=900' if cls.DECODE_CUTS else ''})"
    for name, cls in retention_methods().items()
]


def _goes_with_infllm(retention: str) -> bool:
    try:
        return parse_method(f"{retention}+infllm").retrieval is not None
    except PolicyError:
        return False


@pytest.mark.parametrize("retention", STAYING)
def test_quest_reads_pages_of_an_answer_longer_than_what_was_kept(retention: str) -> None:
    """They are summarized though no attention to them was counted."""
    text, worker = Text(PROMPT + sum(LONG)), Worker("raw")
    sequence = worker.start(text, f"{retention}+{QUEST}", PROMPT)
    worker.run(sequence, [700, 500])
    for fresh in LONG:
        now, held = sequence.computed, worker.positions(sequence)
        (output,) = worker.step([(sequence, fresh)])
        if fresh == 1:
            expected = _expected(text, held, now, topk=2, local=200)
            torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("retention", [r for r in STAYING if _goes_with_infllm(r)])
def test_infllm_reads_pages_of_an_answer_longer_than_what_was_kept(retention: str) -> None:
    text, outputs = Text(PROMPT + sum(LONG)), []
    for kernel in (CpuKernel, ReferenceKernel):
        worker = Worker("raw", kernel=kernel)
        sequence = worker.start(text, f"{retention}+infllm(topk=1,local=128)", PROMPT)
        outputs.append(worker.run(sequence, [700, 500, *LONG]))
        assert sequence.state is not None
        assert sequence.state.layers[0].summary is not None
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("codec", ["raw", "kivi-4bit", "int8"])
@pytest.mark.parametrize(
    "retention", [*(f"{name}(ratio=0.5)" for name in retention_methods()), "pyramidkv(budget=500)"]
)
def test_reading_every_page_is_the_first_stage_alone(retention: str, codec: str) -> None:
    """Where nothing is left to choose, all that stayed is read."""
    outputs = []
    for method in (f"{retention}+quest(topk=60)", retention):
        worker = Worker(codec, layer=(1, 4))
        outputs.append(worker.run(worker.start(TEXT, method, PROMPT), [700, 500, 1, 1, 1]))
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("retrieval", [QUEST, "infllm(topk=1,local=128)"])
@pytest.mark.parametrize("retention", ["streaming-llm(window=700)", "lagkv(budget=700)"])
def test_starting_over_in_a_batch_of_others_gives_the_same(retention: str, retrieval: str) -> None:
    method, chunks = f"{retention}+{retrieval}", [500, 700, *[1] * 140]
    worker = Worker("fp16")
    alone = worker.run(worker.start(TEXT, method, PROMPT), chunks)
    worker = Worker("fp16")
    others = ["snapkv(budget=300)", "quest(topk=1)", "all", f"tova(budget=800)+{QUEST}"]
    sequences = [worker.start(Text(1500, i), m, PROMPT) for i, m in enumerate(others, 1)]
    restarted = worker.start(TEXT, method, PROMPT)
    worker.run(restarted, [500, 700, 1, 1])
    worker.release(restarted)
    restarted.computed = 0
    for chunk, expected in zip(chunks, alone, strict=True):
        outputs = worker.step([(s, chunk) for s in [*sequences, restarted]])
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-3, atol=1e-4)


def test_infllm_finds_the_page_with_the_wanted_key_after_a_cut() -> None:
    text = Text(1500)
    wanted = 1000  # kept by the window, in a page between sinks and local window
    text.key[wanted] *= 4
    text.query[wanted - 10 :] = text.key[wanted].repeat_interleave(GROUP, 0) / 4
    worker = Worker("raw")
    method = "streaming-llm(window=700,prefill=full)+infllm(topk=1,local=128)"
    sequence = worker.start(text, method, 1400)
    worker.run(sequence, [700, 700])
    (output,) = worker.step([(sequence, 1)])
    for head in range(HEADS):
        value = text.value[wanted, head // GROUP]
        torch.testing.assert_close(output[0, head], value, rtol=0.05, atol=0.1)


def test_infllm_counts_attention_to_the_last_held_tokens_after_a_cut() -> None:
    """To all pages that hold one of the last 512 of those held, not of those computed."""
    worker = Worker("raw")
    sequence = worker.start(
        TEXT, "streaming-llm(window=700,prefill=full)+infllm(topk=60,local=128)", PROMPT
    )
    worker.run(sequence, [PROMPT, 1])
    assert sequence.state is not None
    held, now = worker.positions(sequence).long(), sequence.computed
    mass = sequence.state.layers[0].mass
    assert mass is not None
    before = mass.view(held.shape[1]).clone()
    worker.step([(sequence, 1)])
    counted = mass.view(held.shape[1]) - before
    first = (held.shape[1] - 512) // PAGE * PAGE
    assert not counted[:, :first].any()
    for head in range(KV_HEADS):
        at = torch.cat([held[head], torch.tensor([now])])
        query = TEXT.query[now, head * GROUP : (head + 1) * GROUP]
        weights = (query @ TEXT.key[at, head].T * SCALE).softmax(-1).sum(0)[:-1]
        torch.testing.assert_close(counted[head, first:], weights[first:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("snapkv+tova", "snapkv and tova cannot be combined; only one retention method"),
        ("quest+infllm", "quest and infllm cannot be combined; only one"),
        ("snapkv+quest+snapkv", "snapkv and snapkv cannot be combined"),
        ("snapkv+infllm", "snapkv and infllm cannot be combined: each counts attention"),
        ("h2o+infllm", "each counts attention of its own queries"),
        ("knorm+infllm(prefill=bounded)+sparse-prefill", "give it prefill=full"),
        ("keydiff+quest+sparse-prefill", "give it prefill=full"),
    ],
)
def test_what_cannot_be_together_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert named in str(caught.value)


def test_two_stages_print_and_parse() -> None:
    text = "snapkv(budget=4096)+quest(topk=8)+sparse-prefill(coverage=0.9)+kivi-4bit"
    assert str(parse(text)) == text
    assert parse("kivi-4bit+sparse-prefill(coverage=0.9)+quest(topk=8)+snapkv(budget=4096)") == (
        parse(text)
    )
    assert str(parse_method("quest+snapkv")) == "snapkv+quest"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("snapkv(budget=900)+quest(topk=3)", "snapkv+quest"),
        ("knorm+sparse-prefill(exact=0)", "knorm+sparse-prefill"),
        ("tova(budget=90)", "tova"),
        ("all", "all"),
    ],
)  # fmt: skip
def test_metrics_name_both_stages(text: str, label: str) -> None:
    assert method_name(parse_method(text)) == label


@pytest.mark.parametrize(
    ("text", "readable", "published"),
    [
        ("snapkv(budget=900)+quest", PROMPT - 32, PROMPT),
        ("knorm+infllm", 0, PROMPT),
        ("knorm+infllm(prefill=bounded)", 0, 0),
        ("streaming-llm+quest", 0, 0),
    ],
)
def test_the_prefix_cache_obeys_both_stages(text: str, readable: int, published: int) -> None:
    sequence = Worker("fp16").start(TEXT, text, PROMPT)
    assert sequence.state is not None
    method = sequence.state.method
    assert readable_tokens(method, sequence.span) == readable
    assert published_tokens(method, sequence.span) == published
