"""Keys and passwords are in no message, record, report or plan."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import traceback
from typing import TYPE_CHECKING
from unittest import mock as patching

import pytest

from loadtest.commands.compare import Comparison
from loadtest.errors import LoadTestError
from loadtest.hide import hide, public_arguments, public_url, read_key
from loadtest.sending.client import Target
from tests.loadtest.answers import END, answered, delta
from tests.loadtest.test_command import QUICK, SMALL, summary
from tests.loadtest.test_compare import comparison

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Command, MockServer

KEY = "sesame-0pen"


def nowhere(folder: Path, text: str = KEY) -> bool:
    return not [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


@pytest.mark.parametrize("around", ["{}\n", " {} ", "{}\r\n", "\ufeff{}\n", "\t{}"])
def test_blanks_around_a_key_are_none_of_it(around: str) -> None:
    assert read_key(around.format(KEY), "x") == KEY
    assert read_key(around.format(""), "x") is None


@pytest.mark.parametrize("in_file", [False, True])
def test_a_key_with_a_line_end_is_sent_without(
    mock: MockServer,
    kvthrift: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_file: bool,
) -> None:
    file = tmp_path / "key"
    file.write_text(f"\ufeff{KEY}\r\n", encoding="utf-8")
    monkeypatch.setenv("OPENAI_API_KEY", "another" if in_file else f"{KEY}\n")
    more = ("--api-key-file", str(file)) if in_file else ()
    out = tmp_path / "out"
    url = mock(api_key=KEY, **QUICK)
    done = kvthrift("loadtest", url, *SMALL, *more, "-o", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert nowhere(out)
    assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "key", [f"{KEY}\nx", f"Bearer {KEY}", f"{KEY}ü", f"{KEY}\x00", f"{KEY}\x7f"]
)
def test_a_key_that_no_header_takes_is_refused_unseen(
    kvthrift: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    if "\x00" not in key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        done = kvthrift("loadtest", "http://127.0.0.1:9")
        assert (done.returncode, "OPENAI_API_KEY: " in done.stderr) == (2, True)
        assert KEY not in done.stdout + done.stderr
    done = kvthrift("loadtest", "http://127.0.0.1:9", "--api-key-file", str(file))
    assert (done.returncode, f"--api-key-file {file}: " in done.stderr) == (2, True)
    assert KEY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_files_that_hold_no_key(kvthrift: Command, tmp_path: Path) -> None:
    file = tmp_path / "key"
    for content, says in ((b"\n", "no key in it"), (b"\xff\xfe\x00", "not a text")):
        file.write_bytes(content)
        done = kvthrift("loadtest", "http://127.0.0.1:9", "--api-key-file", str(file))
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr


def test_a_server_that_repeats_the_key() -> None:
    body = b'data: {"error": "no such key: ' + KEY.encode() + b'"}\n\n'
    for parts in ([body], [delta(content=f"it is {KEY}"), END], [delta(reasoning=KEY), END]):
        record = answered(parts, api_key=KEY, keep_thinking=True)
        assert KEY not in repr(record)
        assert "***" in repr(record)
    # cut in the middle of the key, or a word of the answer
    long = b'data: {"error": "' + b"x" * 495 + KEY.encode() + b'"}\n\n'
    for data in (long, b"data: " + b"x" * 195 + KEY.encode() + b"\n\n"):
        assert KEY[:3] not in str(answered([data], api_key=KEY).error)
    assert answered([delta(content="is EMPTY"), END], api_key="EMPTY").answer == "is EMPTY"
    assert hide('a"b', 'a"b') == hide('a\\"b', 'a"b') == hide("a%22b", 'a"b') == "***"
    assert hide("text", None) == "text"


def test_secrets_of_a_command_line_and_of_urls(
    mock: MockServer, kvthrift: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = mock(**QUICK).replace("://", f"://user:{KEY}@")
    extra = f'{{"user": "x", "api_key": "{KEY}", "max_tokens": 5}}'
    metrics = f"{url}/metrics?token={KEY}"
    monkeypatch.setenv("OPENAI_API_KEY", "other-k3y")
    more = ("--extra-body", extra, "--metrics", metrics, "--label", "other-k3y")
    done = kvthrift("loadtest", url, *SMALL, *more, "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert KEY not in done.stdout + done.stderr
    assert nowhere(tmp_path)
    found = summary(tmp_path)
    assert found.server is not None
    assert found.setup.url == url.replace(f"user:{KEY}@", "")
    assert "other-k3y" not in found.setup.command
    for bad in (f"http://user:{KEY}@127.0.0.1:9", f"http://127.0.0.1:9/?api_key={KEY}",
                f"http://u:{KEY}@[x", f"nonsense://u:{KEY}@h"):  # fmt: skip
        for wait in ((), ("--wait", "0.1")):
            done = kvthrift("loadtest", bad, *wait)
            assert done.returncode == 4
            assert KEY not in done.stdout + done.stderr


def test_what_is_hidden() -> None:
    line = "x --api-key a b --hf-token=c --max-tokens 5 --tokenizer t --api-key-file f -p http://u:p@h/v"
    shown = shlex.join(public_arguments(line.split()))
    assert shown == (
        "x --api-key '***' '***' '--hf-token=***' --max-tokens 5 --tokenizer t --api-key-file f "
        "-p http://h/v"
    )
    assert (
        public_url("http://h:1/a?match=x&token=y&z=1#f") == "http://h:1/a?match=x&token=***&z=1#f"
    )
    assert public_url("http://h/a@b") == "http://h/a@b"


def test_no_traceback_shows_the_key() -> None:
    target = Target("http://h", "m", api_key=KEY)
    assert KEY not in repr(target)
    text = io.StringIO()
    with contextlib.suppress(ZeroDivisionError):
        try:
            _fail(target)
        except ZeroDivisionError:
            text.write(traceback.format_exc())
            raise
    assert KEY not in text.getvalue()
    # nor does the command print the variables of a traceback's frames
    from server.cli import app

    assert not app.pretty_exceptions_enable or not app.pretty_exceptions_show_locals


def _fail(target: Target) -> float:
    return len(target.headers) / 0


def test_a_comparisons_plan_holds_no_secret() -> None:
    made = comparison(["fp16"], flags=["--hf-token", KEY])
    assert KEY not in repr(made.plan)
    assert made.arguments(("m", None))[-2:] == ["--hf-token", KEY]
    for flags in (["--api-key", KEY], [f"--api-key={KEY}"]):
        with pytest.raises(LoadTestError, match="set VLLM_API_KEY") as refused:
            comparison(["fp16"], flags=flags)
        assert KEY not in str(refused.value)
    assert isinstance(made, Comparison)
    with patching.patch.object(sys, "argv", ["kvthrift", "--hf-token", KEY]):
        assert KEY not in shlex.join(public_arguments(sys.argv))
