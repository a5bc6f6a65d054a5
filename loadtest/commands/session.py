"""One measured run: build the workload, warm up, send, scrape, write the folder."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import random
import shlex
import sys
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import httpx

from loadtest.commands.resume import begin
from loadtest.connect import connection
from loadtest.errors import CANNOT_WRITE, SOME_FAILED, LoadTestError
from loadtest.files import METRICS_CSV, REQUESTS, SUMMARY
from loadtest.hide import hide, public_arguments, public_url
from loadtest.measuring.scrape import KV_USE, RUNNING, USUAL, Scraper, total, write_samples
from loadtest.measuring.series import series
from loadtest.measuring.server_side import check_counters
from loadtest.measuring.summary import Setup, Summary, summarize
from loadtest.quality import METRICS, score
from loadtest.sending.arrivals import Schedule
from loadtest.sending.client import Client, Target, new_record
from loadtest.sending.records import OK, Record, RecordFile, write_records
from loadtest.sending.runner import Outcome, Progress, Runner
from loadtest.workloads import Item, Workload, hash_items
from loadtest.workloads.fitting import check_fit
from loadtest.workloads.text import Filler, sentences
from loadtest.workloads.tokens import (
    ApproximateTokenizer,
    LocalTokenizer,
    ServerTokenizer,
    Tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
    from pathlib import Path

    from loadtest.measuring.goodput import Goals
    from loadtest.measuring.scrape import Sample
    from loadtest.sending.arrivals import Arrivals

WARMUP_TOKENS = 256
IDLE_SECONDS = 10.0  # longest wait for the server to become idle


@dataclass(frozen=True)
class Settings:
    """How to run; see the options of ``kvthrift loadtest``."""

    workload: Workload
    arrivals: Arrivals
    label: str = "run"
    policy: str | None = None
    seed: int = 0
    tokenizer: str = "server"
    max_concurrency: int | None = None
    warmup: int = 2
    max_error_rate: float = 0.5
    goals: Goals | None = None
    metrics: tuple[str, ...] | None = None
    metric_names: str = USUAL
    interval: float = 1.0
    pid: int | None = None
    resume: bool = False
    salt: str | None = None
    watch: Callable[[Progress, float | None], None] = field(default=lambda *_: None)


def choose_tokenizer(name: str, target: Target) -> Tokenizer:
    """``server``, ``approximate``, or a folder or hub name for transformers."""
    if name == "approximate":
        return ApproximateTokenizer(target.endpoint)
    if name != "server":
        return LocalTokenizer(name, target.endpoint)
    settings = connection(target.url)
    http = httpx.Client(base_url=target.url, headers=target.headers, timeout=60.0, **settings)
    return ServerTokenizer(http, target.model, target.endpoint, target.extra)


def build_items(settings: Settings, target: Target) -> list[Item]:
    """The workload's items, made with the tokenizer that was asked for.

    Raises:
        LoadTestError: bad data, or a request that the server could only refuse.

    """
    tokenizer = choose_tokenizer(settings.tokenizer, target)
    items = settings.workload.items(tokenizer, settings.seed, target.longest)
    if not items:
        raise LoadTestError(f"workload {settings.workload} has no requests")
    answer = target.extra.get("max_completion_tokens") or target.extra.get("max_tokens")
    if isinstance(answer, int):
        check_fit(items, tokenizer, target.longest, answer)
    return items


async def measure(
    settings: Settings, target: Target, items: Sequence[Item], folder: Path
) -> tuple[Summary, int]:
    """Run, write the folder, and give the summary and the exit status.

    Raises:
        LoadTestError: nothing could be written, or ``--resume`` met another workload.

    """
    schedule = Schedule.draw(
        settings.arrivals, [i.at for i in items], settings.seed, settings.max_concurrency
    )
    setup = describe(settings, target, hash_items(items), schedule)
    kept = begin(folder, setup, items, resume=settings.resume)
    # a resumed run goes on where the clock of the first part stopped
    offset = max((r.finished for r in kept), default=0.0)
    answered = {r.id for r in kept}
    left = [i for i in items if i.id not in answered]
    if not left and (known := _whole(folder, setup)):
        return _again(setup, settings, items, kept, known, folder)
    file = RecordFile(folder / REQUESTS)
    async with _shown(settings, Progress(len(items)), None):
        await _warm_up(settings, target)
    client = Client(_salted(target, settings), time.monotonic())
    scraper = _scraper(settings, target, client)
    later = _later(schedule, items, left, offset)
    runner = Runner(client, left, later, file, settings.max_error_rate)
    try:
        await _idle(scraper)
        scraper.samples[:] = [replace(s, time=offset) for s in await scraper.once()]
        client.prepare(min(len(left), schedule.concurrency or 16))
        client.restart(offset)
        outcome = await _watched(runner, scraper, settings)
    finally:
        await client.close()
        await scraper.close()
    try:
        file.close()
    except LoadTestError as error:
        runner.stop(str(error), error.status)
    records = kept + outcome.records
    _score(items, records)
    summary = summarize(
        setup, records, scraper.samples, planned=len(items), stopped=outcome.stopped,
        goals=settings.goals, failed_scrapes=scraper.failed, tasks=_tasks(items),
        checks=check_counters(outcome.records, scraper.samples),
    )  # fmt: skip
    _write(summary, records, scraper.samples, folder)
    failed = summary.requests.errors > 0
    return summary, outcome.status or (SOME_FAILED if failed else 0)


def _whole(folder: Path, setup: Setup) -> Summary | None:
    """The summary of a run to which nothing is left; None: there is none yet."""
    if not complete(folder, setup.arrivals):
        return None
    try:
        return Summary.model_validate_json((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValueError:  # of another version
        return None


def _again(
    setup: Setup,
    settings: Settings,
    items: Sequence[Item],
    records: list[Record],
    known: Summary,
    folder: Path,
) -> tuple[Summary, int]:
    """Score and judge a whole run once more; what was seen of the server stays."""
    _score(items, records)
    summary = summarize(
        setup, records, [], planned=len(items), goals=settings.goals, tasks=_tasks(items)
    ).model_copy(update={"server": known.server, "checks": known.checks})
    _write(summary, records, None, folder)
    return summary, 0


def _tasks(items: Sequence[Item]) -> set[tuple[str, str]]:
    """Category and name of those whose answers are scored."""
    return {(item.category, item.task) for item in items if item.metric}


def _scraper(settings: Settings, target: Target, client: Client) -> Scraper:
    own = f"{target.url}/metrics"
    urls = [own] if settings.metrics is None else list(settings.metrics)
    # the key is the target's; it is sent to no other host
    keys = {url: target.headers for url in urls if url.startswith(f"{target.url}/")}
    return Scraper(urls, client.now, settings.metric_names, settings.pid, keys)


def _score(items: Sequence[Item], records: list[Record]) -> None:
    """Score the answers, after the run: it would hold up the clock of other requests."""
    by_id = {item.id: item for item in items}
    for record in records:
        if record.status == OK:
            item = by_id[record.id]
            record.score = score(item, record.answer)
            if item.metric == "exact_key":
                record.partial = METRICS["partial_key"](record.answer, item.references, ())


def _write(
    summary: Summary, records: list[Record], samples: list[Sample] | None, folder: Path
) -> None:
    try:
        write_records(records, folder / REQUESTS)
        if samples is not None:
            write_samples(samples, folder / METRICS_CSV)
        summary.write(folder / SUMMARY)
    except OSError as error:
        raise LoadTestError(f"cannot write {folder}: {error.strerror}", CANNOT_WRITE) from None


def _later(
    schedule: Schedule, items: Sequence[Item], left: Sequence[Item], offset: float
) -> Schedule:
    """Due times of the items that are left, each as long after the one before as it was drawn."""
    if schedule.due is None or len(items) == len(left):
        return schedule
    wanted = {i.id for i in left}
    gaps = (b - a for a, b in pairwise((0.0, *schedule.due)))
    own = [gap for item, gap in zip(items, gaps, strict=True) if item.id in wanted]
    return replace(schedule, due=tuple(offset + t for t in accumulate([0.0, *own[1:]])))


def describe(settings: Settings, target: Target, workload_hash: str, schedule: Schedule) -> Setup:
    """What is run, for the summary."""
    arrivals = settings.arrivals
    return Setup(
        label=settings.label,
        model=target.model,
        url=public_url(target.url),
        policy=settings.policy,
        workload=str(settings.workload),
        workload_hash=workload_hash,
        arrivals=str(arrivals),
        arrivals_hash=schedule.hash,
        concurrency=schedule.concurrency if schedule.due is None else None,
        rate=getattr(arrivals, "rate", None),
        seed=settings.seed,
        endpoint=target.endpoint,
        extra_hash=hashlib.sha256(json.dumps(target.extra, sort_keys=True).encode()).hexdigest()[
            :12
        ],
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=hide(shlex.join(["kvthrift", *public_arguments(sys.argv[1:])]), target.api_key),
        kvthrift=version("kvthrift"),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    )


def _salted(target: Target, settings: Settings) -> Target:
    """With vLLM's ``cache_salt``: prompts of another run on the same server are not found."""
    if not (settings.salt and target.is_vllm):
        return target
    return replace(target, extra={**target.extra, "cache_salt": settings.salt})


async def _warm_up(settings: Settings, target: Target) -> None:
    """Requests whose prompts begin unlike any that is measured."""
    client = Client(target, time.monotonic())
    pool = sentences("essay", f"{settings.seed}-warmup")
    random.Random(settings.seed).shuffle(pool)
    filler = Filler(pool, ApproximateTokenizer())
    try:
        for index in range(settings.warmup):
            text = " ".join([f"Warm-up {index}.", *filler.sentences(WARMUP_TOKENS)])
            item = Item(f"warmup-{index}", "warmup", "warmup", text, max_tokens=4)
            await client.send(item, new_record(item, 0.0))
    finally:
        await client.close()


async def _idle(scraper: Scraper) -> None:
    """Wait until the server runs nothing: counters lag behind the last token."""
    until = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < until:
        running = total(await scraper.once(), RUNNING)
        if not running:
            return
        await asyncio.sleep(0.2)


async def _watched(runner: Runner, scraper: Scraper, settings: Settings) -> Outcome:
    """Run with scraping and display beside it."""
    async with (
        _beside(scraper.watch(settings.interval)),
        _shown(settings, runner.progress, scraper),
    ):
        # the server's counters lag behind the last token
        outcome = await runner.run(then=lambda: _idle(scraper))
    settings.watch(runner.progress, None)
    return outcome


@asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Do something until the block ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _shown(
    settings: Settings, progress: Progress, scraper: Scraper | None
) -> AbstractAsyncContextManager[None]:
    """Show the progress twice a second until the block ends."""

    async def show() -> None:
        while True:
            use = series(scraper.latest, KV_USE) if scraper else []
            settings.watch(progress, use[-1][1] if use else None)
            await asyncio.sleep(0.5)

    return _beside(show())


def complete(folder: Path, arrivals: str) -> bool:
    """Whether the folder holds a whole run with these arrivals, and without failures."""
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        same = found["setup"]["arrivals"] == arrivals and not found["stopped"]
        return bool(same and found["requests"]["ok"] == found["requests"]["planned"])
    except (OSError, ValueError, KeyError):
        return False
