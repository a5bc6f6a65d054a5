"""Sends a workload by a schedule and writes down what happened."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loadtest.errors import INTERRUPTED, TOO_MANY_ERRORS, LoadTestError
from loadtest.sending.client import new_record
from loadtest.sending.records import CANCELLED, ERROR, Record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from loadtest.sending.arrivals import Schedule
    from loadtest.sending.client import Client
    from loadtest.sending.records import RecordFile
    from loadtest.workloads import Item

FEWEST = 10  # finished requests before an error rate means something


@dataclass
class Progress:
    """What a display needs to know while requests run.

    Attributes:
        total, done, errors, running: requests.
        tokens: output tokens that arrived.
        ttfts: of finished requests, seconds.

    """

    total: int
    done: int = 0
    errors: int = 0
    running: int = 0
    tokens: int = 0
    ttfts: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What a run left.

    Attributes:
        records: of every request that was sent, in order of finishing.
        stopped: why it ended early; None if it did not.
        status: exit status that says so; 0 if it did not.

    """

    records: list[Record] = field(default_factory=list)
    stopped: str | None = None
    status: int = 0


class Runner:
    """One run.

    Args:
        client: sends; its start is the schedule's 0.
        items: what to send, in order.
        schedule: when; its due times are those of ``items``.
        file: gets every record as soon as its request ends.
        max_error_rate: share of failed requests above which the run stops.

    """

    def __init__(
        self,
        client: Client,
        items: Sequence[Item],
        schedule: Schedule,
        file: RecordFile,
        max_error_rate: float = 1.0,
    ) -> None:
        self._client = client
        self._items = items
        self._schedule = schedule
        self._file = file
        self._max_error_rate = max_error_rate
        self._stop = asyncio.Event()
        self._done = False
        self.progress = Progress(len(items))
        self.outcome = Outcome()

    async def run(self, then: Callable[[], Awaitable[None]]) -> Outcome:
        """Send everything, or stop early: on SIGINT, SIGTERM, too many errors, a full disk.

        Args:
            then: what to wait for afterwards; signals do not end it.

        """
        work = self._closed() if self._schedule.due is None else self._open()
        main = asyncio.ensure_future(work)
        stopper = asyncio.ensure_future(self._stop.wait())
        with self._signals():
            try:
                await asyncio.wait({main, stopper}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (main, stopper):
                    if not task.done():
                        task.cancel()
                results = await asyncio.gather(main, stopper, return_exceptions=True)
            self._done = True
            await then()
        if isinstance(results[0], Exception):
            raise results[0]
        return self.outcome

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
        for kind in before:
            loop.add_signal_handler(kind, self.stop, f"{kind.name} received", INTERRUPTED)
        try:
            yield
        finally:
            for kind, handler in before.items():
                loop.remove_signal_handler(kind)
                signal.signal(kind, handler)  # which removing has set to the default

    def stop(self, why: str, status: int) -> None:
        """End the run now; requests under way are cancelled and written down so."""
        if not self.outcome.stopped and not (self._done and status == INTERRUPTED):
            self.outcome.stopped, self.outcome.status = why, status
        self._stop.set()

    async def _closed(self) -> None:
        """Each client takes the next item when it is free."""
        left = iter(self._items)

        async def one_client() -> None:
            for item in left:
                await self._send(item, self._client.now())

        clients = min(self._schedule.concurrency or 1, len(self._items))
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one_client())

    async def _open(self) -> None:
        """Each item is sent when it is due, whatever became of those before it."""
        limit = self._schedule.concurrency
        gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()

        async def one(item: Item, due: float) -> None:
            async with gate:
                await self._send(item, due)

        async with asyncio.TaskGroup() as group:
            for item, due in zip(self._items, self._schedule.due or (), strict=True):
                await asyncio.sleep(due - self._client.now())
                group.create_task(one(item, due))

    async def _send(self, item: Item, scheduled: float) -> None:
        progress = self.progress
        record = new_record(item, scheduled)
        progress.running += 1
        try:
            await self._client.send(item, record)
        except asyncio.CancelledError:
            record.status, record.finished = CANCELLED, self._client.now()
            self._keep(record)
            raise
        finally:
            progress.running -= 1
        self._keep(record)
        progress.done += 1
        progress.errors += record.status == ERROR
        progress.tokens += record.output_tokens or 0
        if record.ttft is not None:
            progress.ttfts.append(record.ttft)
        if progress.done >= FEWEST and progress.errors > self._max_error_rate * progress.done:
            self.stop(
                f"{progress.errors} of {progress.done} requests failed, "
                f"the last: {record.error_kind}: {record.error}",
                TOO_MANY_ERRORS,
            )

    def _keep(self, record: Record) -> None:
        self.outcome.records.append(record)
        try:
            self._file.write(record)
        except LoadTestError as error:
            self.stop(str(error), error.status)
