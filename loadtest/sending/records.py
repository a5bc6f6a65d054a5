"""What is written down of each request: raw times, from which everything else is computed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from loadtest.errors import CANNOT_WRITE, LoadTestError
from loadtest.workloads.jsonl import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

OK = "ok"
ERROR = "error"
CANCELLED = "cancelled"


@dataclass
class Record:
    """One request. Times are monotonic seconds since the start of the run.

    Attributes:
        id, task, category, tags: of the workload's item.
        prompt_hash: sha256 of the prompt, twelve digits.
        scheduled: when it was due; in a closed loop, when its client became free.
        sent: when it was sent.
        events: times at which the stream brought tokens.
        event_tokens: tokens of each event, where the server says so (vLLM does).
        finished: when the stream ended.
        prompt_tokens, output_tokens: the server's counts; None: it gave none.
        cached_tokens: prompt tokens from the prefix cache, where the server says so.
        usage: the server's whole usage field.
        status: ``ok``, ``error`` or ``cancelled``.
        error_kind: e.g. ``http_429``, ``connect``, ``timeout``, ``stream_cut``, ``invalid_sse``.
        error: the message.
        finish_reason: the server's.
        thinking_at, answer_at: times of the first event that brought thinking, and answer.
        thinking_tokens: those of ``output_tokens`` that are thinking, where they can be told apart.
        thinking: its text, if it is kept.
        answer: what was generated, without the thinking.
        score: by the item's metric.
        partial: partial key score, for passkeys.

    """

    id: str
    task: str
    category: str
    prompt_hash: str
    tags: dict[str, float | str] = field(default_factory=dict)
    scheduled: float = 0.0
    sent: float = 0.0
    events: list[float] = field(default_factory=list)
    event_tokens: list[int] = field(default_factory=list)
    finished: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    usage: dict[str, Any] | None = None
    status: str = OK
    error_kind: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    thinking_at: float | None = None
    answer_at: float | None = None
    thinking_tokens: int | None = None
    thinking: str = ""
    answer: str = ""
    score: float | None = None
    partial: float | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token, be it thinking; None: not known."""
        return self.events[0] - self.sent if self.events else None

    @property
    def scheduled_ttft(self) -> float | None:
        """Seconds from when it was due to the first token: waiting on the client's side counts."""
        return self.events[0] - self.scheduled if self.events else None

    @property
    def first_answer(self) -> float | None:
        """Seconds from sending to the first token of the answer: thinking counts as waiting."""
        return None if self.answer_at is None else self.answer_at - self.sent

    @property
    def thought(self) -> bool:
        """Whether the model is known to have thought."""
        return self.thinking_at is not None or bool(self.thinking_tokens)

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last token, or to the end where no token's time is known."""
        return (self.events[-1] if self.events else self.finished) - self.sent

    @property
    def scheduled_e2e(self) -> float:
        """The same from when it was due."""
        return self.e2e + self.sent - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token after the first.

        None with fewer than two tokens, and where all came at the same time: then it is not known.
        """
        seconds = self.events[-1] - self.events[0] if self.events else 0.0
        later = self._shown_tokens - (self.event_tokens[0] if self.event_tokens else 1)
        return seconds / later if later > 0 and seconds > 0 else None

    @property
    def _shown_tokens(self) -> int:
        """Output tokens that events brought: thinking that a server counts but hides came in none.

        Where each event has its count, the first one that came has the hidden ones in it.
        """
        hidden = 0 if self.thinking_at is not None or self.event_tokens else self.thinking_tokens
        return (self.output_tokens or 0) - (hidden or 0)

    @property
    def itl(self) -> list[float]:
        """Seconds between events that brought tokens; none where all came at the same time."""
        if self.events and self.events[-1] == self.events[0]:
            return []
        return [b - a for a, b in pairwise(self.events)]

    def fail(self, kind: str, message: str) -> None:
        """Mark as failed; what came before the failure stays."""
        self.status, self.error_kind, self.error = ERROR, kind, message


class _Numbers(BaseModel):
    """Of a record, to check what is read back; texts may hold half a character."""

    model_config = ConfigDict(strict=True)

    scheduled: float = 0.0
    sent: float = 0.0
    events: list[float] = []
    event_tokens: list[NonNegativeInt] = []
    finished: float = 0.0
    prompt_tokens: NonNegativeInt | None = None
    output_tokens: NonNegativeInt | None = None
    cached_tokens: NonNegativeInt | None = None
    thinking_at: float | None = None
    answer_at: float | None = None
    thinking_tokens: NonNegativeInt | None = None
    score: float | None = None
    partial: float | None = None


class RecordFile:
    """``requests.jsonl``: a line per finished request, added at once.

    Raises:
        LoadTestError: it cannot be written, e.g. the disk is full.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _broken(path, error) from None

    def write(self, record: Record) -> None:
        """Add a record."""
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise _broken(self._path, error) from None

    def close(self) -> None:
        """Close the file; what could not be written was reported when it was tried."""
        try:
            self._file.close()
        except OSError as error:
            raise _broken(self._path, error) from None


def _line(record: Record) -> str:
    # ASCII: an answer may hold half a character, which no encoding takes
    return json.dumps(vars(record)) + "\n"


def _broken(path: Path, error: OSError) -> LoadTestError:
    return LoadTestError(f"cannot write {path}: {error.strerror}", CANNOT_WRITE)


def write_records(records: Iterable[Record], path: Path) -> None:
    """Write the whole file anew; the old one stays until the new one is complete.

    Raises:
        LoadTestError: it cannot be written.

    """
    new = path.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, records))
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise _broken(path, error) from None


def read_records(path: Path) -> list[Record]:
    """Read ``requests.jsonl`` back. A last line cut short, by a crash, is left out.

    Raises:
        LoadTestError: another line is broken; names file and line.

    """
    return list(iterate_records(path))


def iterate_records(path: Path) -> Iterator[Record]:
    """The same one by one, for who keeps only parts of them."""
    known = {f.name for f in fields(Record)}
    complete = path.read_bytes().count(b"\n")
    found = 0
    try:
        for number, row in read_jsonl(path):
            if not set(row) <= known or not {"id", "task", "category", "prompt_hash"} <= set(row):
                raise LoadTestError(f"{path}:{number}: not a record of this version")
            try:
                _Numbers.model_validate(row)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"]))
                raise LoadTestError(f"{path}:{number}: {field}: {first['msg']}") from None
            yield Record(**row)
            found += 1
    except LoadTestError:
        if found < complete:
            raise
