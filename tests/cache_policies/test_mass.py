"""Rooms of requests in a layer's mass buffer, against tensors of their own."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.step.mass import MassBuffer, Room

HEADS = 2


def _check(buffer: MassBuffer, rooms: list[tuple[Room, torch.Tensor]]) -> None:
    taken = sorted((room.start, room.start + room.size) for room, _ in rooms if room.size)
    places = sorted([*taken, *buffer._free])
    assert [end for _, end in places[:-1]] == [start for start, _ in places[1:]], "lost or shared"
    for room, expected in rooms:
        assert torch.equal(room.view(expected.shape[1]), expected)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rooms_keep_their_mass_and_no_others(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    buffer = MassBuffer(HEADS, torch.device("cpu"))
    rooms: list[tuple[Room, torch.Tensor]] = []
    for _ in range(40):
        action = rng.choice(("new", "grow", "add", "cut", "leave"))
        if action == "new" or not rooms:
            rooms.append((Room(buffer), torch.zeros(HEADS, 0)))
        i = rng.randrange(len(rooms))
        room, expected = rooms[i]
        tokens = expected.shape[1]
        if action == "grow":
            more = rng.choice((1, 100, 300, 2000))
            room.hold(tokens + more)
            expected = torch.cat([expected, torch.zeros(HEADS, more)], 1)
        elif action == "add":
            mass = torch.rand(HEADS, tokens, generator=generator)
            room.view(tokens).add_(mass)
            expected = expected + mass
        elif action == "cut" and tokens:
            source = torch.randint(tokens, (HEADS, rng.randrange(1, tokens + 1)))
            room.keep(source)
            expected = expected.gather(1, source)
        rooms[i] = room, expected
        if action == "leave":
            del rooms[i]
        del room
        _check(buffer, rooms)
    rooms.clear()
    assert not buffer._free
    assert not buffer.data.numel(), "memory of nobody is given back"
