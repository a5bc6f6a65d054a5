"""How a worker finds the requests of a batch, from what each model runner tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.sample.logits_processor import BatchUpdate

from cache_policies.kernels.counts import Buffers
from cache_policies.vllm_plugin.builder import RingStoreMetadataBuilder
from cache_policies.vllm_plugin.guard import PolicyGuard
from cache_policies.vllm_plugin.rows import Rows
from cache_policies.vllm_plugin.spec import RingStoreSpec

CONFIG: Any = SimpleNamespace(
    additional_config={"cache_policy": "fp16"},
    cache_config=SimpleNamespace(num_gpu_blocks=100, enable_prefix_caching=True),
    model_config=SimpleNamespace(max_model_len=1024),
)


@pytest.fixture
def guard() -> PolicyGuard:
    """As on a V2 runner whose table has eight slots, all with prompts of 300 tokens."""
    guard = object.__new__(PolicyGuard)
    guard.rows = Rows(CONFIG)
    guard.table = SimpleNamespace(prompt_len=SimpleNamespace(np=np.full(8, 300)))
    return guard


def build(guard: PolicyGuard, slots: list[int], computed: list[int], fresh: list[int],
          *, dummy: bool = False) -> Any:  # fmt: skip
    spec = RingStoreSpec.of(
        FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.float32),
        "fp16", (0, 1), edge=False,
    )  # fmt: skip
    builder = object.__new__(RingStoreMetadataBuilder)
    assert guard.rows is not None
    builder.plan = guard.rows.plan = spec.plan
    builder.rows, builder.leads, builder.v2 = guard.rows, True, True
    builder.buffers = Buffers(torch.device("cpu"))
    guard.rows.layers = len(spec.layers)
    start = torch.tensor([0, *np.cumsum(fresh)], dtype=torch.int32)
    lengths = torch.tensor(computed, dtype=torch.int32) + torch.tensor(fresh, dtype=torch.int32)
    prefilling = [not dummy and n < 300 for n in computed]
    return builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=start, query_start_loc_cpu=start,
            seq_lens=torch.zeros_like(lengths),  # the device's; must not be read
            num_reqs=len(slots), num_actual_tokens=int(start[-1]), max_query_len=max(fresh),
            max_seq_len=1024, block_table_tensor=torch.ones(len(slots), 20, dtype=torch.int32),
            slot_mapping=torch.zeros(0), is_prefilling=torch.tensor(prefilling),
            seq_lens_cpu_upper_bound=lengths, req_idx=np.array(slots, dtype=np.int32),
        ),
    )  # fmt: skip


def sampling(method: str | None) -> SamplingParams:
    return SamplingParams(extra_args={"cache_policy": method} if method else None)


def test_a_slot_of_v2_has_the_method_and_prompt_of_its_request(guard: PolicyGuard) -> None:
    assert guard.add_request(5, sampling("snapkv(budget=100)")) is False  # changes no logits
    guard.add_request(2, sampling(None))
    step = build(guard, [2, 5], [0, 0], [300, 200]).step
    assert step is not None
    plain, state = step.states
    assert plain is None
    assert state is not None
    assert (str(state.method), state.span.prompt) == ("snapkv(budget=100)", 300)
    assert state.computed == 200
    guard.add_request(5, sampling("tova(budget=90)"))  # another request in the same slot
    step = build(guard, [5], [0], [300]).step
    assert step is not None
    assert str(step.states[0].method) == "tova(budget=90)"  # type: ignore[union-attr]


def test_a_dummy_batch_of_v2_touches_no_request(guard: PolicyGuard) -> None:
    guard.add_request(0, sampling("snapkv(budget=100)"))
    first = build(guard, [0], [0], [300]).step
    assert first is not None
    assert build(guard, [0, 1], [0, 0], [1, 1], dummy=True) is None
    assert first.states[0].computed == 300  # type: ignore[union-attr]
    assert build(guard, [0], [300], [1]).step is not None


def changed(
    added: tuple[Any, ...] = (), removed: tuple[int, ...] = (), moved: tuple[Any, ...] = ()
) -> BatchUpdate:
    return BatchUpdate(batch_size=2, added=added, removed=removed, moved=moved)


@pytest.mark.parametrize("anew", [False, True], ids=["its-list", "list-made-anew"])
def test_a_request_of_v1_that_sits_out_a_step_keeps_what_is_known_of_it(
    guard: PolicyGuard, *, anew: bool
) -> None:
    """Asynchronous scheduling makes its list of output tokens anew, where it has some."""
    build(guard, [1], [0], [1])  # the plan
    rows, params = guard.rows, sampling("snapkv(budget=100)")
    assert rows is not None
    output: list[int] = []
    rows.update(changed(added=((0, params, [7] * 300, output),)))
    state = rows.state(0)
    assert state is not None
    output.append(5)
    rows.update(changed(removed=(0,)))
    assert rows.state(0) is None
    if anew:
        output = [5]
    other = sampling("snapkv(budget=100)")
    back = ((0, other, [7] * 300, []), (1, params, [7] * 300, output))
    rows.update(changed(added=back))
    assert rows.state(1) is state
    assert rows.state(0) is not state
    rows.update(changed(removed=(0, 1)))
    del output, back
    rows.update(changed())
    assert not rows.away


def test_a_new_request_of_v1_takes_nothing_from_one_with_the_same_parameters(
    guard: PolicyGuard,
) -> None:
    """As the samples of one request are where the engine is in the same process."""
    build(guard, [1], [0], [1])
    rows, params = guard.rows, sampling("snapkv(budget=100)")
    assert rows is not None
    first: list[int] = []
    rows.update(changed(added=((0, params, [7] * 300, first),)))
    state = rows.state(0)
    rows.update(changed(removed=(0,), added=((0, params, [7] * 300, []),)))
    assert rows.state(0) is not state
