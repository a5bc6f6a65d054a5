"""How many tokens a page of ours holds beside layers of other kinds."""

from __future__ import annotations

import pytest

from cache_policies.vllm_plugin.kinds import Kinds

# bytes of a token in a layer with one KV head of 256: bfloat16, float32, kivi-4bit, int8
BF16, FP32, KIVI4, INT8 = 1024, 2048, 320, 516


@pytest.mark.parametrize(
    ("kinds", "ours", "tokens"),
    [
        (Kinds((0, 1, 2), 0, 0, 0, 0), KIVI4, 128),  # nothing else
        (Kinds((0, 1, 2), 0, 0, 9, 0), KIVI4, 128),  # constant states: vLLM chooses the block
        (Kinds((5, 11, 17), 15, 0, 0, BF16), KIVI4, 128),  # 960 of 1024 bytes are filled
        (Kinds((5, 11, 17), 15, 0, 0, FP32), KIVI4, 256),
        (Kinds((5,), 5, 0, 0, BF16), KIVI4, 384),
        (Kinds((3, 7, 11), 0, 9, 0, BF16), KIVI4, 384),  # chunked: layers share no block
        (Kinds((3, 7, 11), 0, 9, 0, BF16), INT8, 256),
        (Kinds((3, 7, 11), 0, 9, 0, BF16), BF16, 128),
    ],
)
def test_a_page_fills_nine_tenths_of_a_block(kinds: Kinds, ours: int, tokens: int) -> None:
    assert kinds.page_tokens(128, ours) == tokens


def test_only_windows_beside_our_layers_are_packed() -> None:
    assert Kinds((1,), 3, 0, 0, BF16).packed
    assert not Kinds((), 3, 0, 0, BF16).packed  # no policy
    assert not Kinds((1,), 3, 1, 0, BF16).packed
    assert not Kinds((1,), 0, 0, 3, 0).packed
