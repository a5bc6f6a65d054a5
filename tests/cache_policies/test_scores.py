"""What a score takes of memory: bounded by the size of the keys, not by what a request chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache_policies.errors import PolicyError
from cache_policies.policy import parse_method
from cache_policies.retention import near, r_kv
from cache_policies.retention.seen import QueryStatistics, Seen
from tests.cache_policies.worker import ROPE, SCALE, SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

KV_HEADS, GROUP, TOKENS = 8, 4, 2000
KEYS = (
    KV_HEADS * TOKENS * SIZE
)  # numbers of them; a copy for each query head has GROUP times as many


class Largest(TorchDispatchMode):  # type: ignore[misc]
    """Bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor):
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


def seen(recent: int) -> Seen:
    torch.manual_seed(0)
    keys, values = torch.randn(2, KV_HEADS, TOKENS, SIZE)
    queries = QueryStatistics(ROPE, SCALE)
    queries.add(torch.randn(TOKENS, KV_HEADS * GROUP, SIZE), 0)
    return Seen(
        position=torch.arange(TOKENS).expand(KV_HEADS, -1), mass=torch.zeros(KV_HEADS, TOKENS),
        end=TOKENS, prompt=TOKENS, layer=0, layers=1, load=lambda: (keys, values), queries=queries,
        recent=torch.randn(recent, KV_HEADS * GROUP, SIZE), scale=SCALE, rope=ROPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text", ["r-kv(window=512)", "r-kv", "expected-attention", "keydiff", "knorm", "lagkv"]
)
def test_a_score_copies_no_keys_for_every_query_head(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    retention = parse_method(text).retention
    assert retention is not None
    given = seen(retention.recent_queries)
    whole = retention.score(given)
    monkeypatch.setattr(r_kv, "AT_ONCE", 2**17)
    with Largest() as largest:
        score = retention.score(given)
        assert largest.bytes <= 2 * 4 * KEYS  # keys and values are made together
    torch.testing.assert_close(score, whole)


@pytest.mark.parametrize("chunk", [128, 300, 1024])
def test_attention_in_chunks_takes_the_memory_of_some_of_a_step(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = torch.randn(4000, 6, SIZE), torch.randn(4000, 2, SIZE)
    whole = near.NearAttention(chunk, SCALE)
    whole.add(query, key)
    monkeypatch.setattr(near, "AT_ONCE", 2**19)
    parts = near.NearAttention(chunk, SCALE)
    with Largest() as largest:
        parts.add(query, key)
        limit = 4 * max(2**19, query.numel())
        assert largest.bytes <= limit
    torch.testing.assert_close(parts.total(), whole.total())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("snapkv(kernel=131)", "kernel=131 is not odd and between 1 and 129"),
        ("pyramidkv(kernel=131)", "between 1 and 129"),
        ("r-kv(kernel=131)", "between 1 and 129"),
        ("r-kv(window=513)", "window=513 is not between 1 and 512"),
        ("compactor(chunk=4097)", "between 2 and 4096"),
    ],
)
def test_sizes_that_take_memory_or_time_have_bounds(text: str, named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        parse_method(text)
