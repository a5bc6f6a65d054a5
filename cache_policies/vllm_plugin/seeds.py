"""Seeded requests on vLLM's CPU runner.

A row whose prompt is not complete samples a token that is thrown away, and the V1 runner then
sets the row's generator back by its offset, which generators of a CPU do not have: ``get_offset``
raises, and the engine ends. Here such rows sample without their generator, which so stays put.
Can go when vLLM does not ask CPU generators for an offset.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.platforms import current_platform


def keep_generators_of_incomplete_prompts() -> None:
    """Change the V1 runner of this worker process, where it is a CPU's; once."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sample_tokens
    if getattr(original, "keeps_generators", False):
        return

    @wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        incomplete = self.discard_request_mask.np[: self.input_batch.num_reqs]
        aside = {row: generators.pop(row) for row in list(generators) if incomplete[row]}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(aside)

    sample_tokens.keeps_generators = True  # type: ignore[attr-defined]
    CPUModelRunner.sample_tokens = sample_tokens
