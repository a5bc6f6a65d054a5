from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs import CODECS
from cache_policies.policy import parse, parse_method
from cache_policies.policy.layouts import is_edge
from cache_policies.retention import retention_methods
from cache_policies.retrieval import RETRIEVAL
from tests.cost import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Callable


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
        ("snappkv(budget=512)", "all, streaming-llm, h2o, snapkv"),
        ("", "allowed: raw, fp16"),
        ("KIVI", "allowed: raw, fp16"),
        ("kivi-4bit(", "is not name(key=value,...)"),
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
        ("snapkv(budget=0)", "budget=0 is not above sinks + window = 32"),
        ("knorm(budget=36)", "budget=36 is not above sinks + window = 36"),
        ("lagkv(budget=200)", "not above sinks + 2 lag = 260"),
        ("snapkv(ratio=1.5)", "ratio=1.5 is not above 0 and at most 1"),
        ("snapkv(ratio=0)", "ratio=0.0 is not above 0"),
        ("snapkv(ratio=nan)", "'ratio=nan' is not a number of at most 2147483647"),
        ("snapkv(kernel=9223372036854775807)", "is not a number of at most 2147483647"),
        ("expected-attention(future=65537)", "future=65537 is not between 1 and 65536"),
        ("expected-attention(epsilon=inf)", "is not a number of at most"),
        ("snapkv(ratio=half)", "key=number"),
        ("snapkv(ratio=0.5,budget=100)", "give either ratio or budget"),
        ("h2o(ratio=0.5,heavy=100)", "give either ratio or heavy"),
        ("h2o(heavy=0)", "heavy=0 or recent=512 is below 1"),
        ("streaming-llm(sinks=8)", "window is not given"),
        ("streaming-llm(window=0)", "window=0 below 1"),
        ("streaming-llm(window=64,positions=both)", "not one of original, cache"),
        ("snapkv(prefill=bounded)", "prefill=bounded is not one of full"),
        ("snapkv(interval=9)", "snapkv has no parameter 'interval'"),
        ("tova(interval=0)", "interval=0 is not between"),
        ("snapkv(heads=ragged)", "heads=ragged is not one of uniform, adaptive"),
        ("knorm(merge=keys)", "merge=keys is not one of nothing, values"),
        ("knorm(heads=adaptive)", "knorm has no parameter 'heads'"),
        ("snapkv(heads=adaptive)+quest", "snapkv(heads=adaptive) and quest cannot be combined"),
        ("snapkv(kernel=4)", "kernel=4 is not odd"),
        ("snapkv(pooling=sum)", "not one of avg, max"),
        ("infllm(topk=0)", "topk=0 is below 1"),
        ("infllm(repr_topk=99)", "repr_topk=99 is not between"),
        ("quest(prefill=bounded)", "prefill=bounded is not one of full"),
        ("snapkv+h2o", "cannot be combined"),
        ("snapkv+infllm+fp16", "snapkv and infllm cannot be combined"),
        ("snapkv+", "is not name(key=value,...)"),
        ("all(budget=3)", "unknown cache policy 'all'"),
        ("flexgen-4bit(group=128)", "group=128 is not one of (16, 32, 64)"),
        ("kivi-4bit+fp16", "only one codec"),
        ("kivi-4bit+layers+layers", "only one term 'layers'"),
        ("kivi-4bit+layers(first=0,last=0)", "first=0, last=0 names no layer"),
        ("kivi-4bit+layers(first=-1)", "names no layer"),
        ("kivi-4bit+layers(codec=kivi-5bit)", "codec=kivi-5bit is not one of raw, fp16"),
        ("kivi-4bit+layers(bits=8)", "it has: first=2, last=2, codec=fp16"),
        ("layers", "codec=fp16 is that of the other layers already"),
    ],
)
def test_refused_with_what_is_allowed(text: str, named: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert named in str(caught.value)


@pytest.mark.parametrize("wrong", [4, None, ["fp16"], {"codec": "fp16"}])
def test_not_a_string_is_refused(wrong: object) -> None:
    for read in (parse, parse_method):
        with pytest.raises(PolicyError, match="non-empty string"):
            read(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [" " * 200_000, f"h2o{' ' * 200_000}x", f"h2o({'heavy=1,' * 50_000})", [0] * 1_000_000],
    ids=["spaces", "spaces-within", "parameters", "no-string"],
)
def test_what_is_too_long_is_refused_at_once_and_not_repeated(wrong: object) -> None:
    def refuse(read: Callable[[Any], object]) -> None:
        with pytest.raises(PolicyError, match=r"at most 1000 are taken|non-empty string") as caught:
            read(wrong)
        assert len(str(caught.value)) < 1000

    assert cpu_seconds(lambda: refuse(parse)) < 0.1
    assert cpu_seconds(lambda: refuse(parse_method)) < 0.1


@pytest.mark.parametrize("name", [*retention_methods(), *RETRIEVAL])
@pytest.mark.parametrize("codec", list(CODECS))
def test_every_method_combines_with_every_codec(name: str, codec: str) -> None:
    policy = parse(f"{name}+{codec}")
    assert str(policy) == f"{name}+{codec}"
    assert parse(f" {codec} + {name} ") == policy
    assert policy.method == parse_method(name)
    assert policy.codec == parse(codec).codec


@pytest.mark.parametrize(
    "text",
    [
        "h2o(ratio=0.25,prefill=bounded)", "streaming-llm(sinks=8,window=100,positions=cache)",
        "infllm(topk=4,local=256)", "tova(interval=1,budget=77)", "pyramidkv(beta=4)",
        "snapkv(budget=512,heads=adaptive)",
    ],
)  # fmt: skip
def test_a_method_prints_what_differs_from_its_defaults(text: str) -> None:
    assert parse_method(str(parse_method(text))) == parse_method(text)


@pytest.mark.parametrize(
    "text",
    [
        "kivi-2bit+layers", "snapkv(budget=512)+kivi-2bit+layers(first=1,last=0)",
        "int8+layers(codec=kivi-4bit)",
    ],
)  # fmt: skip
def test_edge_layers_print_and_parse(text: str) -> None:
    policy = parse(text)
    assert str(policy) == text
    assert parse(str(policy)) == policy
    with pytest.raises(PolicyError, match=r"cannot choose .*whole server"):
        parse_method(text)


def test_edge_layers_are_counted_from_both_ends_and_must_leave_others() -> None:
    policy = parse("kivi-2bit+layers(first=1,last=2)")
    assert [is_edge(policy, layer, 5) for layer in range(5)] == [True, False, False, True, True]
    assert not is_edge(parse("kivi-2bit"), 0, 5)
    with pytest.raises(PolicyError, match=r"takes all of the model's 3 layers"):
        is_edge(policy, 0, 3)


def test_without_a_codec_tokens_are_float16() -> None:
    assert str(parse("snapkv(budget=512)")) == "snapkv(budget=512)+fp16"
    assert str(parse("all+int8")) == "int8"


def test_a_request_cannot_choose_the_codec() -> None:
    with pytest.raises(PolicyError, match=r"cannot choose the codec 'kivi-2bit'.*whole server"):
        parse_method("snapkv+kivi-2bit")


@pytest.mark.parametrize(
    ("text", "prompt", "kept"),
    [
        ("snapkv(budget=512)", 8000, 512), ("snapkv(ratio=0.25)", 8000, 2000),
        ("snapkv(ratio=0.001)", 8000, 33), ("h2o(heavy=100,recent=60)", 10, 160),
        ("h2o(ratio=0.5)", 101, 51), ("streaming-llm", 5000, 1024), ("lagkv(ratio=0.1)", 100, 261),
    ],
)  # fmt: skip
def test_budgets(text: str, prompt: int, kept: int) -> None:
    retention = parse_method(text).retention
    assert retention is not None
    assert retention.kept(prompt) == kept


def test_pyramid_budgets_fall_and_keep_their_mean() -> None:
    retention = parse_method("pyramidkv(budget=512)").retention
    assert retention is not None
    kept = [retention.kept(8000, layer, 30) for layer in range(30)]
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) / 30 == pytest.approx(512, abs=1)
    assert kept[-1] == 32 + 480 // 20
