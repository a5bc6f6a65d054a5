from __future__ import annotations

import pytest

from loadtest.passkey import NEEDLE, cases
from loadtest.scoring import exact_key, partial_key
from loadtest.scrape import KV_USE, labels, sample

GRID = ((60, 0.0), (60, 0.5), (60, 1.0))


def _words(texts: list[str]) -> list[int]:
    return [len(t.split()) for t in texts]


def test_cases_are_fixed_by_the_seed() -> None:
    first, again = (list(cases(_words, grid=GRID, seed=3)) for _ in range(2))
    assert first == again
    assert first != list(cases(_words, grid=GRID, seed=4))
    assert len(first) == 2 * 3 * 2


def test_the_needle_sits_once_at_its_depth() -> None:
    for case in cases(_words, grid=GRID, digits=(7,)):
        needle = NEEDLE.format(key=case.key)
        assert case.prompt.count(needle) == 1
        hay = case.prompt.split("\n")[1]
        position = hay.index(needle) / max(1, len(hay) - len(needle))
        assert position == pytest.approx(case.depth, abs=0.15)
        assert case.max_tokens > len(case.key)


@pytest.mark.parametrize(
    ("answer", "key", "exact", "partial"),
    [
        (" 1234567.", "1234567", 1, 1),
        ("1234 567", "1234567", 0, 4 / 7),
        ("", "12", 0, 0),
        ("ключ 12", "12", 1, 1),
        ("0000", "1111", 0, 0),
        ("99991111", "1111", 1, 1),
    ],
)
def test_scores(answer: str, key: str, exact: float, partial: float) -> None:
    assert exact_key(answer, key) == exact
    assert partial_key(answer, key) == pytest.approx(partial)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="empty key"):
        partial_key("x", "")


METRICS = """# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",kv_cache_size_tokens="33109"} 1.0
"""


def test_metrics_are_read_and_a_missing_one_is_not_a_zero() -> None:
    assert sample(METRICS, KV_USE) == 0.25
    assert sample(METRICS, "vllm:nothing") is None
    assert labels(METRICS, "vllm:cache_config_info")["kv_cache_size_tokens"] == "33109"
    with pytest.raises(KeyError):
        labels(METRICS, "vllm:nothing")
