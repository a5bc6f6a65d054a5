"""``kvthrift canary`` against the mock server, and what it takes for a loop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.commands.canary import items, read_lengths
from loadtest.commands.process import free_port
from loadtest.errors import LoadTestError
from loadtest.quality.loops import looped
from loadtest.sending.client import Target

if TYPE_CHECKING:
    from tests.loadtest.conftest import Command, MockServer

QUICK = {"ttft": 0.01, "itl": 0.001}
ONCE = ("--rounds", "1", "--lengths", "120")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("The quick brown fox jumps over the lazy dog.", 0.0),
        ("no no no no", 1.0),
        ("今天天气很好。" * 5, 1.0),
        ("abcdefghij" * 2, 0.0),  # twice is no loop yet
        ("xyz " + "abcdefghi " * 3 + "abcd", 1 - 3 / 38),
        ("It ends well, and then the and then the and then the and then", 0.79),
    ],
)
def test_a_loop_is_what_repeats_itself_up_to_the_end(text: str, share: float) -> None:
    assert looped(text) == pytest.approx(share, abs=0.02)


@given(st.text(max_size=40), st.text(min_size=1, max_size=20), st.integers(3, 6))
def test_what_is_repeated_is_found_whatever_stands_before(
    start: str, turn: str, times: int
) -> None:
    text = start + turn * times
    letters = " ".join(text.split())
    turned = " ".join((turn * times).split())
    assert 0.0 <= looped(text) <= 1.0
    if len(turned) > 3 * len(turn) - 3 and not turn[0].isspace() and not turn[-1].isspace():
        assert looped(text) >= len(turned) / len(letters) - 1e-9


def test_a_round_finds_the_keys_and_the_loop(mock: MockServer, kvthrift: Command) -> None:
    done = kvthrift("canary", mock(**QUICK), *ONCE, "--at-least", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    # the mock answers every key, and to a text says " word" all the time
    assert ": keys found 1.00, repeated 1.00, " in done.stdout


def test_failures_are_counted_and_end_above_0(mock: MockServer, kvthrift: Command) -> None:
    done = kvthrift("canary", mock(**QUICK, fault="500"), *ONCE)
    assert done.returncode == 1
    assert ": no answer, 3 failed (http_500: " in done.stdout
    assert "1 of 1 rounds: requests that failed\n" in done.stdout
    url = mock(**QUICK, fault="500", every=3)
    assert kvthrift("canary", url, *ONCE).returncode == 1


def test_the_gauges_are_served_and_a_server_that_goes_away_ends_nothing(mock: MockServer) -> None:
    port = free_port()
    where = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "canary", mock(**QUICK), "--every", "1"]
    process = subprocess.Popen([*command, "--lengths", "120", "--serve-metrics", where])

    def value(name: str) -> float | None:
        try:
            text = httpx.get(f"http://{where}/metrics", trust_env=False).text
        except httpx.HTTPError:
            return None
        found = [x for x in text.splitlines() if x.startswith(f'kvthrift_canary_{name}{{model="')]
        return float(found[0].rsplit(" ", 1)[1]) if found else None

    try:
        until = time.monotonic() + 60
        while (value("rounds_total") or 0) < 2:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert value("passkeys_found_ratio") == 1.0
        assert value("repetition_ratio") == 1.0
        assert value("failed_requests") == 0
        assert value("interval_seconds") == 1
        assert abs((value("last_round_timestamp_seconds") or 0) - time.time()) < 30
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_lengths() -> None:
    assert read_lengths(None, Target("u", "m")) == (500, 2000)
    assert read_lengths(None, Target("u", "m", longest=2048)) == (500,)
    assert read_lengths(None, Target("u", "m", longest=512)) == (209,)
    assert read_lengths("60|70", Target("u", "m", longest=512)) == (60, 70)
    assert read_lengths(None, Target("u", "m", longest=64)) == (32,)
    for text in ("", "a", "0", "10,20", "-5"):
        with pytest.raises(LoadTestError, match="--lengths"):
            read_lengths(text, Target("u", "m"))
    with pytest.raises(LoadTestError, match="the server takes 512 tokens"):
        read_lengths("400", Target("u", "m", longest=512))


def test_no_round_sends_what_another_sent() -> None:
    sent = [items((120, 200), seed) for seed in (1, 2)]
    begins = [item.prompt[:40] for keys, texts in sent for item in (*keys, *texts)]
    assert len(begins) == 12
    first = {item.prompt[:40] for item in (*sent[0][0], *sent[0][1])}
    second = {item.prompt[:40] for item in (*sent[1][0], *sent[1][1])}
    assert not first & second
