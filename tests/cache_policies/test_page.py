from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs import packing
from cache_policies.pages.layout import PageLayout
from cache_policies.pages.plan import Plan
from cache_policies.policy import parse
from cache_policies.policy.layouts import layouts

POLICIES = (
    "raw", "fp16", "bf16", "int8", "flexgen-4bit(group=16)", "kivi-4bit(group=16)",
    "kivi-2bit(group=16,residual=32)", "kivi(k_bits=8,v_bits=2,group=16)", "rotated-4bit",
    "rotated-3bit", "rotated(k_bits=8,v_bits=2)",
)  # fmt: skip
# Largest error of a decoded standard normal value; half a quantization step of a group's range.
ERROR = {
    "raw": 0.0, "fp16": 2e-3, "bf16": 2e-2, "int8": 0.02, "flexgen-4bit(group=16)": 0.3,
    "kivi-4bit(group=16)": 0.3, "kivi-2bit(group=16,residual=32)": 1.3,
    "kivi(k_bits=8,v_bits=2,group=16)": 1.3,
    "rotated-4bit": 0.35, "rotated-3bit": 0.7, "rotated(k_bits=8,v_bits=2)": 1.6,
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_fields_do_not_overlap_and_fit(policy: str, head_size: int) -> None:
    layout = PageLayout(parse(policy).codec, head_size, 128, torch.float32)
    ends = [0]
    for field in layout.fields:
        assert layout.offsets[field.name] == ends[-1]
        ends.append(ends[-1] + field.num_bytes)
    assert ends[-1] <= layout.head_bytes
    assert layout.head_bytes % 128 == 0
    assert layout.ring_pages * layout.ring_tokens >= layout.codec.residual


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_decoding_restores_within_half_a_step(policy: str, head_size: int) -> None:
    torch.manual_seed(0)
    layout = PageLayout(parse(policy).codec, head_size, 128, torch.float32)
    views = layout.views(torch.zeros(2, layout.head_bytes, dtype=torch.uint8))
    key, value = torch.randn(2, 2, 128, head_size)
    layout.codec.write(views, 0, key, value)
    for written, read in zip((key, value), layout.codec.read(views, 128), strict=True):
        assert (written - read).abs().max() <= ERROR[policy]


@pytest.mark.parametrize("policy", POLICIES)
def test_writing_in_parts_equals_writing_at_once(policy: str) -> None:
    torch.manual_seed(0)
    layout = PageLayout(parse(policy).codec, 64, 128, torch.float32)
    step = layout.codec.residual or 1
    pages = torch.full((2, 2, layout.head_bytes), 255, dtype=torch.uint8)
    key, value = torch.randn(2, 2, 128, 64)
    layout.codec.write(layout.views(pages[0]), 0, key, value)
    for start in range(0, 128, step):
        span = slice(start, start + step)
        layout.codec.write(layout.views(pages[1]), start, key[:, span], value[:, span])
    used = sum(field.num_bytes for field in layout.fields)
    assert torch.equal(pages[0, :, :used], pages[1, :, :used])


@pytest.mark.parametrize(
    ("text", "residual"), [("kivi-2bit+layers(codec=fp16)", 128), ("raw+layers(codec=fp16)", 0)]
)
def test_layers_of_two_codecs_have_one_plan(text: str, residual: int) -> None:
    inner, edge = layouts(parse(text), 64, 128, torch.float32)
    assert Plan.of(inner) == Plan.of(edge)
    assert inner.residual == edge.residual == residual
    assert all(x.ring_pages * x.ring_tokens >= residual for x in (inner, edge))
    assert inner.head_bytes != edge.head_bytes
    with pytest.raises(PolicyError, match="residual 128 does not divide 32, that of other layers"):
        PageLayout(parse("kivi-2bit").codec, 64, 128, torch.float32, shared_residual=32)


def test_constant_groups_and_huge_values_stay_finite() -> None:
    layout = PageLayout(parse("kivi-2bit").codec, 64, 128, torch.float32)
    views = layout.views(torch.zeros(1, layout.head_bytes, dtype=torch.uint8))
    key = torch.full((1, 128, 64), 3.0)
    value = torch.full((1, 128, 64), 1e9)
    layout.codec.write(views, 0, key, value)
    read_key, read_value = layout.codec.read(views, 128)
    assert torch.equal(read_key, key)
    assert read_value.isfinite().all()


@settings(max_examples=25)
@given(
    bits=st.sampled_from((*packing.BITS, 3)),
    channels=st.sampled_from((64, 80, 96)),
    spans=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_packing_is_lossless(bits: int, channels: int, spans: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 32 * spans, channels), generator=rng, dtype=torch.uint8)
    assert torch.equal(packing.unpack_keys(packing.pack_keys(codes, bits), bits), codes)
    assert torch.equal(packing.unpack_values(packing.pack_values(codes, bits), bits), codes)
    planes = packing.pack_keys(codes, bits, torch.int16)
    assert planes.shape[2] * 16 == bits * packing.SPAN
    assert torch.equal(packing.unpack_keys(planes, bits), codes)


@pytest.mark.parametrize(
    ("policy", "head_size", "page_tokens", "dtype", "named"),
    [
        ("kivi-4bit", 80, 128, torch.float32, "group 32 does not divide head size 80"),
        ("kivi-4bit", 72, 128, torch.float32, "head size 72 is not one of"),
        ("kivi-4bit", 64, 48, torch.float32, "block size 48 is not a multiple of 32"),
        ("kivi-4bit", 64, 64, torch.float32, "residual 128 does not divide the block size 64"),
        ("raw", 64, 128, torch.float64, "model dtype torch.float64"),
    ],
)
def test_impossible_shapes_are_refused(
    policy: str, head_size: int, page_tokens: int, dtype: torch.dtype, named: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        PageLayout(parse(policy).codec, head_size, page_tokens, dtype)
    assert named in str(caught.value)
