"""Ends an engine that has lost a host, so that nobody waits for an answer from there.

Under tensor parallelism a lost host breaks the next sum over the ranks, and the error reaches the
engine. Under pipeline parallelism the engine waits for the last stage, which is gone, until
``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`` (300) have passed: vLLM's Ray executor notices and cannot
wake it; the multiprocessing executor watches the processes of its own host only, and so without a
request never notices either.

Between hosts of the latter, every worker holds a connection to rank 0, and ends when that does. The
kernel closes those of a process that ends, and probes hosts that send nothing: a worker that only
computes for long is never taken for lost. The engine ends when its executor has failed and it waits
nevertheless. Can go when vLLM's executors watch the workers of all hosts, and wake the engine.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.logger import init_logger
from vllm.utils.network_utils import get_ip

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

logger = init_logger("vllm.kvthrift.hosts")
MEET_SECONDS = 60.0
IDLE, INTERVAL, PROBES = 10, 5, 3  # of a silent host, in seconds: lost after 25
RANK_BYTES = 4
MONITORS = ("MultiprocWorkerMonitor", "RayWorkerMonitor")  # threads of vLLM's executors
PATIENCE = 5.0  # seconds in which the engine may end by itself, with the error it has


def watch_hosts(vllm_config: VllmConfig) -> None:
    """Watch the workers of an engine's other hosts; called by all of its workers at once.

    Raises:
        OSError: they cannot reach each other.

    """
    parallel = vllm_config.parallel_config
    if parallel.nnodes_within_dp == 1:
        return
    from vllm.distributed.parallel_state import get_inner_dp_world_group

    group = get_inner_dp_world_group()
    ranks = group.rank_in_group, group.world_size, parallel.local_world_size
    peers = meet(*ranks, get_ip(), group.broadcast_object)
    threading.Thread(target=_end_with, args=(peers,), name="kvthrift-hosts", daemon=True).start()


def meet(
    rank: int, world: int, local: int, address: str, broadcast: Callable[[Any], Any]
) -> dict[socket.socket, str]:
    """Connect the ranks of other hosts with rank 0.

    Args:
        rank: of this process.
        world: how many ranks there are.
        local: how many are on each host, the first ones on that of rank 0.
        address: of this host.
        broadcast: gives every rank what rank 0 passes to it.

    Returns:
        connections to those that this rank watches, and what they are called.

    Raises:
        OSError: a rank did not come in time, or rank 0 cannot be reached.

    """
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=world) as server:
            token = secrets.token_bytes(16)
            broadcast((*server.getsockname()[:2], token))
            return _accept(server, token, world - local)
    host, port, token = broadcast(None)
    if rank < local:
        return {}
    connection = socket.create_connection((host, port), MEET_SECONDS)
    connection.sendall(token + rank.to_bytes(RANK_BYTES))
    return {_probed(connection): f"rank 0 at {host}"}


def _accept(server: socket.socket, token: bytes, count: int) -> dict[socket.socket, str]:
    """Connections of so many ranks; whoever else comes is sent away."""
    peers: dict[socket.socket, str] = {}
    server.settimeout(MEET_SECONDS)
    while len(peers) < count:
        connection, (host, *_) = server.accept()
        connection.settimeout(MEET_SECONDS)
        try:
            said = connection.recv(len(token) + RANK_BYTES, socket.MSG_WAITALL)
        except OSError:  # says nothing, or has left: not one of the ranks
            said = b""
        if not secrets.compare_digest(said[: len(token)], token):
            connection.close()
            continue
        peers[_probed(connection)] = f"rank {int.from_bytes(said[len(token) :])} at {host}"
    return peers


def _probed(connection: socket.socket) -> socket.socket:
    """A connection that the kernel closes when the other host is silent, and no sooner."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    return connection


def first_lost(peers: dict[socket.socket, str]) -> str:
    """Wait until a connection ends, whose name this is: nobody sends anything."""
    with selectors.DefaultSelector() as selector:
        for connection in peers:
            selector.register(connection, selectors.EVENT_READ)
        ((key, _), *_) = selector.select()
    assert isinstance(key.fileobj, socket.socket)
    return peers[key.fileobj]


def _end_with(peers: dict[socket.socket, str]) -> None:
    """End this process with the first of them.

    The main thread may be in a call that never returns, where no signal reaches it.
    """
    if not peers:
        return
    logger.error("%s is gone: this worker ends, for its engine cannot go on", first_lost(peers))
    os._exit(1)


def watch_executor(vllm_config: VllmConfig) -> None:
    """End this process, the engine's, when its executor has failed and it waits nevertheless.

    The executor notices, but cannot wake an engine that waits for an answer over the network. A
    script that has the engine in its own process is left to vLLM's limit of a step.
    """
    parallel = vllm_config.parallel_config
    if multiprocessing.parent_process() is None:
        return
    if parallel.nnodes_within_dp > 1 or parallel.use_ray:
        for thread in threading.enumerate():
            if thread.name in MONITORS:
                threading.Thread(target=_end_after, args=(thread,), daemon=True).start()


def _end_after(monitor: threading.Thread) -> None:
    """Wait for the executor's monitor, which ends with the first worker that does."""
    monitor.join()
    time.sleep(PATIENCE)
    if _waits():
        logger.error("the engine waits for a worker that is gone: it ends")
        os._exit(1)


def _waits() -> bool:
    """Whether the main thread is waiting for an answer of a worker."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and frame.f_code is not MessageQueue.dequeue.__code__:
        frame = frame.f_back
    return frame is not None
