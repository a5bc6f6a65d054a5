"""What a person sees while a run goes on: a live line, or, in a log, a line now and then."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from loadtest.sending.runner import Progress as State

LOG_SECONDS = 5.0  # between two lines of a log
WAIT_SECONDS = 15.0  # between lines of a log while something is waited for
SILENT_SECONDS = 30.0  # after which a log gets a line though nothing has changed


def is_live(console: Console) -> bool:
    """Whether a line can be drawn over: FORCE_COLOR makes rich take a file for a terminal."""
    return console.is_interactive and console.file.isatty()


class Log:
    """Lines of a log: one when something has changed, at most every few seconds.

    Args:
        console: printed to.
        now: seconds on a clock.

    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._printed = now()
        self._last: object = None

    def show(self, text: str, state: object) -> None:
        """Print the text if it is time; ``state`` is what the text tells, but for the time."""
        waited = self._now() - self._printed
        due = LOG_SECONDS if state != self._last else SILENT_SECONDS
        if waited >= due:
            self._printed, self._last = self._now(), state
            self._console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def waiting(console: Console, text: str) -> Iterator[Callable[[float], None]]:
    """Say what is waited for; what is yielded takes the seconds waited so far."""
    if is_live(console):
        with console.status(escape(text)) as status:
            yield lambda seconds: status.update(escape(f"{text}, {seconds:.0f} s"))
        return
    console.print(escape(text), highlight=False, soft_wrap=True)
    log = Log(console)

    def show(seconds: float) -> None:
        log.show(escape(f"{text}, {seconds:.0f} s"), state=seconds // WAIT_SECONDS)

    yield show


@contextmanager
def live(console: Console, label: str) -> Iterator[Callable[[State, float | None], None]]:
    """A line that shows requests done, tokens/s, TTFT, KV use and the time left."""
    begin = time.monotonic()
    seen: list[float | None] = [None]

    def note(state: State, use: float | None) -> str:
        seen[0] = use if use is not None else seen[0]
        return _note(state, seen[0], time.monotonic() - begin)

    if is_live(console):
        with _bar(console) as bar:
            task = bar.add_task(escape(label), total=None, note="")
            yield lambda state, use: bar.update(
                task, total=state.total, completed=state.done, note=note(state, use)
            )
        return
    log = Log(console)

    def show(state: State, use: float | None) -> None:
        text = f"{escape(label)}: {state.done}/{state.total} {note(state, use)}"
        log.show(text, (state.done, state.running))

    console.print(f"{escape(label)}: starting", highlight=False, soft_wrap=True)
    yield show


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _note(state: State, use: float | None, seconds: float) -> str:
    parts = [f"{state.running} running"]
    if state.tokens:
        parts.append(f"{state.tokens / max(seconds, 1e-9):.1f} tok/s")
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
