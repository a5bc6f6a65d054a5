from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_policies.codecs import CODECS
from cache_policies.errors import PolicyError
from cache_policies.policy import parse


@pytest.mark.parametrize("name", list(CODECS))
def test_every_name_parses_and_prints_back(name: str) -> None:
    assert str(parse(name)) == name


@given(
    k_bits=st.sampled_from((2, 4, 8)),
    v_bits=st.sampled_from((2, 4, 8)),
    group=st.sampled_from((16, 32, 64, 128)),
    factor=st.integers(1, 4),
)
def test_printed_policy_parses_to_an_equal_one(
    k_bits: int, v_bits: int, group: int, factor: int
) -> None:
    text = f"kivi( k_bits={k_bits}, v_bits={v_bits},group={group},residual={128 * factor} )"
    policy = parse(text)
    assert parse(str(policy)) == policy
    assert (policy.codec.k_bits, policy.codec.v_bits) == (k_bits, v_bits)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kivi-3bit", "allowed: raw, fp16"),
        ("snapkv(budget=512)", "allowed: raw, fp16"),
        ("", "allowed: raw, fp16"),
        ("KIVI", "allowed: raw, fp16"),
        ("kivi-4bit(", "name or name(key=value,...)"),
        ("kivi-4bit(budget=3)", "it has: group=32, residual=128"),
        ("kivi-4bit(k_bits=2)", "it has: group=32, residual=128"),
        ("fp16(group=32)", "it has: none"),
        ("kivi(k_bits=3)", "k_bits=3 is not one of (2, 4, 8)"),
        ("kivi-4bit(group=33)", "group=33 is not one of (16, 32, 64, 128)"),
        ("kivi-4bit(group=0)", "group=0 is not one of"),
        ("kivi-4bit(residual=0)", "residual=0 is not a positive multiple"),
        ("kivi-4bit(residual=-32)", "residual=-32 is not a positive multiple"),
        ("kivi-4bit(group=64,residual=96)", "residual=96 is not a positive multiple"),
        ("kivi-4bit(group=32,group=64)", "given twice"),
        ("kivi-4bit(group=x)", "key=whole number"),
        ("flexgen-4bit(group=128)", "group=128 is not one of (16, 32, 64)"),
        ("kivi-4bit+fp16", "only one codec"),
    ],
)
def test_refused_with_what_is_allowed(text: str, named: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert named in str(caught.value)


def test_not_a_string_is_refused() -> None:
    with pytest.raises(PolicyError, match="non-empty string"):
        parse(4)  # type: ignore[arg-type]
