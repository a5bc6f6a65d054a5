"""What the tests of the C++ and of the Triton kernels both try; it needs neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from cache_policies.kernels.contract import Mass
from cache_policies.pages.codecs import CODECS

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch
    from tests.kernels.harness import Setup

POLICIES = (
    *CODECS,
    "flexgen-4bit(group=16)", "flexgen-4bit(group=64)", "kivi(k_bits=2,v_bits=4)",
    "kivi(k_bits=4,v_bits=2)", "kivi(k_bits=8,v_bits=8)", "kivi-4bit(group=16,residual=64)",
    "kivi-2bit(group=64)", "kivi-2bit(group=32,residual=32)", "kivi-2bit+layers(codec=raw)",
    "kivi-4bit+layers(codec=flexgen-4bit)", "int8+layers(codec=kivi-4bit)",
    "rotated(k_bits=4,v_bits=3)", "rotated(k_bits=3,v_bits=8)",
    "kivi-4bit+layers(codec=rotated-3bit)",
)  # fmt: skip
# Around the edges of octets, spans, rings and pages.
LENGTHS = st.one_of(
    st.sampled_from((0, 1, 7, 8, 31, 32, 33, 63, 64, 127, 128, 129, 255, 256, 257, 384)),
    st.integers(0, 500),
)
HELD = st.sampled_from([0, 1, 31, 127, 128, 129, 300, 512])  # by a request that is cut


def mass_of(setup: Setup, batch: Batch, first_query: list[int], first_token: list[int]) -> Mass:
    """Rooms of one buffer, with space between them."""
    held = batch.stored + batch.ring + batch.query_start.diff()
    behind = [int(held[i + 1 :].sum()) for i in range(len(held))]  # in another order
    place = torch.tensor([n + 7 * (len(held) - i) for i, n in enumerate(behind)])
    place = torch.where(torch.tensor(first_query) < 0, -1, place).int()
    columns = (torch.tensor(x, dtype=torch.int32) for x in (first_query, first_token))
    out = torch.full((setup.shape.num_kv_heads, int(held.sum()) + 40), 0.5)
    return Mass(*columns, place, out)
