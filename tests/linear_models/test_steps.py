"""What vLLM's metadata of a step becomes, and what a layer refuses before it loads weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cache_policies.errors import PolicyError
from linear_models.limits import refuse_speculation
from linear_models.mamba1 import refuse_layer
from linear_models.steps import batch_of


def metadata(decodes: list[int], prefills: list[tuple[int, int, bool]]) -> Any:
    """Slots of requests that decode; length, slot and whether there is a state of the others."""
    ends = torch.tensor([0, *(n for n, *_ in prefills)]).cumsum(0).to(torch.int32)
    return SimpleNamespace(
        num_decodes=len(decodes),
        state_indices_tensor_d=torch.tensor(decodes, dtype=torch.int32)[:, None],
        num_prefills=len(prefills),
        query_start_loc_p=ends if prefills else None,
        state_indices_tensor_p=torch.tensor([s for _, s, _ in prefills], dtype=torch.int32),
        has_initial_states_p=torch.tensor([h for *_, h in prefills], dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("decodes", "prefills", "starts", "slots", "has_state"),
    [
        ([4, 2], [], [0, 1, 2], [4, 2], [True, True]),
        ([], [(5, 1, False), (3, 7, True)], [0, 5, 8], [1, 7], [False, True]),
        ([3], [(5, 1, False)], [0, 1, 6], [3, 1], [True, False]),
        ([0, 3], [], [0, 1, 2], [-1, 3], [True, True]),  # vLLM's null block holds no state
    ],
)
def test_decodes_come_first_as_requests_of_a_token(
    decodes: Any, prefills: Any, starts: list[int], slots: list[int], has_state: list[bool]
) -> None:
    step = metadata(decodes, prefills)
    made = batch_of(step)
    assert made.query_start.tolist() == starts
    assert made.slots.tolist() == slots
    assert made.has_state.tolist() == has_state
    assert made.query_start.dtype == made.slots.dtype == torch.int32
    assert batch_of(step) is made


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (("gelu", 4, 16), "activation 'gelu'"),
        (("silu", 9, 16), "a convolution over 9 tokens"),
        (("silu", 4, 257), "257 states of a channel"),
    ],
)
def test_a_layer_that_the_kernels_do_not_know_is_refused(layer: Any, named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        refuse_layer("backbone.layers.0.mixer", *layer)
    refuse_layer("backbone.layers.0.mixer", "silu", 4, 16)


def test_drafts_are_refused() -> None:
    model = SimpleNamespace(model="a folder")
    with pytest.raises(PolicyError, match="speculative decoding with a folder"):
        refuse_speculation(SimpleNamespace(speculative_config=object(), model_config=model))
    refuse_speculation(SimpleNamespace(speculative_config=None, model_config=model))
