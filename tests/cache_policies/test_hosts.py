"""Workers of several hosts: who is connected with whom, and what a lost one is noticed by."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from cache_policies.vllm_plugin import hosts
from cache_policies.vllm_plugin.hosts import first_lost, meet

HERE = "127.0.0.1"
Peers = dict[socket.socket, str]


class Group:
    """What rank 0 broadcasts; a stranger may be quicker than the other ranks."""

    def __init__(self, stranger: bytes | None = None) -> None:
        self.given: Future[Any] = Future()
        self.stranger = stranger

    def first(self, value: Any) -> None:
        if self.stranger is not None:
            with socket.create_connection(value[:2]) as connection:
                connection.sendall(self.stranger)
        self.given.set_result(value)

    def other(self, value: Any) -> Any:
        assert value is None
        return self.given.result(10)


def gather(world: int, local: int, group: Group) -> list[Peers]:
    """The connections of every rank."""
    with ThreadPoolExecutor(world) as pool:
        ranks = [
            pool.submit(meet, rank, world, local, HERE, group.other if rank else group.first)
            for rank in range(world)
        ]
        return [rank.result(20) for rank in ranks]


def close(peers: list[Peers]) -> None:
    for one in peers:
        for connection in one:
            connection.close()


@pytest.mark.parametrize("stranger", [None, b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 64])
def test_the_ranks_of_other_hosts_are_connected_with_the_first(stranger: bytes | None) -> None:
    first, second, *others = peers = gather(6, 2, Group(stranger))
    try:
        assert sorted(first.values()) == [f"rank {r} at {HERE}" for r in (2, 3, 4, 5)]
        assert second == {}  # of the first one's host, whose executor watches it
        assert [list(o.values()) for o in others] == [[f"rank 0 at {HERE}"]] * 4
    finally:
        close(peers)


@pytest.mark.parametrize("lost", [2, 4])
def test_a_lost_rank_is_named(lost: int) -> None:
    first, *_ = peers = gather(5, 1, Group())
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(first_lost, first)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            close([peers[lost]])
            assert waiting.result(10) == f"rank {lost} at {HERE}"
    finally:
        close(peers)


def test_all_others_notice_that_the_first_is_lost() -> None:
    first, *others = gather(3, 1, Group())
    close([first])
    try:
        assert [first_lost(other) for other in others] == [f"rank 0 at {HERE}"] * 2
    finally:
        close(others)


def test_a_rank_that_does_not_come_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "MEET_SECONDS", 0.2)
    with pytest.raises(TimeoutError):
        meet(0, 2, 1, HERE, lambda value: value)


def test_connections_are_probed_while_nothing_is_sent() -> None:
    peers = gather(2, 1, Group())
    try:
        for connection in (c for one in peers for c in one):
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert idle < 30
            assert connection.gettimeout() is None
    finally:
        close(peers)


class Queue(MessageQueue):  # type: ignore[misc]
    """Of a worker on another host, which does not answer."""

    def __init__(self) -> None:
        self._is_local_reader, self._is_remote_reader = False, True
        self.remote_socket = self

    def poll(self, timeout: int) -> bool:
        time.sleep(timeout / 1000)
        return False


@pytest.mark.parametrize(("waits", "ended"), [(True, [1]), (False, [])])
def test_an_engine_ends_that_waits_though_its_executor_has_failed(
    monkeypatch: pytest.MonkeyPatch, *, waits: bool, ended: list[int]
) -> None:
    found: list[int] = []
    monkeypatch.setattr(hosts, "PATIENCE", 0.2)
    monkeypatch.setattr(hosts.multiprocessing, "parent_process", lambda: "a server")
    monkeypatch.setattr(hosts.os, "_exit", found.append)
    monitor = threading.Thread(target=time.sleep, args=(0.3,), name="RayWorkerMonitor")
    monitor.start()
    parallel = SimpleNamespace(nnodes_within_dp=1, use_ray=True)
    hosts.watch_executor(SimpleNamespace(parallel_config=parallel))
    if waits:
        with pytest.raises(TimeoutError):
            Queue().dequeue(timeout=1.5)
    else:
        time.sleep(1.5)
    assert found == ended
