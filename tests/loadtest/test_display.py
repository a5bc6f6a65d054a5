"""What is printed where nobody looks at a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from loadtest.commands import display
from loadtest.sending.runner import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import MockServer


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_log_gets_a_line_every_few_seconds_and_says_so_when_nothing_happens() -> None:
    output, clock = io.StringIO(), Clock()
    log = display.Log(Console(file=output), clock)
    printed = []
    for second in range(121):
        clock.time = second
        done = min(second, 12)
        before = output.tell()
        log.show(f"{done} done", done)
        if output.tell() > before:
            printed.append(second)
    # every 5 s while there is progress, then every 30 s
    assert printed == [5, 10, 15, 45, 75, 105]


@pytest.mark.parametrize("forced", [False, True])
def test_a_run_into_a_file_shows_its_progress(
    mock: MockServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    code = (
        "from loadtest.commands import display; display.LOG_SECONDS = 0.2; "
        "from server.cli import main; main()"
    )
    work = ["-w", "synthetic(requests=12,input=fixed:10,output=fixed:10)", "--warmup", "0"]
    run = ["loadtest", mock(ttft=0.1, itl=0.01), *work, "-a", "closed(concurrency=2)",
           "--label", "[bold]x", "-o", str(tmp_path / "out")]  # fmt: skip
    with (tmp_path / "log").open("w") as file:
        subprocess.run([sys.executable, "-c", code, *run], stdout=file, check=True, timeout=300)
    text = re.sub(r"\x1b\[[0-9;]*m", "", (tmp_path / "log").read_text())
    assert "[bold]x: making prompts\n[bold]x: starting\n" in text
    lines = [x for x in text.splitlines() if re.match(r"\[bold\]x: \d+/12 \d running, ", x)]
    assert len(lines) >= 2, text
    assert "\x1b" not in text  # no line is drawn over in a file


def test_a_terminal_has_one_live_line(mock: MockServer, tmp_path: Path) -> None:
    url = mock(ttft=0.05, itl=0.005)
    ours, theirs = pty.openpty()
    work = ["-w", "synthetic(requests=6,input=fixed:10,output=fixed:10)", "--warmup", "0"]
    command = [sys.executable, "-m", "server", "loadtest", url, *work, "-o", str(tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    assert process.wait(300) == 0
    os.close(ours)
    assert b"6/6" in seen
    assert b"run: starting" not in seen


def test_waiting_says_what_for() -> None:
    output = io.StringIO()
    with display.waiting(Console(file=output, width=80), "[x]: starting the server") as note:
        note(1.0)
    assert output.getvalue() == "[x]: starting the server\n"


def test_the_note_of_a_run() -> None:
    state = Progress(total=4, done=2, errors=1, running=1, tokens=50, ttfts=[0.5, 1.5])
    text = display._note(state, 0.25, 10.0)
    assert text == (
        "1 running, 5.0 tok/s, TTFT 1.00 s, KV 25%, [red]1 failed[/red], about 10 s left"
    )
    assert display._note(Progress(total=4), None, 10.0) == "0 running"
