"""Table, plot and fitted exponents of ``benchmarks.long_context``."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
OUT_OF_MEMORY = "out of memory"
HEADINGS = (
    "model", "policy", "tokens", "TTFT s", "outside the engine s", "TPOT ms", "peak pool MiB",
    "of tokens", "peak RSS MiB", "grown by MiB", "",
)  # fmt: skip
PANELS = (
    ("ttft", "TTFT, seconds", 1.0),
    ("tpot", "TPOT, milliseconds", 1000.0),
    ("pool_peak", "peak pool, MiB", 1 / MIB),
    ("rss_peak", "peak RSS, MiB", 1 / MIB),
)
GROWING = ("ttft", "pool_peak")


@dataclass(frozen=True)
class Row:
    """One length under one policy. Seconds and bytes; None: not measured.

    Attributes:
        model, policy, length: what ran; tokens of prompt and answer.
        memory: of the cache.
        ttft, tpot: means over requests.
        outside: part of ``ttft`` before and after the engine: HTTP, tokenizer.
        pool_peak: of the cache in use.
        rss_before, rss_peak: of the server's processes, before the requests and at most.
        capacity: tokens the cache holds.
        note: why there is no number.

    """

    model: str
    policy: str
    length: int
    memory: int
    ttft: float | None = None
    tpot: float | None = None
    outside: float | None = None
    pool_peak: float | None = None
    rss_before: float | None = None
    rss_peak: float | None = None
    capacity: int | None = None
    note: str = ""


def identity(row: Row) -> Row:
    """What ran, without results."""
    return Row(row.model, row.policy, row.length, row.memory)


def read_rows(out: Path) -> list[Row]:
    """Rows that an earlier run left in a folder, but for those it did not come to."""
    file = out / "results.json"
    if not file.exists():
        return []
    rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    return [r for r in rows if r.ttft is not None or r.note.startswith(OUT_OF_MEMORY)]


def exponents(rows: list[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """How TTFT and TPOT grow: slope of log(seconds) over log(tokens), of three lengths or more."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key in dict.fromkeys((r.model, r.policy) for r in rows):
        for name in ("ttft", "tpot"):
            own = [r for r in rows if (r.model, r.policy) == key and getattr(r, name)]
            if len(own) > 2:
                lengths, seconds = zip(*[(r.length, getattr(r, name)) for r in own], strict=True)
                slope = np.polyfit(np.log(lengths), np.log(seconds), 1)[0]
                found.setdefault(key, {})[name] = float(slope)
    return found


def write_report(rows: list[Row], out: Path) -> None:
    """``results.json``, ``table.md`` and ``plot.png``."""
    rows = sorted(rows, key=lambda r: (r.model, list(dict.fromkeys(x.policy for x in rows)).index(
        r.policy), r.length))  # fmt: skip
    grown = exponents(rows)
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "rows": [asdict(r) for r in rows],
        "exponents": [{"model": m, "policy": p, **e} for (m, p), e in grown.items()],
    }
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(rows) + "\n" + _growth(grown), encoding="utf-8")
    plot(rows).savefig(out / "plot.png", dpi=120)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"| {' | '.join(['---'] * len(HEADINGS))} |"]
    lines += [f"| {' | '.join(_cells(r))} |" for r in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    grown = row.rss_peak - row.rss_before if row.rss_peak and row.rss_before else None
    return [
        row.model, row.policy, f"{row.length:,}", number(row.ttft, ".2f"),
        number(row.outside, ".2f"), number(row.tpot, ".1f", 1000),
        number(row.pool_peak, ".0f", 1 / MIB), number(row.capacity, ",.0f"),
        number(row.rss_peak, ".0f", 1 / MIB), number(grown, ".0f", 1 / MIB), row.note,
    ]  # fmt: skip


def _growth(grown: dict[tuple[str, str], dict[str, float]]) -> str:
    lines = ["| model | policy | TTFT grows as tokens to the | TPOT |", "| --- | --- | --- | --- |"]
    for (model, policy), found in grown.items():
        shown = (f"{found[n]:.2f}" if n in found else "-" for n in ("ttft", "tpot"))
        lines.append(f"| {model} | {policy} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> Figure:
    """A row of panels for each model: time and memory against length."""
    models = list(dict.fromkeys(r.model for r in rows))
    figure = Figure(figsize=(4 * len(PANELS), 3.6 * len(models)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(models), len(PANELS), squeeze=False))
    for line, model in zip(axes, models, strict=True):
        for axis, (name, title, scale) in zip(line, PANELS, strict=True):
            for policy in dict.fromkeys(r.policy for r in rows):
                own = [
                    (r.length, getattr(r, name) * scale)
                    for r in rows
                    if (r.model, r.policy) == (model, policy) and getattr(r, name) is not None
                ]
                if own:
                    axis.plot(*zip(*own, strict=True), "o-", ms=4, label=policy)
            axis.set(title=f"{model}: {title}", xlabel="tokens")
            if axis.lines:
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}K")
                if name in GROWING:
                    axis.set_yscale("log", base=2)
                    axis.yaxis.set_major_formatter("{x:g}")
                else:  # a logarithm would show noise in full size
                    axis.set_ylim(bottom=0)
        handles, labels = line[0].get_legend_handles_labels()
        if handles:
            line[0].legend(handles, labels, fontsize=7)
    return figure
