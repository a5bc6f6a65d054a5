"""Run folders, read back for a report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loadtest.errors import LoadTestError
from loadtest.files import METRICS_CSV, REQUESTS, SUMMARY
from loadtest.measuring.scrape import read_samples
from loadtest.measuring.summary import Summary
from loadtest.sending.records import iterate_records
from loadtest.workloads.jsonl import strict_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.measuring.scrape import Sample
    from loadtest.sending.records import Record


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        summary: as written.
        records: what pictures show of each request: no token times but the first, no text.
        samples: as written.

    """

    summary: Summary
    records: list[Record]
    samples: list[Sample]

    @property
    def label(self) -> str:
        """Name of the row: runs of one label differ in their arrivals."""
        return self.summary.setup.label

    @property
    def load(self) -> float | None:
        """Concurrency of a closed loop, or requests per second offered by an open one."""
        return self.summary.setup.concurrency or self.summary.setup.rate


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, and the run folders inside other folders, in the order given.

    Raises:
        LoadTestError: no run in a folder, or a summary of another version.

    """
    runs: list[Run] = []
    for folder in folders:
        found = [folder] if (folder / SUMMARY).exists() else []
        found += sorted(p.parent for p in folder.glob(f"*/{SUMMARY}"))
        if not found:
            raise LoadTestError(f"{folder}: no {SUMMARY} in it or in a folder inside it")
        runs += [read_run(path) for path in found]
    return runs


def read_run(folder: Path) -> Run:
    """Read a run's folder, and nothing inside another one.

    Raises:
        LoadTestError: a summary of another version.

    """
    path = folder / SUMMARY
    try:
        summary = Summary.model_validate(strict_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # of pydantic too
        raise LoadTestError(f"{path}: not a summary of this version: {error}") from None
    path = folder / REQUESTS
    records = [_slim(r) for r in iterate_records(path)] if path.exists() else []
    return Run(summary, records, read_samples(folder / METRICS_CSV))


def _slim(record: Record) -> Record:
    """Without what grows with the tokens: a report may be of many long runs."""
    return replace(record, events=record.events[:1], event_tokens=[], answer="", thinking="")


def one_per_label(runs: Sequence[Run]) -> list[Run]:
    """Of each label the run with the highest load: what fills the memory most."""
    best: dict[str, Run] = {}
    for run in runs:
        known = best.get(run.label)
        if known is None or (run.load or 0) > (known.load or 0):
            best[run.label] = run
    return list(best.values())
