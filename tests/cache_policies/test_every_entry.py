"""What holds for every method and codec of the registries: a new one is tested unnamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_policies.errors import PolicyError
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.pages.codecs import CODECS
from cache_policies.pages.codecs.base import HEAD_SIZES
from cache_policies.pages.layout import PageLayout
from cache_policies.parameters import parameters
from cache_policies.policy import method_classes, parse, parse_method
from cache_policies.retention import retention_methods
from cache_policies.retrieval import PREFILL, RETRIEVAL
from tests.cache_policies.worker import Text, Worker
from tests.kernels.harness import TOLERANCE, Setup

DOCUMENT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
PROMPT, ANSWER = 640, 200
TEXT = Text(PROMPT + ANSWER)
RETENTION = {name: f"{name}(ratio=0.25)" for name in retention_methods()}
READING = {
    **{name: f"{name}(topk=1,init=128,local=128)" for name in RETRIEVAL},
    **{name: f"{name}(topk=1,init=128,exact=0)" for name in PREFILL},
}
STAGES = [f"{name}(ratio=0.7)+quest(topk=1,init=128,local=128)" for name in retention_methods()]
UNEVEN = [
    f"{name}(ratio=0.5,heads=adaptive)" for name, cls in retention_methods().items()
    if cls.COMPARABLE
]  # fmt: skip
METHODS = [*RETENTION.values(), *READING.values(), *STAGES, *UNEVEN]


def _head_sizes(name: str) -> list[int]:
    """The head sizes a codec takes; those it does not are refused by name."""
    taken = []
    for size in HEAD_SIZES:
        try:
            PageLayout(CODECS[name].build(), size, 128, torch.float32)
        except PolicyError as error:
            assert name.split("-", maxsplit=1)[0] in str(error)  # noqa: PT017  # some sizes pass
        else:
            taken.append(size)
    return taken


@pytest.mark.parametrize("name", [*RETENTION, *READING, *CODECS])
def test_it_is_explained(name: str) -> None:
    entry = method_classes().get(name) or CODECS[name].cls
    assert entry.keeps
    assert entry.loses
    assert f"`{name}`" in DOCUMENT


def _negative() -> list[str]:
    """Every number of every method and codec, below zero; seeds have no sign."""
    settable = {name: cls.settable() for name, cls in method_classes().items()}
    settable |= {name: parameters(e.cls, dict(e.fixed)) for name, e in CODECS.items()}
    return [
        f"{name}({key}=-1)"
        for name, given in settable.items()
        for key, value in given.items()
        if key != "seed" and isinstance(value, (int, float))
    ]


@pytest.mark.parametrize("text", _negative())
def test_a_number_below_zero_is_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        parse(text)


@pytest.mark.parametrize("method", RETENTION.values())
def test_a_cut_leaves_what_the_plan_says(method: str) -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, method, PROMPT)
    retention = parse_method(method).retention
    assert retention is not None
    for chunk in (200, 440, *[1] * 40):
        worker.step([(sequence, chunk)])
        held = worker.positions(sequence)
        keep = retention.kept(PROMPT)
        assert held.shape[1] == sequence.span.held(sequence.computed, keep)
        for head in held:
            assert len(set(head.tolist())) == len(head), "a token is held twice"
            assert sequence.computed - 1 in head, "the newest token was dropped"
    assert held.shape[1] < PROMPT // 2


@pytest.mark.parametrize("name", RETENTION)
def test_keeping_everything_is_plain_attention(name: str) -> None:
    outputs = []
    for method in (f"{name}(ratio=1.0)", "all"):
        worker = Worker("raw")
        outputs.append(worker.run(worker.start(TEXT, method, PROMPT), [300, 340, 1, 1]))
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_kernel_gives_the_same(method: str) -> None:
    chunks = [256, 384, *[1] * 5]
    outputs = []
    for kernel in (CpuKernel, ReferenceKernel):
        worker = Worker("raw", kernel=kernel)
        outputs.append(worker.run(worker.start(TEXT, method, PROMPT), chunks))
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_starting_over_gives_the_same_and_every_page_comes_back(method: str) -> None:
    worker = Worker("fp16")
    free = len(worker.free)
    runs = []
    for _ in range(2):
        sequence = worker.start(TEXT, method, PROMPT)
        runs.append(worker.run(sequence, [300, 340, 1]))
        worker.release(sequence)
        assert len(worker.free) == free
    for got, expected in zip(*runs, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", CODECS)
def test_writing_and_reading_a_page(name: str) -> None:
    torch.manual_seed(0)
    assert _head_sizes(name)
    for size in _head_sizes(name):
        layout = PageLayout(CODECS[name].build(), size, 128, torch.float32)
        views = layout.views(torch.full((2, layout.head_bytes), 255, dtype=torch.uint8))
        key, value = torch.randn(2, 2, 128, size)
        layout.codec.write(views, 0, key, value)
        for written, read in zip((key, value), layout.codec.read(views, 128), strict=True):
            # 2 bits leave four levels of about a standard deviation each
            assert (written - read).norm() < 0.6 * written.norm()


@pytest.mark.parametrize("name", CODECS)
def test_the_cpu_kernel_agrees_with_the_reference(name: str) -> None:
    for size in _head_sizes(name):
        setup = Setup.make(name, head_size=size, seqs=2)
        computed, fresh = [300, 45], [1, 20]
        setup.fill(computed)
        batch, tokens = setup.batch(computed, fresh), setup.tokens(sum(fresh), 3)
        outputs = []
        for kernel in (CpuKernel, ReferenceKernel):
            out = torch.zeros_like(tokens[0])
            kernel(setup.layout, setup.shape).attend(setup.pages, batch, *tokens, out)
            outputs.append(out)
        limit = TOLERANCE[torch.float32]
        torch.testing.assert_close(*outputs, rtol=limit, atol=limit)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_and_codecs_combine(method: str, codec: str) -> None:
    policy = parse(f"{method}+{codec}")
    assert parse(str(policy)) == policy
