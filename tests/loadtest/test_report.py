"""The page as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from tests.loadtest.conftest import Command, run_command, running_mock

if TYPE_CHECKING:
    from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Cells(HTMLParser):
    """Numbers of the page: run, key and value of every cell."""

    def __init__(self) -> None:
        super().__init__()
        self.run = ""
        self.found: list[tuple[str, str, str]] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {k: v or "" for k, v in attrs}
        self.run = named.get("data-run", self.run)
        self.pictures += tag == "svg"
        if "data-value" in named:
            self.found.append((self.run, named["data-key"], named["data-value"]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at two loads under two labels, one of them with failures."""
    folder = tmp_path_factory.mktemp("results")
    for label, options in (("good <b>", {}), ("bad", {"fault": "500", "every": 4})):
        with running_mock(ttft=0.02, itl=0.002, **options) as url:
            run_command(
                "loadtest", url, "-w", "passkey(lengths=250|350,depths=0|1,texts=noise)",
                "-a", "closed(concurrency=1)", "-a", "closed(concurrency=2)", "--label", label,
                "-o", str(folder / label.split()[0]), "--goodput", "ttft:1s", "--interval", "0.1",
            )  # fmt: skip
    done = run_command("report", str(folder / "good"), str(folder / "bad"), "-o", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_opens_without_errors_and_shows_the_summaries_numbers(results: Path) -> None:
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={results}/profile", "--enable-logging=stderr", "--dump-dom",
         (results / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    page = Cells()
    page.feed(done.stdout)
    assert page.pictures == 5
    check(page, results)


def test_the_page_loads_nothing_and_shows_the_summaries_numbers(results: Path) -> None:
    text = (results / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text.replace("xlink:href", "href"))
    assert "good <b>" not in text  # escaped
    page = Cells()
    page.feed(text)
    assert page.pictures == 5
    check(page, results)
    assert "requests failed: 2 http_500" in text


def check(page: Cells, results: Path) -> None:
    summaries: dict[str, list[dict[str, Any]]] = {}
    for path in results.glob("*/*/summary.json"):
        found = json.loads(path.read_text())
        summaries.setdefault(found["setup"]["label"], []).append(found)
    assert len(page.found) > 60
    for run, key, value in page.found:
        known = [value_at(s, key) for s in summaries[run]]
        assert float(value) in known, (run, key, value, known)


def value_at(summary: Any, key: str) -> Any:
    for name in key.split("."):
        summary = None if summary is None else summary[name]
    return summary


def test_pictures_are_written_as_files_too(results: Path) -> None:
    names = {p.name for p in (results / "plots").iterdir()}
    assert names == {"pareto.png", "load.png", "tasks.png", "passkey.png", "timeline.png"}
    header = (results / "results.csv").read_text().splitlines()[0]
    assert "latency.tpot.p50.value" in header


def test_a_folder_without_runs_is_named(kvthrift: Command, tmp_path: Path) -> None:
    done = kvthrift("report", str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path}: no summary.json" in done.stderr
    (tmp_path / "summary.json").write_text('{"schema_version": 2}')
    done = kvthrift("report", str(tmp_path))
    assert done.returncode == 2
    assert "not a summary of this version" in done.stderr
