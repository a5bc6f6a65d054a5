"""``summary.json``: everything a report shows, computed from the raw records and samples."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from loadtest.measuring.estimates import Distribution, distribution
from loadtest.measuring.scores import Quality, quality
from loadtest.measuring.server_side import Check, ServerSide, server_side
from loadtest.sending.records import OK

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from loadtest.measuring.goodput import Goals
    from loadtest.measuring.scrape import Sample
    from loadtest.sending.records import Record


class Setup(BaseModel):
    """What was run.

    Attributes:
        label: name of the row in a comparison.
        policy: cache policy, where known.
        arrivals, workload: canonical spelling; their hashes name the very schedule and prompts.
        extra_hash: of what was added to each request's body.
        concurrency: of a closed loop; rate: requests per second offered by an open one.

    """

    label: str
    model: str
    url: str
    policy: str | None = None
    workload: str
    workload_hash: str
    arrivals: str
    arrivals_hash: str
    concurrency: int | None = None
    rate: float | None = None
    seed: int
    endpoint: str
    extra_hash: str = ""
    started: str
    command: str
    kvthrift: str
    machine: str


class Requests(BaseModel):
    """How requests ended; latencies hold only those that are ``ok``.

    Attributes:
        prompt_tokens: mean of those that are ok; None where the server did not count all.
        thought: of those that are ok, requests whose model thought before it answered.
        thinking_tokens: of these; None where they are not counted apart.

    """

    planned: int
    ok: int
    errors: int
    cancelled: int
    by_error: dict[str, int]
    by_finish_reason: dict[str, int]
    empty_answers: int
    prompt_tokens: float | None = None
    thought: int = 0
    thinking_tokens: int | None = None


class Latency(BaseModel):
    """Seconds.

    Attributes:
        ttft: sending to first token; scheduled_ttft: due to first token. Thinking is tokens too.
        first_answer: sending to first token of the answer; None where no model thought.
        tpot: per token after the first; itl: between events with tokens; e2e: sending to the end.
        queueing: due to sending, on the client's side.

    """

    ttft: Distribution | None
    scheduled_ttft: Distribution | None
    first_answer: Distribution | None = None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    queueing: Distribution | None
    tokens_per_event: float | None


class Throughput(BaseModel):
    """Per second, over a stretch of the run; prompt tokens count when the first token comes.

    ``prompt_tokens`` is None where the server did not count those of every request.
    """

    seconds: float
    requests: float
    prompt_tokens: float | None
    output_tokens: float


class Goodput(BaseModel):
    """Requests that met the goals; those that cannot be judged (``unknown``) are not among them."""

    goals: dict[str, float]
    share: float
    requests_per_second: float
    unknown: int = 0


class Summary(BaseModel):
    """One run. Times are seconds, sizes bytes, shares 0 to 1."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    setup: Setup
    stopped: str | None
    requests: Requests
    latency: Latency
    throughput: Throughput | None
    steady: Throughput | None
    goodput: Goodput | None
    quality: Quality | None
    server: ServerSide | None
    checks: list[Check]

    def get(self, path: str) -> Any:
        """A number by its path, e.g. ``latency.ttft.p50.value``; None where a part is missing."""
        found: Any = self
        for name in path.split("."):
            found = None if found is None else getattr(found, name)
        return found

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def summarize(
    setup: Setup,
    records: list[Record],
    samples: list[Sample],
    *,
    planned: int,
    stopped: str | None = None,
    goals: Goals | None = None,
    failed_scrapes: int = 0,
    checks: list[Check] | None = None,
    tasks: Collection[tuple[str, str]] = (),
) -> Summary:
    """Compute the summary of a run from what was written down; ``tasks``: see ``quality``."""
    good = [r for r in records if r.status == OK]
    whole = _whole(good, records)
    return Summary(
        setup=setup,
        stopped=stopped,
        requests=_requests(records, planned),
        latency=_latency(good),
        throughput=whole,
        steady=_steady(good, records, setup.concurrency),
        goodput=_goodput(records, goals, whole),
        quality=quality(good, tasks),
        server=server_side(samples, failed_scrapes),
        checks=checks or [],
    )


def _requests(records: list[Record], planned: int) -> Requests:
    states = Counter(r.status for r in records)
    thought = [r for r in records if r.status == OK and r.thought]
    tokens = [r.thinking_tokens for r in thought]
    read = [r.prompt_tokens for r in records if r.status == OK and r.prompt_tokens is not None]
    return Requests(
        planned=planned,
        ok=states[OK],
        errors=states["error"],
        cancelled=states["cancelled"],
        by_error=dict(Counter(r.error_kind for r in records if r.error_kind)),
        by_finish_reason=dict(Counter(r.finish_reason for r in records if r.finish_reason)),
        empty_answers=sum(r.status == OK and not r.answer.strip() for r in records),
        prompt_tokens=sum(read) / len(read) if read and len(read) == states[OK] else None,
        thought=len(thought),
        thinking_tokens=None if None in tokens or not thought else sum(t or 0 for t in tokens),
    )


def _latency(good: list[Record]) -> Latency:
    events = sum(len(r.event_tokens) for r in good)
    thought = any(r.thought for r in good)
    return Latency(
        ttft=_known(r.ttft for r in good),
        scheduled_ttft=_known(r.scheduled_ttft for r in good),
        first_answer=_known(r.first_answer for r in good) if thought else None,
        tpot=_known(r.tpot for r in good),
        itl=distribution([r.itl for r in good]),
        e2e=_known(r.e2e for r in good),
        queueing=_known(r.sent - r.scheduled for r in good),
        tokens_per_event=sum(sum(r.event_tokens) for r in good) / events if events else None,
    )


def _known(values: Iterable[float | None]) -> Distribution | None:
    return distribution([[v] for v in values if v is not None])


def _whole(good: list[Record], records: list[Record]) -> Throughput | None:
    """From the first sending to the last end, failed requests' included."""
    if not good:
        return None
    return _between(good, min(r.sent for r in records), max(r.finished for r in records))


def _steady(
    good: list[Record], records: list[Record], concurrency: int | None
) -> Throughput | None:
    """Of a closed loop, from when all clients are busy to the last sending: no start, no tail."""
    if concurrency is None:
        return None
    sent = sorted(r.sent for r in records)
    first = concurrency - 1
    if len(sent) <= first + 1 or sent[-1] - sent[first] < 1.0:
        return None
    return _between(good, sent[first], sent[-1])


def _between(good: list[Record], begin: float, end: float) -> Throughput:
    seconds = max(end - begin, 1e-9)
    prompt = output = 0.0
    done = 0
    for r in good:
        done += begin <= r.finished <= end
        # of an answer that came whole only the end is known
        times = r.events or [r.finished]
        if begin <= times[0] <= end:
            prompt += r.prompt_tokens or 0
        even = (r.output_tokens or 0) / len(times)
        each: Sequence[float] = r.event_tokens or [even] * len(times)
        output += sum(n for t, n in zip(times, each, strict=True) if begin <= t <= end)
    return Throughput(
        seconds=seconds,
        requests=done / seconds,
        prompt_tokens=None if any(r.prompt_tokens is None for r in good) else prompt / seconds,
        output_tokens=output / seconds,
    )


def _goodput(
    records: list[Record], goals: Goals | None, whole: Throughput | None
) -> Goodput | None:
    if goals is None or not records:
        return None
    verdicts = Counter(goals.met(r) for r in records)
    return Goodput(
        goals=goals.limits,
        share=verdicts[True] / len(records),
        requests_per_second=verdicts[True] / whole.seconds if whole else 0.0,
        unknown=verdicts[None],
    )
