from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from loadtest.errors import LoadTestError
from loadtest.measuring.goodput import Goals, highest_rate
from loadtest.measuring.scrape import (
    CACHE_CONFIG,
    KV_USE,
    PREEMPTIONS,
    PROMPT_TOKENS,
    RUNNING,
    USUAL,
    Sample,
    parse_metrics,
    read_samples,
    total,
    write_samples,
)
from loadtest.measuring.series import series
from loadtest.measuring.server_side import check_counters, server_side
from loadtest.measuring.summary import Setup, summarize
from loadtest.report.table import problems
from loadtest.sending.records import Record, RecordFile, read_records

if TYPE_CHECKING:
    from pathlib import Path


def record(sent: float = 0.0, **changed: object) -> Record:
    """Ten tokens: the first after 1 s, then one every 0.1 s."""
    events = [sent + 1 + 0.1 * i for i in range(10)]
    made = Record(
        id=f"r{sent}", task="t", category="c", prompt_hash="h", scheduled=sent - 0.5, sent=sent,
        events=events, event_tokens=[1] * 10, finished=events[-1], prompt_tokens=100,
        output_tokens=10, answer="x", score=1.0,
    )  # fmt: skip
    for name, value in changed.items():
        setattr(made, name, value)
    return made


SETUP = Setup(
    label="l", model="m", url="u", workload="w", workload_hash="h", arrivals="closed",
    arrivals_hash="h", concurrency=2, seed=0, endpoint="auto", started="s", command="c",
    kvthrift="0", machine="x",
)  # fmt: skip


def test_times_of_a_request() -> None:
    one = record()
    assert one.ttft == pytest.approx(1.0)
    assert one.scheduled_ttft == pytest.approx(1.5)
    assert one.tpot == pytest.approx(0.1)
    assert one.e2e == pytest.approx(1.9)
    assert one.itl == pytest.approx([0.1] * 9)
    # two tokens in an event: the mean per token is over tokens, not events
    assert record(event_tokens=[2] * 10, output_tokens=20).tpot == pytest.approx(0.9 / 18)
    assert record(events=[1.0], event_tokens=[1], output_tokens=1).tpot is None


def test_throughput_of_the_whole_and_of_the_steady_part() -> None:
    records = [record(float(t)) for t in range(4)]
    found = summarize(SETUP, records, [], planned=4)
    assert found.throughput is not None
    assert found.throughput.seconds == pytest.approx(3 + 1.9)
    assert found.throughput.output_tokens == pytest.approx(40 / 4.9)
    assert found.throughput.prompt_tokens == pytest.approx(400 / 4.9)
    assert found.steady is not None  # from the 2nd sending, at 1 s, to the last, at 3 s
    assert found.steady.seconds == pytest.approx(2.0)
    # tokens of the first request from 1.0 to 1.9, of the second from 2.0 to 2.9, the third's at 3
    assert found.steady.output_tokens == pytest.approx(21 / 2)


def test_failures_are_apart() -> None:
    failed = record(5.0, status="error", error_kind="http_500", events=[], score=None)
    found = summarize(SETUP, [record(), failed], [], planned=3, stopped="enough")
    assert (found.requests.ok, found.requests.errors) == (1, 1)
    assert found.latency.ttft is not None
    assert found.latency.ttft.count == 1
    assert found.get("latency.ttft.p50.value") == pytest.approx(1.0)
    assert found.get("server.kv_use_peak") is None


def test_an_empty_run_has_a_summary() -> None:
    found = summarize(SETUP, [], [], planned=3, stopped="at once", goals=Goals.parse("ttft:1s"))
    assert found.throughput is None
    assert found.latency.ttft is None
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_quality_is_the_mean_of_tasks_less_what_is_not_averaged() -> None:
    rows = [
        record(score=1.0), record(score=0.0), record(task="u", score=1.0),
        record(task="n", category="c, not averaged", score=0.0),
    ]  # fmt: skip
    quality = summarize(SETUP, rows, [], planned=4).quality
    assert quality is not None
    assert quality.overall == pytest.approx((0.5 + 1.0) / 2)
    assert quality.categories == {"c": 0.75, "c, not averaged": 0.0}
    task = next(t for t in quality.tasks if t.name == "t")
    assert (task.score.low, task.score.high) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert quality.overall_interval is not None
    low, high = quality.overall_interval
    assert 0 < low < 0.75 < high < 1  # "u" has one answer, which is not certainty


def test_the_mean_of_other_tasks_is_no_quality() -> None:
    """One policy's hard task timed out: it must not win by that."""
    rows = [record(score=0.9), record(task="hard", status="error", error_kind="timeout")]
    tasks = {("c", "t"), ("c", "hard")}
    found = summarize(SETUP, rows, [], planned=2, tasks=tasks)
    assert found.quality is not None
    assert (found.quality.overall, found.quality.overall_interval) == (None, None)
    assert found.quality.unanswered == ["hard"]
    assert any("none of these was answered: hard" in text for text in problems(found))
    kept = summarize(SETUP, rows, [], planned=2, tasks={("c", "t"), ("c, not averaged", "hard")})
    assert kept.quality is not None
    assert kept.quality.overall == 0.9


def test_heat_cells_are_means_by_length_and_depth() -> None:
    tags = {"length": 400, "depth": 0.5}
    rows = [record(score=s, tags=tags) for s in (1.0, 0.0)] + [record()]
    quality = summarize(SETUP, rows, [], planned=3).quality
    assert quality is not None
    assert [c.model_dump() for c in quality.heat] == [
        {"length": 400.0, "depth": 0.5, "score": 0.5, "requests": 2}
    ]


def test_goals() -> None:
    goals = Goals.parse("ttft:1.6s, tpot:100.1ms")
    assert goals.met(record())
    assert not Goals.parse("ttft:1.4s").met(record())  # counts from when it was due
    assert Goals.parse("e2e:2.5s").met(record())
    assert not Goals.parse("e2e:2.3s").met(record())  # this too: it waited half a second
    assert not goals.met(record(status="error"))
    for text in ("", "ttft", "ttft:2", "ttft:1s,ttft:2s"):
        with pytest.raises(LoadTestError):
            Goals.parse(text)


def test_the_highest_rate() -> None:
    assert highest_rate(lambda r: float(r <= 3), 0.1, 10, steps=12) == pytest.approx(3, rel=0.01)
    assert highest_rate(lambda _: 1.0, 1, 10) == 10
    assert highest_rate(lambda _: 0.0, 1, 10) is None


METRICS = """# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",kv_cache_size_tokens="33109"} 1.0
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="1.0"} 3.0
# TYPE kvthrift_tokens_dropped counter
kvthrift_tokens_dropped_total{policy="h2o"} 5.0
kvthrift_tokens_dropped_total{policy="snapkv"} 2.0
"""


def test_wanted_metrics_are_read_and_a_missing_one_is_not_a_zero(tmp_path: Path) -> None:
    samples = parse_metrics(METRICS, USUAL, 1.5, "s")
    assert total(samples, KV_USE) == 0.25
    assert total(samples, "kvthrift_tokens_dropped_total") == 7
    assert total(samples, "vllm:nothing") is None
    assert not [s for s in samples if "latency" in s.name]
    path = tmp_path / "metrics.csv"
    write_samples(samples, path)
    assert read_samples(path) == samples
    assert read_samples(tmp_path / "none.csv") == []


def sample(time: float, name: str, value: float, source: str = "a", **labels: str) -> Sample:
    return Sample(time, source, name, labels, value)


def test_the_servers_side_is_averaged_over_time() -> None:
    samples = [
        sample(0, KV_USE, 0.0), sample(0, RUNNING, 0), sample(0, PREEMPTIONS, 3),
        sample(1, KV_USE, 0.5), sample(1, RUNNING, 4),
        sample(4, KV_USE, 0.1), sample(4, RUNNING, 1), sample(4, PREEMPTIONS, 5),
        sample(4, CACHE_CONFIG, 1.0, kv_cache_size_tokens="33109"),
    ]  # fmt: skip
    found = server_side(samples, failed=2)
    assert found is not None
    assert found.kv_use_mean == pytest.approx(0.5 * 3 / 4)
    assert found.kv_use_peak == 0.5
    assert found.running_mean == pytest.approx(3.0)
    assert found.requests_that_fit == pytest.approx(3.0 / 0.375)
    assert (found.preemptions, found.capacity_tokens, found.failed_scrapes) == (2, 33109, 2)
    assert server_side([]) is None


def test_two_servers_are_added_where_both_were_read() -> None:
    samples = [
        sample(0, RUNNING, 1, "a"), sample(0.1, RUNNING, 10, "b"), sample(1, RUNNING, 2, "a"),
    ]  # fmt: skip
    assert series(samples, RUNNING) == [(0.1, 11.0), (1, 12.0)]


def test_counters_are_compared_unless_requests_failed() -> None:
    samples = [sample(0, PROMPT_TOKENS, 50), sample(9, PROMPT_TOKENS, 151)]
    (check,) = check_counters([record()], samples)
    assert (check.server, check.client, check.agree) == (101, 100, False)
    (check,) = check_counters([record(), record(status="error")], samples)
    assert check.agree is None


def test_records_come_back_and_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    file = RecordFile(path)
    rows = [record(1.0), record(2.0, answer="ключ\n")]
    for one in rows:
        file.write(one)
    file.close()
    assert read_records(path) == rows
    whole = path.read_text()
    path.write_text(whole[:-30])
    assert read_records(path) == rows[:1]
    path.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(LoadTestError, match=r"requests\.jsonl:1"):
        read_records(path)
    path.write_text('{"id": "x", "new_field": 1}\n')
    with pytest.raises(LoadTestError, match="not a record of this version"):
        read_records(path)


def test_what_came_at_one_time_has_no_time_per_token() -> None:
    def at_once(**changed: object) -> Record:
        return record(events=[1.0], finished=1.0, output_tokens=10, **changed)

    alike = [
        at_once(event_tokens=[]),
        at_once(event_tokens=[10]),
        record(events=[1.0] * 10),  # ten events in one read
        record(events=[], event_tokens=[]),  # an answer that was not streamed
    ]
    tight, loose = Goals.parse("tpot:1ms"), Goals.parse("ttft:9s,tpot:9s,e2e:9s")
    for one in alike:
        assert one.tpot is None
        assert tight.met(one) is None
        assert loose.met(one) is None
    assert not Goals.parse("tpot:9s,e2e:1ms").met(record(events=[1.0]))  # that much is known
    single = record(events=[1.0], event_tokens=[1], output_tokens=1)
    assert (single.tpot, tight.met(single)) == (None, True)  # there is no further token
    found = summarize(SETUP, [*alike[:3], record()], [], planned=4, goals=Goals.parse("tpot:9s"))
    assert found.latency.tpot is not None
    assert found.latency.tpot.count == 1
    assert found.goodput is not None
    assert (found.goodput.share, found.goodput.unknown) == (0.25, 3)
    assert "3 requests cannot be judged by the goals" in "".join(problems(found))
    none = summarize(SETUP, alike[:3], [], planned=3)
    assert (none.latency.tpot, none.get("latency.tpot.p50.value")) == (None, None)


def test_prompt_tokens_that_nobody_counted_are_no_zero() -> None:
    found = summarize(SETUP, [record(), record(1.0, prompt_tokens=None)], [], planned=2)
    assert found.throughput is not None
    assert found.throughput.prompt_tokens is None
    assert found.throughput.output_tokens > 0


def test_an_answer_that_came_whole_counts_where_it_ended() -> None:
    whole = record(events=[], event_tokens=[], finished=2.0)
    found = summarize(SETUP, [whole], [], planned=1)
    assert found.throughput is not None
    assert found.throughput.output_tokens == pytest.approx(10 / 2.0)
    assert found.latency.ttft is None
    assert found.latency.e2e is not None
    assert found.latency.e2e.p50.value == pytest.approx(2.0)


def test_thinking_has_a_row_of_its_own() -> None:
    thought = record(thinking_at=1.0, answer_at=1.5, thinking_tokens=5)
    found = summarize(SETUP, [thought, record(answer_at=1.0)], [], planned=2)
    assert (found.requests.thought, found.requests.thinking_tokens) == (1, 5)
    assert found.latency.first_answer is not None
    assert found.latency.first_answer.count == 2
    uncounted = summarize(SETUP, [record(thinking_at=1.0)], [], planned=1).requests
    assert (uncounted.thought, uncounted.thinking_tokens) == (1, None)
    plain = summarize(SETUP, [record(answer_at=1.0)], [], planned=1)
    assert plain.latency.first_answer is None


def test_drawings_of_groups_are_those_of_values_written_out() -> None:
    import numpy as np

    from loadtest.measuring import estimates

    rng = np.random.default_rng(1)
    groups = [rng.exponential(1, int(n)).round(2) for n in rng.integers(1, 40, 30)]
    found = estimates._resampled(groups)
    picks = np.random.default_rng(estimates.SEED).integers(30, size=(estimates.RESAMPLES, 30))
    for index in (0, 7, 499):
        written = np.concatenate([groups[i] for i in picks[index]])
        known = [written.mean(), *np.percentile(written, estimates.PERCENTILES)]
        assert found[:, index] == pytest.approx(known)
