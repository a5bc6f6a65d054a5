"""What a person sees while and after a run."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from loadtest.sending.runner import Progress as State
    from loadtest.measuring.summary import Summary


@contextmanager
def live(console: Console, label: str) -> Iterator[Callable[[State, float | None], None]]:
    """A line that shows requests done, tokens/s, TTFT, KV use and the time left."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )
    begin = time.monotonic()
    with bar:
        task = bar.add_task(label, total=None, note="")
        seen: list[float | None] = [None]

        def show(state: State, use: float | None) -> None:
            seen[0] = use if use is not None else seen[0]
            seconds = time.monotonic() - begin
            note = _note(state, seen[0], seconds)
            bar.update(task, total=state.total, completed=state.done, note=note)

        yield show


def _note(state: State, use: float | None, seconds: float) -> str:
    parts = [f"{state.running} running", f"{state.tokens / max(seconds, 1e-9):.1f} tok/s"]
    if state.ttfts:
        parts.append(f"TTFT {statistics.median(state.ttfts):.2f} s")
    if use is not None:
        parts.append(f"KV {use:.0%}")
    if state.errors:
        parts.append(f"[red]{state.errors} failed[/red]")
    if 0 < state.done < state.total:
        left = seconds / state.done * (state.total - state.done)
        parts.append(f"about {left:.0f} s left")
    return ", ".join(parts)


HEADINGS = (
    "run", "quality", "partial\nkey", "fit at\nonce", "peak\nKV", "TTFT s\np50 / p99",
    "TPOT ms\np50 / p99", "out\ntok/s", "failed",
)  # fmt: skip


def table(summaries: Sequence[Summary], title: str) -> Table:
    """One row a run; arrivals are part of its name where they differ."""
    shown = Table(title=title, padding=(0, 0))
    for heading in HEADINGS:
        first = heading == "run"
        shown.add_column(
            heading, justify="left" if first else "right", no_wrap=not first, overflow="fold"
        )
    several = len({s.setup.arrivals for s in summaries}) > 1
    for summary in summaries:
        name = f"{summary.setup.label} {summary.setup.arrivals}" if several else summary.setup.label
        shown.add_row(name, *_cells(summary))
    return shown


def _cells(summary: Summary) -> tuple[str, ...]:
    """The numbers of a run, as text."""
    return (
        _number(summary, "quality.overall", ".2f"),
        _number(summary, "quality.partial_key.value", ".2f"),
        _number(summary, "server.requests_that_fit", ".1f"),
        _number(summary, "server.kv_use_peak", ".0%"),
        _percentiles(summary, "scheduled_ttft", 1, ".2f"),
        _percentiles(summary, "tpot", 1000, ".0f"),
        _number(summary, "throughput.output_tokens", ".1f"),
        str(summary.requests.errors + summary.requests.cancelled),
    )


def _number(summary: Summary, path: str, form: str, scale: float = 1) -> str:
    value = summary.get(path)
    return "-" if value is None else format(value * scale, form)


def _percentiles(summary: Summary, name: str, scale: float, form: str) -> str:
    both = (_number(summary, f"latency.{name}.{p}.value", form, scale) for p in ("p50", "p99"))
    return " / ".join(both)


def problems(summary: Summary) -> list[str]:
    """What a person should know before trusting the numbers."""
    requests = summary.requests
    found = []
    if summary.stopped:
        found.append(f"stopped early: {summary.stopped}")
    if requests.errors:
        kinds = ", ".join(f"{n} {kind}" for kind, n in requests.by_error.items())
        found.append(f"{requests.errors} requests failed: {kinds}")
    found += [
        f"{check.name}: the server counted {check.server:,.0f}, the client {check.client:,.0f}"
        for check in summary.checks
        if check.agree is False
    ]
    if summary.server and summary.server.failed_scrapes:
        found.append(f"{summary.server.failed_scrapes} scrapes failed (gaps in the series)")
    if summary.server is None:
        found.append("no metrics could be scraped")
    return found
