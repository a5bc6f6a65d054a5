"""``report.html`` and its pictures, from run folders."""

from __future__ import annotations

import csv
import io
from importlib.resources import files
from typing import TYPE_CHECKING

import jinja2
import matplotlib as mpl

from loadtest.errors import CANNOT_WRITE, LoadTestError
from loadtest.report.data import Run, read_run, read_runs
from loadtest.report.plots import PLOTS, colours
from loadtest.report.table import problems, table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = ["Run", "problems", "read_run", "read_runs", "table", "write_report"]

REPORT = "report.html"


def write_report(runs: Sequence[Run], folder: Path, title: str = "kvthrift load test") -> Path:
    """Write report.html, plots/*.png and results.csv; returns the page's path.

    Raises:
        LoadTestError: it cannot be written.

    """
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        pictures = []
        for name, (heading, plot) in PLOTS.items():
            figure = plot(runs)
            if figure is None:
                continue
            figure.savefig(folder / "plots" / f"{name}.png", dpi=130)
            about = " ".join((plot.__doc__ or "").split())
            pictures.append(
                {"name": name, "heading": heading, "about": about, "svg": _svg(figure, name)}
            )
        page = _page(runs, pictures, title)
        (folder / REPORT).write_text(page, encoding="utf-8")
        _write_csv(runs, folder / "results.csv")
    except OSError as error:
        raise LoadTestError(f"cannot write {folder}: {error.strerror}", CANNOT_WRITE) from None
    return folder / REPORT


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of the page; ids differ between figures by the salt."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _page(runs: Sequence[Run], pictures: list[dict[str, str]], title: str) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = files("loadtest.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    summaries = [run.summary for run in runs]
    return environment.from_string(source).render(
        title=title,
        summaries=summaries,
        models=list(dict.fromkeys(s.setup.model for s in summaries)),
        pictures=pictures,
        colours=colours(runs),
        problems={i: found for i, s in enumerate(summaries) if (found := problems(s))},
    )


COLUMNS = (
    "setup.label", "setup.policy", "setup.arrivals", "setup.workload", "requests.ok",
    "requests.errors", "quality.overall", "quality.partial_key.value", "server.requests_that_fit",
    "server.capacity_tokens", "server.kv_use_peak", "server.preemptions",
    "latency.ttft.p50.value", "latency.ttft.p99.value", "latency.scheduled_ttft.p50.value",
    "latency.scheduled_ttft.p99.value", "latency.tpot.p50.value", "latency.tpot.p99.value",
    "latency.itl.p50.value", "latency.itl.p99.value", "latency.e2e.p50.value",
    "throughput.output_tokens", "throughput.prompt_tokens", "throughput.requests",
    "steady.output_tokens", "goodput.share", "goodput.requests_per_second", "setup.model",
    "requests.prompt_tokens", "server.bytes_per_request", "latency.first_answer.p50.value",
)  # fmt: skip


def _write_csv(runs: Sequence[Run], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([run.summary.get(column) for column in COLUMNS] for run in runs)
