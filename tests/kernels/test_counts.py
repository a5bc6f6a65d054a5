"""Counts on the host, and their copies where the pages are."""

from __future__ import annotations

import pytest
import torch

from cache_policies.kernels.counts import Buffers, spans
from tests.kernels.harness import Setup


def test_on_a_cpu_the_counts_are_their_own_copies() -> None:
    batch = Setup.make("kivi-4bit").batch([300, 0], [1, 40])
    assert batch.device_counts == batch.counts
    batch.host.ring[1] = 7
    assert batch.ring.tolist() == [44, 7]


def test_elsewhere_they_are_copied_once_into_the_same_memory_every_step() -> None:
    setup, buffers = Setup.make("kivi-4bit"), Buffers(torch.device("meta"))
    setup.block_table = setup.block_table.to("meta")
    used = []
    for computed in ([300, 0], [301, 40]):
        buffers.begin_step()
        first, second = (setup.batch(computed, [1, 1], buffers) for _ in range(2))
        assert first.buffer is not second.buffer
        counts = first.device_counts
        assert counts is first.device_counts
        assert [len(column) for column in counts] == [3, 2, 2, 2, 2, 2]
        assert all(column._base is first.buffer for column in counts)
        used.append(first.buffer)
    assert used[0] is used[1]


def test_one_request_alone_takes_its_counts_along() -> None:
    setup = Setup.make("raw")
    setup.block_table = setup.block_table.to("meta")
    row = setup.batch([300, 5], [1, 40]).row(1)
    assert [column.tolist() for column in row.counts] == [[1, 41], [5], [0], [45], [40], [0]]
    assert [len(column) for column in row.device_counts] == [2, 1, 1, 1, 1, 1]
    assert {column.device.type for column in row.device_counts} == {"meta"}


@pytest.mark.parametrize("start", [None, [0, 5], [0, 6, 5], [1, 2, 5], [0, 2, 4], [0, 2, 4, 5]])
def test_starts_that_do_not_fit_are_refused(start: list[int] | None) -> None:
    counts = Setup.make("raw").batch([10, 10], [1, 1]).host
    given = None if start is None else torch.tensor(start, dtype=torch.int32)
    with pytest.raises(ValueError, match="start"):
        spans(counts, 5, given)
