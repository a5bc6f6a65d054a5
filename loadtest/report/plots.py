"""The report's pictures. Each function draws one, or gives None where the runs have no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from loadtest.measuring import scrape
from loadtest.measuring.series import series
from loadtest.report.data import one_per_label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from loadtest.report.data import Run

    Plot = Callable[[Sequence[Run]], Figure | None]

# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
MEMORY, FIT = "server.bytes_per_request", "server.requests_that_fit"
MOST_SHAPES = 1000  # of one kind in a picture; more are drawn as points of an image


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """A colour for every label, the same in all pictures."""
    labels = dict.fromkeys(run.label for run in runs)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def _axes(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def pareto(runs: Sequence[Run]) -> Figure | None:
    """Quality against the cache memory of a request like these, measured.

    Up and to the left is better; where a server does not tell its memory, the axis is how many such
    requests fit at once, and to the right is better.
    """
    best = [run for run in one_per_label(runs) if run.summary.get("quality.overall") is not None]
    shown = [(run, x) for run in best if (x := run.summary.get(MEMORY))]
    by_memory = bool(shown) and len(shown) == sum(bool(r.summary.get(FIT)) for r in best)
    if not by_memory:
        shown = [(run, x) for run in best if (x := run.summary.get(FIT))]
    if not shown:
        return None
    figure, (axis,) = _axes(7.5, 4.4)
    palette = colours(runs)
    for index, (run, x) in enumerate(shown):
        overall = run.summary.get("quality.overall")
        low, high = run.summary.get("quality.overall_interval") or (overall, overall)
        span = [[100 * max(0.0, overall - low)], [100 * max(0.0, high - overall)]]
        axis.errorbar(
            [x / 2**20 if by_memory else x], [100 * overall], yerr=span,
            fmt=MARKERS[index % len(MARKERS)], ms=10, capsize=4, color=palette[run.label],
            label=run.label, elinewidth=1.2, mec="white",
        )  # fmt: skip
    (_memory_axis if by_memory else _capacity_axis)(axis, [(run, x) for run, x in shown])
    axis.set_ylabel("quality, % (95% interval)")
    axis.set_ylim(-3, 106)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _memory_axis(axis: Axes, shown: Sequence[tuple[Run, float]]) -> None:
    lengths = [n for run, _ in shown if (n := run.summary.requests.prompt_tokens)]
    told = ""
    if lengths:
        low, high = f"{min(lengths):,.0f}", f"{max(lengths):,.0f}"
        told = f"\n({low if low == high else f'{low} to {high}'} prompt tokens)"
    axis.set_xlabel(f"cache memory of a request, MiB (measured){told}")
    sizes = [x for _, x in shown]
    if max(sizes) > 8 * min(sizes):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axis.set_xlim(left=0)
    axis.set_title("What less memory costs: up and left is better")


def _capacity_axis(axis: Axes, shown: Sequence[tuple[Run, float]]) -> None:
    axis.set_xlabel("requests like these that fit in the cache at once (measured)")
    axis.set_xlim(0, 1.1 * max(x for _, x in shown))
    axis.set_title("What a smaller cache buys and costs: up and right is better")


def load(runs: Sequence[Run]) -> Figure | None:
    """Output tokens per second, TTFT and TPOT against the load, a line per label."""
    loads = {run.load for run in runs if run.load}
    closed = any(run.summary.setup.concurrency for run in runs)
    if not loads:
        return None
    figure, axes = _axes(10.5, 3.4, 1, 3)
    palette = colours(runs)
    for label, colour in palette.items():
        points = sorted((r for r in runs if r.label == label and r.load), key=lambda r: r.load or 0)
        for axis, value in zip(axes, (_tokens, _ttft, _tpot), strict=True):
            known = [(r.load, v) for r in points if (v := value(r)) is not None]
            if known:
                axis.plot(*zip(*known, strict=True), "o-", color=colour, label=label, ms=5)
    titles = (
        "output tokens/s",
        "TTFT from when due, s (median)",
        "time per output token, ms (median)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("concurrent requests" if closed else "requests/s offered")
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, 1.15 * max(loads))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False,
                  fontsize=9)  # fmt: skip
    return figure


def _tokens(run: Run) -> float | None:
    found = run.summary.steady or run.summary.throughput
    return found.output_tokens if found else None


def _ttft(run: Run) -> float | None:
    found = run.summary.latency.scheduled_ttft
    return found.p50.value if found else None


def _tpot(run: Run) -> float | None:
    found = run.summary.latency.tpot
    return 1000 * found.p50.value if found else None


def timeline(runs: Sequence[Run]) -> Figure | None:
    """For every label: when each request waited, was read and answered, and the memory below."""
    shown = [run for run in one_per_label(runs) if run.records]
    if not shown:
        return None
    figure = Figure(figsize=(10.5, 2.9 * len(shown)), layout="constrained")
    grid = figure.subplots(2 * len(shown), 1, height_ratios=[3, 2] * len(shown))
    longest = max(r.finished for run in shown for r in run.records)
    for index, run in enumerate(shown):
        top, bottom = grid[2 * index], grid[2 * index + 1]
        _requests(top, run)
        _memory(bottom, run)
        for axis in (top, bottom):
            axis.set_xlim(0, longest)
            axis.spines[["top", "right"]].set_visible(False)
        top.set_xticklabels([])
    grid[-1].set_xlabel("seconds")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figure


def _requests(axis: Axes, run: Run) -> None:
    order = sorted(run.records, key=lambda r: r.scheduled)
    first = [r.events[0] if r.events else r.finished for r in order]
    spans = (
        (
            "waiting for the client",
            [r.scheduled for r in order],
            [r.sent for r in order],
            "#dddddd",
        ),
        ("queued and read", [r.sent for r in order], first, "#E69F00"),
        ("answered", first, [r.finished for r in order], "#0072B2"),
    )
    for label, begin, end, colour in spans:
        axis.add_collection(_bars(begin, end, facecolor=colour, label=label))
    axis.set_ylim(-0.5, len(order) - 0.5)
    failed = [(r.finished, i) for i, r in enumerate(order) if r.status != "ok"]
    if failed:
        axis.plot(*zip(*failed, strict=True), "x", color="#D55E00", label="failed")
    axis.invert_yaxis()
    axis.set_ylabel("request")
    axis.set_title(run.label, loc="left", fontsize=10, fontweight="bold")


def _bars(begin: Sequence[float], end: Sequence[float], **looks: Any) -> PolyCollection:
    """A bar in each row, drawn as one object: thousands of rows are common."""
    left, right = np.array(begin), np.maximum(begin, end)
    rows = np.arange(len(left))
    low, high = rows - 0.425, rows + 0.425
    corners = np.stack([left, low, left, high, right, high, right, low], axis=1)
    bars = PolyCollection(list(corners.reshape(-1, 4, 2)), linewidth=0, **looks)
    bars.set_snap(False)  # rows of equal heights
    bars.set_rasterized(len(rows) > MOST_SHAPES)
    return bars


def _memory(axis: Axes, run: Run) -> None:
    use = series(run.samples, scrape.KV_USE)
    if not use:
        axis.text(0.5, 0.5, "no metrics scraped", ha="center", transform=axis.transAxes)
        return
    times, values = zip(*use, strict=True)
    axis.fill_between(times, values, step="post", alpha=0.35, color="#009E73")
    axis.step(times, values, where="post", color="#009E73")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylabel("KV in use")
    axis.grid(alpha=0.25)


def heat(runs: Sequence[Run]) -> Figure | None:
    """Share of keys found, by length and depth, one map a label."""
    shown = [
        (run.label, run.summary.quality.heat)
        for run in one_per_label(runs)
        if run.summary.quality and run.summary.quality.heat
    ]
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.7 * columns + 0.8, 2.3 * rows + 0.3), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    image = None
    for axis, (label, cells) in zip(axes, shown, strict=False):
        lengths = sorted({c.length for c in cells})
        depths = sorted({c.depth for c in cells})
        table = np.full((len(depths), len(lengths)), np.nan)
        for c in cells:
            table[depths.index(c.depth), lengths.index(c.length)] = c.score
        image = axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            ink = "white" if value < 0.15 or value > 0.85 else "black"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9, color=ink)
        axis.set_xticks(range(len(lengths)), [f"{v:g}" for v in lengths])
        axis.set_yticks(range(len(depths)), [f"{v:g}" for v in depths])
        axis.set_title(label, fontsize=9)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("tokens of text", fontsize=9)
    figure.supylabel("depth of the key", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="keys found", shrink=0.8)
    return figure


def tasks(runs: Sequence[Run]) -> Figure | None:
    """Mean score of each task, a bar per label."""
    shown = [(run.label, run.summary.quality) for run in one_per_label(runs) if run.summary.quality]
    if not shown:
        return None
    names = list(dict.fromkeys(t.name for _, q in shown if q for t in q.tasks))
    palette = colours(runs)
    figure, (axis,) = _axes(max(6.0, 0.55 * len(names) * len(shown) / 2 + 3), 3.4)
    width = 0.85 / len(shown)
    for index, (label, quality) in enumerate(shown):
        assert quality is not None
        by_name = {t.name: t.score for t in quality.tasks}
        known = [(i, by_name[n]) for i, n in enumerate(names) if n in by_name]
        places = [i + (index - (len(shown) - 1) / 2) * width for i, _ in known]
        values = np.array([s.value for _, s in known])
        low = values - [s.value if s.low is None else s.low for _, s in known]
        high = [s.value if s.high is None else s.high for _, s in known] - values
        spans = 100 * np.clip([low, high], 0, None)
        axis.bar(places, 100 * values, width, yerr=spans, color=palette[label], label=label,
                 error_kw={"elinewidth": 0.8})  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=20 if len(names) > 4 else 0)
    axis.set_ylabel("score, % (95% interval)")
    axis.set_ylim(0, 105)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


PLOTS: dict[str, tuple[str, Plot]] = {
    "pareto": ("Quality against memory", pareto),
    "load": ("Throughput and latency against load", load),
    "tasks": ("Quality by task", tasks),
    "passkey": ("Keys found by length and depth", heat),
    "timeline": ("Requests and KV memory over time", timeline),
}
