"""What holds for every workload of the registry: a new one is tested unnamed."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.errors import LoadTestError
from loadtest.quality import METRICS, score
from loadtest.workloads import WORKLOADS, hash_items, parse_workload
from loadtest.workloads.tokens import ApproximateTokenizer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "loadtest.md").read_text(encoding="utf-8")
TOKENIZER = ApproximateTokenizer()


@pytest.mark.parametrize("kind", WORKLOADS)
def test_it_is_explained_and_spelled(kind: str) -> None:
    assert WORKLOADS[kind].about
    assert f"`{kind}" in DOCUMENT
    workload = parse_workload(kind)
    assert parse_workload(str(workload)) == workload


MADE = [kind for kind in WORKLOADS if kind not in {"longbench", "trace"}]  # those want data


@pytest.mark.parametrize("kind", MADE)
def test_its_requests_are_whole_and_a_seed_fixes_them(kind: str) -> None:
    workload = parse_workload(kind)
    items = workload.items(TOKENIZER, 1, None)
    assert items
    assert hash_items(items) == hash_items(workload.items(TOKENIZER, 1, None))
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert item.prompt.strip()
        assert item.max_tokens > 0
        if item.metric is not None:
            assert item.metric in METRICS
            assert score(item, " ".join(item.references)) == pytest.approx(1.0)
            assert score(item, "") == 0.0


@pytest.mark.parametrize(("kind", "parameter"), [("longbench", "folder"), ("trace", "file")])
def test_data_that_is_not_there_is_named(kind: str, parameter: str) -> None:
    with pytest.raises(LoadTestError, match="not-there"):
        parse_workload(f"{kind}({parameter}=/not-there)").items(TOKENIZER, 1, None)
