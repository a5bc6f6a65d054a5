"""What a person sees while a run goes on."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from loadtest.sending.runner import Progress as State


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
