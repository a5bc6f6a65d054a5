"""What an HTTP request asked for and what it held, where vLLM knows nothing of it.

A context variable goes from the middleware with the request through vLLM's handlers to the engine's
client, whatever route and whatever id: clients choose ids, and may choose the same one twice. Can
go when vLLM's streams carry ``kv_transfer_params`` and all its requests ``vllm_xargs``.
"""

from __future__ import annotations

from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cache_policies.vllm_plugin.config import POLICY_KEY
from cache_policies.vllm_plugin.facts import KV_CACHE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@dataclass
class Asked:
    """One HTTP request.

    Attributes:
        method: of the cache, for every sequence it generates; None: it did not say.
        facts: what those of its prompts held that have ended, in the order of their ends.
        beams: it searches beams, each step of which is a request to the engine: none is noted.

    """

    method: str | None = None
    facts: list[dict[str, Any]] = field(default_factory=list)
    beams: bool = False

    def under(self, params: Any) -> Any:
        """Sampling parameters that carry the method, where they do not yet."""
        extra = params.extra_args or {}
        if self.method is None or POLICY_KEY in extra:
            return params
        params = params.clone()
        params.extra_args = {**extra, POLICY_KEY: self.method}
        return params

    async def noted(self, outputs: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        """The same outputs; with the last one goes a note of what was held."""
        async with aclosing(outputs):
            async for output in outputs:
                params = output.kv_transfer_params if output.finished else None
                if params and KV_CACHE in params and not self.beams:
                    self.facts.append(params[KV_CACHE])
                yield output


CURRENT: ContextVar[Asked | None] = ContextVar("kvthrift_asked", default=None)


def watch(engine_client: Any) -> None:
    """Have every generation of a request come under its method, and note what it held."""
    generate = engine_client.generate

    def watched(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        asked = CURRENT.get()
        if asked is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        return asked.noted(generate(prompt, asked.under(sampling_params), *args, **kwargs))

    engine_client.generate = watched
