from __future__ import annotations

import time

import pytest

from cache_policies.step.clock import Clock


def test_laps_are_added_by_part_and_taken_once() -> None:
    clock = Clock()
    for _ in range(2):
        clock.start()
        time.sleep(0.02)
        clock.lap("attend")
        time.sleep(0.01)
        clock.lap("cut")
    taken = clock.take()
    assert taken["attend"] == pytest.approx(0.04, abs=0.02)
    assert 0.02 <= taken["cut"] < taken["attend"]
    assert taken["append"] == 0.0
    assert clock.take() == {"attend": 0.0, "append": 0.0, "cut": 0.0}


def test_a_step_begins_where_layers_start_over() -> None:
    clock = Clock()
    assert [clock.begins_step(layer) for layer in (0, 5, 11, 0, 5, 11)] == [
        False, False, False, True, False, False,
    ]  # fmt: skip
    assert clock.begins_step(11)  # a model of one layer of ours
