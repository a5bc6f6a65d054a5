"""What `vllm_plugin/hosts.py` takes from vLLM's executors and could lose without a word."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cache_policies.vllm_plugin.hosts import MONITORS


def test_the_threads_that_watch_workers_have_the_names_that_we_look_for() -> None:
    for module, name in zip(("multiproc_executor", "ray_executor_v2"), MONITORS, strict=True):
        found = find_spec(f"vllm.v1.executor.{module}")
        assert found is not None
        assert found.origin is not None
        assert f'name="{name}"' in Path(found.origin).read_text(encoding="utf-8")
