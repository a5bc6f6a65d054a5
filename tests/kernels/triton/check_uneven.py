"""Heads that own unequal numbers of pages, in the Triton kernels, against the reference.

Run by ``test_triton`` in Triton's interpreter, and by ``make gpu-check`` on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_policies.pages.codecs import CODECS
from cache_policies.pages.codecs.packing import PLANES
from tests.kernels.triton.setup import ALL, DEVICE, Both, examples, on_device, there
from tests.kernels.uneven import HEADS, PAGE, Uneven, mass_of_first, nothing_fresh

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Mass

NAMES = list(CODECS) if ALL else ["int8", "flexgen-4bit", "kivi-4bit"]
# Pages of each head: none, all, the same.
FEW = ([0, 1, 2], [3, 0, 0], [1, 1, 1])
FULL = st.sampled_from((*FEW, [4, 2, 0], [1, 5, 0], [2, 3, 4]) if ALL else FEW)
TAIL = st.sampled_from([0, 5, 128, 170] if ALL else [5, 130])


def _there(mass: Mass) -> Mass:
    return replace(mass, out=mass.out.to(DEVICE))


@pytest.mark.parametrize("policy", NAMES)
@examples(2, 12)
@given(full=FULL, lead=st.integers(0, 2), tail=TAIL, fresh=st.sampled_from([1, 40]))
def test_attention_mass_and_appending(
    policy: str, full: list[int], lead: int, tail: int, fresh: int
) -> None:
    uneven = Uneven.make(policy, full, lead, tail, fresh, PLANES)
    batch, tokens, reads = uneven.batch(), uneven.tokens(), uneven.reads()
    masses = [mass_of_first(batch, HEADS) for _ in range(2)]
    masses[1] = _there(masses[1])
    both = Both(uneven.together, splits=2)
    options = [{"mass": mass, "reads": reads} for mass in masses]
    expected, got = both.attend(batch, tokens, *options)
    assert expected.isfinite().all(), "the test itself read what was never written"
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(masses[1].out.cpu(), masses[0].out, rtol=1e-2, atol=2e-3)
    for head, pages in enumerate(full):
        assert not masses[1].out[head, : (uneven.virtual - pages) * PAGE].any()
    assert torch.equal(*both.append(batch, *tokens[1:]))
    after = batch.after_append().row(0)
    held = both.reference.read(both.pages, after, *tokens[1:])
    found = both.triton.read(both.pages_there, on_device(after), *there(*tokens[1:]))
    torch.testing.assert_close([x.cpu() for x in found], list(held), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", NAMES)
@examples(2, 12)
@given(full=FULL, lead=st.integers(0, 2), tail=TAIL)
def test_what_is_written_is_read_back_and_no_other_page_is_touched(
    policy: str, full: list[int], lead: int, tail: int
) -> None:
    uneven = Uneven.make(policy, full, lead, tail, 1, PLANES)
    batch = nothing_fresh(uneven.batch())
    held = int(batch.stored + batch.ring)
    key, value = torch.randn(2, HEADS, held, 64, generator=torch.Generator().manual_seed(3))
    index = torch.arange(held, dtype=torch.int32).repeat(HEADS, 1)
    for head, pages in enumerate(full):
        index[head, : (uneven.virtual - pages) * PAGE] = -1
    both, none = Both(uneven.together), torch.empty(2, 0, HEADS, 64)
    both.reference.write(both.pages, batch, index, key.clone(), value.clone())
    both.triton.write(both.pages_there, on_device(batch), *there(index, key, value))
    assert torch.equal(both.pages_there.cpu(), both.pages)
    expected = both.reference.read(both.pages, batch, *none, index)
    got = both.triton.read(both.pages_there, on_device(batch), *there(*none, index))
    torch.testing.assert_close([x.cpu() for x in got], list(expected), rtol=1e-5, atol=1e-5)
    assert not got[0][there(index)[0] < 0].any()


def test_a_slot_map_that_does_not_fit_is_refused() -> None:
    uneven = Uneven.make("fp16", [1, 1, 1], 0, 5, 1, PLANES)
    both, batch, tokens = Both(uneven.together), uneven.batch(), uneven.tokens()[1:]
    assert batch.slots is not None
    for slots, match in ((batch.slots.long(), "slots: int32"), (batch.slots[:, :2], "slots: "),
                         (batch.slots.mT.contiguous().mT, "slots must be contiguous")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            both.triton.append(both.pages_there, on_device(replace(batch, slots=slots)),
                               *there(*tokens))  # fmt: skip
