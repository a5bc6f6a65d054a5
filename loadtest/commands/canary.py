"""``kvthrift canary``: whether the model still finds what it was told, and whether it loops.

A cache that stores too little can spoil answers while every health check is green. Every few
minutes a few keys are hidden in new texts and asked for (passkeys), and the model goes on with a
text (repetition); what came out is there for Prometheus, whose alerts compare it with the day
before: small models fail sometimes, a change is what matters.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from loadtest.commands.exporter import served
from loadtest.errors import LoadTestError
from loadtest.quality import score
from loadtest.quality.loops import looped
from loadtest.sending.client import Client, new_record
from loadtest.workloads import Item
from loadtest.workloads.passkey import Passkey
from loadtest.workloads.text import Filler, sentences
from loadtest.workloads.tokens import ApproximateTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.sending.client import Target
    from loadtest.sending.records import Record

USUAL = (500, 2000)  # tokens of a text
DIGITS = 7
DEPTHS = (0.1, 0.9)
ANSWER = 200  # tokens of a text that goes on: a loop shows after a hundred
# greedy decoding makes small models loop whatever their cache holds
SAMPLED = {"temperature": 0.7}
SHARE = 0.8  # of what the server takes: tokens are counted roughly


@dataclass(frozen=True)
class Round:
    """What one round found.

    Attributes:
        found: share of the keys that the answers name; None: no answer came.
        repeated: mean share of an answer that its end takes by repeating itself.
        failed: requests that failed.
        why: of the first of them.
        seconds: it took.

    """

    found: float | None
    repeated: float | None
    failed: int
    why: str | None
    seconds: float

    def line(self, model: str) -> str:
        """For a log."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        parts = [
            "no answer" if self.found is None else f"keys found {self.found:.2f}",
            "" if self.repeated is None else f"repeated {self.repeated:.2f}",
            f"{self.failed} failed ({self.why})" if self.failed else "",
            f"{self.seconds:.1f} s",
        ]
        return f"{now} canary: {model}: {', '.join(filter(None, parts))}"


def read_lengths(text: str | None, target: Target) -> tuple[int, ...]:
    """Lengths as ``500|2000``; None: those of the usual ones that the server takes.

    Raises:
        LoadTestError: no lengths, or too long for the server.

    """
    room = int(SHARE * (target.longest or 1 << 30)) - ANSWER
    if text is None:
        return tuple(x for x in USUAL if x <= room) or (max(32, room),)
    parts = text.split("|")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise LoadTestError(f"--lengths {text!r} is not whole numbers with | between, as 500|2000")
    lengths = tuple(int(part) for part in parts)
    if max(lengths) > room:
        raise LoadTestError(
            f"--lengths {text}: the server takes {target.longest} tokens; with an answer of "
            f"{ANSWER}, and as texts are counted roughly, at most {room}"
        )
    return lengths


def items(lengths: Sequence[int], seed: int) -> tuple[list[Item], list[Item]]:
    """Passkeys, and texts to go on with; others for every seed, so that no cache holds them.

    Tokens are counted as four characters: a server that is away for a while stops no round.
    """
    tokenizer = ApproximateTokenizer()
    keys = Passkey(lengths=tuple(lengths), depths=DEPTHS, digits=(DIGITS,), texts=("noise",))
    found = [
        replace(item, prompt=f"Round {seed}. {item.prompt}", id=f"canary-{seed}-{item.id}")
        for item in keys.items(tokenizer, seed, None)
    ]
    filler = Filler(sentences("essay", f"canary-{seed}"), tokenizer)
    told = [
        Item(
            id=f"canary-{seed}-text-{length}", task="text", category="canary", max_tokens=ANSWER,
            prompt=" ".join(filler.sentences(length)),
        )
        for length in lengths
    ]  # fmt: skip
    return found, told


async def run_round(target: Target, keys: Sequence[Item], texts: Sequence[Item]) -> Round:
    """Send one request after the other, so that the server's users hardly notice."""
    begin = time.monotonic()
    asked = await _send(target, keys)
    told = await _send(replace(target, extra={**target.extra, **SAMPLED}), texts)
    scores = [score(i, r.answer) or 0.0 for i, r in zip(keys, asked, strict=True) if not _bad(r)]
    loops = [looped(r.answer) for r in told if not _bad(r)]
    failed = [r for r in (*asked, *told) if _bad(r)]
    return Round(
        found=_mean(scores),
        repeated=_mean(loops),
        failed=len(failed),
        why=f"{failed[0].error_kind}: {failed[0].error}" if failed else None,
        seconds=time.monotonic() - begin,
    )


async def _send(target: Target, what: Sequence[Item]) -> list[Record]:
    client = Client(target, time.monotonic())
    try:
        records = [new_record(item, 0.0) for item in what]
        for item, record in zip(what, records, strict=True):
            await client.send(item, record)
        return records
    finally:
        await client.close()


def _bad(record: Record) -> bool:
    return record.error_kind is not None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class Gauges:
    """``kvthrift_canary_*``, in a registry of their own."""

    def __init__(self, model: str, every: float) -> None:
        # late: `kvthrift serve` sets prometheus_client's mode before anything imports it
        from prometheus_client import CollectorRegistry, Counter, Gauge

        self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Any:
            made = Gauge(f"kvthrift_canary_{name}", text, ["model"], registry=self.registry)
            return made.labels(model)

        self._found = gauge("passkeys_found_ratio", "Keys that the last round's answers named.")
        self._repeated = gauge("repetition_ratio", "Of an answer, what its end repeats; mean.")
        self._failed = gauge("failed_requests", "Requests of the last round that failed.")
        self._seconds = gauge("round_seconds", "The last round took.")
        self._when = gauge("last_round_timestamp_seconds", "Its end, in seconds since 1970.")
        gauge("interval_seconds", "From one round to the next.").set(every)
        rounds = Counter("kvthrift_canary_rounds", "Rounds.", ["model"], registry=self.registry)
        self._rounds = rounds.labels(model)

    def show(self, done: Round) -> None:
        """Set them; of what no answer came the last value stays."""
        if done.found is not None:
            self._found.set(done.found)
        if done.repeated is not None:
            self._repeated.set(done.repeated)
        self._failed.set(done.failed)
        self._seconds.set(done.seconds)
        self._when.set(time.time())
        self._rounds.inc()


@contextmanager
def gauges(target: Target, every: float, where: str | None) -> Iterator[Gauges]:
    """The gauges; served on ``HOST:PORT``, if that is given.

    Raises:
        LoadTestError: not an address, or it is taken.

    """
    found = Gauges(target.model, every)
    with served(where, found.registry) if where else nullcontext():
        yield found


def watch(
    target: Target,
    lengths: Sequence[int],
    *,
    every: float,
    rounds: int,
    seed: int,
    show: Callable[[Round], None],
) -> list[Round]:
    """Rounds, one every so many seconds.

    Args:
        target: whom to ask.
        lengths: of the texts, in tokens.
        every: seconds from the beginning of a round to that of the next.
        rounds: how many; 0: until the process is told to stop.
        seed: of the first round; the next takes the next.
        show: called with each.

    """
    done: list[Round] = []
    while not rounds or len(done) < rounds:
        begin = time.monotonic()
        keys, texts = items(lengths, seed)
        found = asyncio.run(run_round(target, keys, texts))
        show(found)
        done = [*done, found] if rounds else []
        seed += 1
        if not rounds or len(done) < rounds:
            time.sleep(max(0.0, begin + every - time.monotonic()))
    return done
