"""Runs as a table for a terminal, and what a person should know before trusting it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.measuring.summary import Summary

HEADINGS = (
    "run", "quality", "partial\nkey", "fit at\nonce", "peak\nKV", "TTFT s\np50 / p99",
    "TPOT ms\np50 / p99", "out\ntok/s", "failed",
)  # fmt: skip


def table(summaries: Sequence[Summary], title: str) -> Table:
    """One row a run; arrivals are part of its name where they differ."""
    shown = Table(title=escape(title), padding=(0, 0))
    for heading in HEADINGS:
        first = heading == "run"
        shown.add_column(
            heading, justify="left" if first else "right", no_wrap=not first, overflow="fold"
        )
    several = len({s.setup.arrivals for s in summaries}) > 1
    for summary in summaries:
        name = f"{summary.setup.label} {summary.setup.arrivals}" if several else summary.setup.label
        shown.add_row(escape(name), *_cells(summary))
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
        str(summary.requests.errors),
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
    if summary.quality and summary.quality.unanswered:
        tasks = ", ".join(summary.quality.unanswered)
        found.append(f"no quality of all tasks: none of these was answered: {tasks}")
    found += [
        f"{check.name}: the server counted {check.server:,.0f}, the client {check.client:,.0f}"
        for check in summary.checks
        if check.agree is False
    ]
    goodput = summary.goodput
    if goodput and goodput.unknown:
        found.append(
            f"{goodput.unknown} requests cannot be judged by the goals, and count as not met: all "
            "tokens of an answer came at the same time"
        )
    if requests.empty_answers and requests.thought:
        found.append(
            f"{requests.empty_answers} answers are empty; the model thinks, maybe for as many "
            "tokens as the workload lets it write"
        )
    if summary.server and summary.server.restarts:
        found.append(
            f"the server began again {summary.server.restarts} times during the run: what it "
            "counted between the last reading and its end is lost"
        )
    if summary.server and summary.server.failed_scrapes:
        found.append(f"{summary.server.failed_scrapes} scrapes failed (gaps in the series)")
    if summary.server is None:
        found.append("no metrics could be scraped")
    return found
