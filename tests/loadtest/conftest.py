"""A mock server per behaviour, in its own process, and the command run as a user would."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock as mock_module

import httpx
import pytest

from loadtest.commands.process import free_port
from server import cli

MockServer = Callable[..., str]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@contextlib.contextmanager
def running_mock(**options: Any) -> Iterator[str]:
    port = free_port()
    flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    command = [sys.executable, "-m", "loadtest.mock_server", "--port", str(port), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/v1/models")
                break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def mock() -> Iterator[MockServer]:
    """Start a mock server with these options and give its URL."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(running_mock(**options))


def run_command(*arguments: str) -> Done:
    """Run the command in this process, which is faster; gives status and both outputs."""
    output, errors = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock_module.patch.object(sys, "argv", ["kvthrift", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
    return Done(status, output.getvalue(), errors.getvalue())


@pytest.fixture
def kvthrift() -> Command:
    return run_command
