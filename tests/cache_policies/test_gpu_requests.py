"""Whose rows a batch on a GPU's model runner has, and what is refused where vLLM does not say."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import vllm
from vllm import SamplingParams

from cache_policies.errors import PolicyError
from cache_policies.policy import parse_method
from cache_policies.vllm_plugin import frontend, rows
from cache_policies.vllm_plugin.config import refuse_method
from cache_policies.vllm_plugin.guard import PolicyGuard
from cache_policies.vllm_plugin.rows import Rows
from tests.cache_policies.gpu import HEADS, KV_HEADS, SIZE, batch, builder_of, layer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

pytestmark = pytest.mark.next


def test_a_dummy_batch_writes_nothing(config: VllmConfig) -> None:
    """V2's are of the null block, which windows beside our layers read and mask."""
    attention = layer(config, 0)
    layer(config, 1)
    builder = builder_of(attention, config)
    pages = torch.zeros(4, KV_HEADS, builder.plan.page_tokens, 96, dtype=torch.uint8)
    query, kv = torch.randn(300, HEADS, SIZE), torch.randn(300, KV_HEADS, SIZE)
    for fresh in ([1], [1] * 8, [300], [100, 200]):
        dummy = batch(fresh, fresh, list(range(len(fresh))), prefilling=False)
        metadata = builder.build(0, dummy)  # as ``InputBatch.make_dummy`` has them
        assert metadata is None
        count = sum(fresh)
        output = torch.full((count, HEADS, SIZE), float("nan"))
        attention.impl.forward(attention, query[:count], kv[:count], kv[:count], pages, metadata,
                               output)  # fmt: skip
        assert not output.any()
    assert not pages.any()
    assert builder.build(0, batch([1], [5], [0], prefilling=False)) is not None  # decodes
    assert builder.build(0, batch([1, 1], [1, 5], [0, 1], prefilling=False)) is not None


def test_a_batch_that_does_not_say_whose_rows_it_has_takes_no_states(config: VllmConfig) -> None:
    """As all of hybrid models: slot 0 is a real request's all the while."""
    attention = layer(config, 0)
    layer(config, 1)
    builder = builder_of(attention, config)
    extra = {"cache_policy": "snapkv(budget=100)"}
    builder.rows.take_slot(0, SamplingParams(extra_args=extra), 300)
    step = builder.build(0, batch([200], [200], [0])).step
    assert step is not None
    (state,) = step.states
    assert state is not None
    assert state.computed == 200
    known = state.layers[0]
    for hybrid in (batch([100], [300], None), batch([100], [100], None)):
        metadata = builder.build(0, hybrid)
        assert metadata is not None
        assert metadata.step is None
        assert metadata.batch is not None
        assert state.computed == 200
        assert state.layers[0] is known
    assert builder.build(0, batch([100], [300], [0])).step is not None
    assert state.computed == 300
    assert state.layers[0] is known


class Hybrid:
    """A model's configuration with the one answer that matters here."""

    is_hybrid = True

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def test_methods_on_hybrid_models_are_refused_on_v2_and_served_on_v1(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapkv, everything = parse_method("snapkv(budget=100)"), parse_method("all")
    refuse_method(snapkv, config)
    monkeypatch.setattr(config, "model_config", Hybrid(config.model_config))
    refuse_method(everything, config)
    with pytest.raises(PolicyError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        refuse_method(snapkv, config)
    # A request's is refused where vLLM makes an HTTP 400 of it.
    monkeypatch.setattr(frontend, "_engines", [config])
    extra = {"cache_policy": "snapkv(budget=100)"}
    with pytest.raises(ValueError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        PolicyGuard.validate_params(SamplingParams(extra_args=extra))
    PolicyGuard.validate_params(SamplingParams(extra_args={"cache_policy": "all"}))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    refuse_method(snapkv, config)


def test_every_model_state_of_vllm_says_whose_rows_a_batch_has_or_is_refused() -> None:
    silent = {
        "v1/worker/gpu/model_states/mamba_hybrid.py",  # methods are refused, see above
        "v1/worker/gpu/model_states/encoder_decoder.py",  # refused at start, as all that follow
        "v1/worker/gpu/spec_decode/speculator.py",
        "v1/worker/gpu/spec_decode/dflash/cudagraph.py",
        "model_executor/models/diffusion_gemma.py",
    }
    root, found, calls = Path(vllm.__file__).parent, set(), 0
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "build_attn_metadata(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "build_attn_metadata":
                calls += 1
                if "req_idx" not in {keyword.arg for keyword in node.keywords}:
                    found.add(path.relative_to(root).as_posix())
    assert found == silent
    assert calls > len(found)


class Table:
    """V2's, of which a processor sees the columns."""

    def __init__(self) -> None:
        self.prompt_len = object()
        self.slots = {"a": 0, "b": 1}

    def remove_request(self, req_id: str) -> int | None:
        return self.slots.pop(req_id, None)


def test_a_request_is_forgotten_when_its_slot_is_freed(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the slot is taken again, which after a burst may be never."""
    monkeypatch.setattr("vllm.v1.worker.gpu.states.RequestState", Table)
    config.additional_config = {"cache_policy": "fp16"}
    both = {name: Rows(config) for name in ("one", "other")}
    monkeypatch.setattr(rows, "_ROWS", both)
    tables = [Table(), Table()]
    for known, table in zip(both.values(), tables, strict=True):
        known.table = SimpleNamespace(prompt_len=table.prompt_len)
        for slot in (0, 1):
            known.take_slot(slot, SamplingParams(), 5)
    for _ in range(2):  # two engines of a process
        rows.forget_removed()
    assert tables[0].remove_request("b") == 1
    assert [{*known.row} for known in both.values()] == [{0}, {0, 1}]
    assert tables[0].remove_request("b") is None
    assert tables[1].remove_request("a") == 0
    assert [{*known.row} for known in both.values()] == [{0}, {1}]


def test_a_table_of_v2_frees_slots_where_we_listen() -> None:
    source = Path(vllm.__file__).parent / "v1/worker/gpu"
    states = (source / "states.py").read_text()
    assert "def remove_request(self, req_id: str) -> int | None:" in states
    assert "req_states.remove_request(" in (source / "model_runner.py").read_text()
