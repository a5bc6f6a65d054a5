"""One measured run, and what is printed and written after runs."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from loadtest.commands import display
from loadtest.commands.session import build_items, measure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.commands.exporter import Exporter
    from loadtest.commands.session import Settings
    from loadtest.measuring.summary import Summary
    from loadtest.sending.client import Target
    from loadtest.workloads import Item

LONGEST_NAME = 100
console = Console()


def run_once(
    settings: Settings,
    target: Target,
    folder: Path,
    *,
    warm_cache: bool = False,
    export: Exporter | None = None,
    items: Sequence[Item] | None = None,
) -> tuple[Summary, int]:
    """Measure once, with a live line, into a folder; without items, of the workload's own."""
    salt = None if warm_cache else secrets.token_hex(8)
    if items is None:
        with display.waiting(console, f"{settings.label}: making prompts"):
            items = build_items(settings, target)
    with display.live(console, settings.label) as watch:
        shown = export.beside(settings, watch) if export else watch
        try:
            one = replace(settings, watch=shown, salt=salt)
            return asyncio.run(measure(one, target, items, folder))
        finally:
            if export:
                export.over(settings)


def finish(folders: list[Path], out: Path, summaries: list[Summary]) -> None:
    """Print the table and what is wrong, write the report."""
    from loadtest.report import problems, read_run, table, write_report

    setup = summaries[0].setup
    models = ", ".join(dict.fromkeys(s.setup.model for s in summaries))
    console.print(table(summaries, f"{models}, {setup.workload}"))
    for summary in summaries:
        for problem in problems(summary):
            text = escape(f"{summary.setup.label}: {problem}")
            console.print(f"[yellow]{text}[/yellow]", highlight=False, soft_wrap=True)
    page = write_report([read_run(folder) for folder in folders], out)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


def safe_name(text: str) -> str:
    """A folder name that says what a run was."""
    name = re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def safe_names(texts: Sequence[str]) -> list[str]:
    """A folder name for each, no two alike: ``x``, ``x-2`` where a text comes again."""
    found: list[str] = []
    taken: set[str] = set()
    for text in texts:
        name = first = safe_name(text)
        number = 1
        while name.casefold() in taken:  # some file systems know no case
            number += 1
            name = f"{first}-{number}"
        taken.add(name.casefold())
        found.append(name)
    return found
