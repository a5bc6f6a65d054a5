"""Server-sent events, as the HTML standard (section 9.2.6) reads them from a stream of bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DONE = "[DONE]"
_END = re.compile(rb"\r\n|\n|\r")
_MARK = b"\xef\xbb\xbf"  # byte-order mark


@dataclass(frozen=True)
class Event:
    """An event.

    Attributes:
        data: its data lines, joined by line feeds.
        name: of its ``event`` field; empty: a message.

    """

    data: str
    name: str = ""

    @property
    def is_end(self) -> bool:
        """Whether it is OpenAI's mark of the end."""
        return self.data.strip() == DONE


class EventParser:
    """Reads events from parts of any size. Each byte is looked at once, however long a line is."""

    def __init__(self) -> None:
        self._line: list[bytes] = []  # parts of a line whose end has not come
        self._after_return = False
        self._first = True
        self._data: list[str] = []
        self._name = ""

    def feed(self, part: bytes) -> Iterator[Event]:
        """Yield the events that a part completes."""
        if self._after_return and part.startswith(b"\n"):  # the second half of a CRLF
            part, self._after_return = part[1:], False
        if not part:
            return
        self._after_return = part.endswith(b"\r")
        *lines, rest = _END.split(part)
        for line in lines:
            yield from self._end_line(line)
        self._line.append(rest)

    def end(self) -> Iterator[Event]:
        """The stream is over. An event without its blank line is none, but for the end's mark."""
        yield from (event for event in self._end_line(b"") if event.is_end)

    def _end_line(self, last: bytes) -> Iterator[Event]:
        self._line.append(last)
        line = b"".join(self._line)
        self._line.clear()
        if self._first:
            line, self._first = line.removeprefix(_MARK), False
        if not line:
            yield from self._dispatch()
            return
        field, _, value = line.partition(b":")  # a comment is a field without a name
        text = value.removeprefix(b" ").decode(errors="replace")
        if field == b"event":
            self._name = text
        elif field == b"data":
            self._data.append(text)
            # some servers send no blank line after the mark and keep the connection
            if len(self._data) == 1 and text.strip() == DONE:
                yield from self._dispatch()

    def _dispatch(self) -> Iterator[Event]:
        data, name = self._data, self._name
        self._data, self._name = [], ""
        if data:
            yield Event("\n".join(data), name)
