"""Server-sent events to the letter of the HTML standard, however their bytes are cut."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.sending.sse import Event, EventParser


def read(data: bytes, cuts: list[int] | None = None) -> list[Event]:
    parser = EventParser()
    places = [0, *sorted(cuts or []), len(data)]
    found: list[Event] = []
    for begin, end in itertools.pairwise(places):
        found += parser.feed(data[begin:end])
    return found + list(parser.end())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        # the four examples of the standard
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event("YHOO\n+2\n10")]),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
            b"data:  third event\n",
            [Event("first event"), Event("second event")],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [Event(""), Event("\n")]),
        (b"data:test\n\ndata: test\n\n", [Event("test"), Event("test")]),
        # line ends of all three kinds, mixed
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\n", [Event("a"), Event("b"), Event("c")]),
        (b"data: a\r\n\ndata: b\n\r\n", [Event("a"), Event("b")]),
        # a byte-order mark is none of the first line, and is of any other
        (b"\xef\xbb\xbfdata: a\n\n", [Event("a")]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [Event("a")]),
        # comments, names, unknown fields, other fields' case
        (b":\n: ping\n\nevent: error\ndata: a\n\ndata: b\n\n", [Event("a", "error"), Event("b")]),
        (b"event: x\n\ndata: a\n\n", [Event("a")]),
        (b"retry: 1\nDATA: a\nother: b\ndata: c\n\n", [Event("c")]),
        # other line separators of Unicode are text
        ("data: a\u2028b\x0bc\x85d\n\n".encode(), [Event("a\u2028b\x0bc\x85d")]),
        (b"data: a\n\ndata: half", [Event("a")]),
        (b"data: a\n\ndata: whole line\n", [Event("a")]),
        # the end's mark needs no blank line, nor a line's end
        (b"data: [DONE]\n", [Event("[DONE]")]),
        (b"data:[DONE]", [Event("[DONE]")]),
        (b"data: [DONE]\n\n", [Event("[DONE]")]),
        (b"", []),
    ],
)
def test_events(data: bytes, found: list[Event]) -> None:
    assert read(data) == found
    assert read(data, list(range(len(data)))) == found  # byte by byte


@given(
    st.lists(
        st.sampled_from(
            ["data: ü", "data:", "data", ": c", "event: n", "data: [DONE]", "", "id: 1", "x"]
        ),
        max_size=12,
    ),
    st.lists(st.sampled_from(["\n", "\r", "\r\n"]), min_size=12, max_size=12),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
)
def test_cuts_change_nothing(
    lines: list[str], ends: list[str], cuts: list[int], marked: bool
) -> None:
    # a line's CR before an empty line's LF is one CRLF: keep what was meant apart
    text = "".join(a + b for a, b in zip(lines, ends, strict=False)).encode()
    data = (b"\xef\xbb\xbf" if marked else b"") + text
    assert read(data, [c for c in cuts if c < len(data)]) == read(data)


def test_a_long_line_costs_in_proportion_to_its_length() -> None:
    def seconds(parts: int) -> float:
        parser = EventParser()
        begin = time.process_time()
        for _ in range(parts):
            assert not list(parser.feed(b"x" * 1000))
        return time.process_time() - begin

    seconds(1000)
    # 16 MB in 1,000-byte reads; joining at every read would copy 128 GB
    assert seconds(16_000) < 2.0
