"""What an HTTP request asked for and what it held, where vLLM knows nothing of it.

A context variable goes from the middleware with the request through vLLM's handlers to the engine's
client, whatever route and whatever id: clients choose ids, and may choose the same one twice. Can
go when vLLM's streams carry ``kv_transfer_params`` and all its requests ``vllm_xargs``.
"""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMClientError, VLLMValidationError

from cache_policies.vllm_plugin.config import POLICY_KEY
from cache_policies.vllm_plugin.facts import KV_CACHE, KVCacheFacts
from cache_policies.vllm_plugin.versions import why_refused

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@dataclass
class Asked:
    """One HTTP request.

    Attributes:
        method: of the cache, for every sequence it generates; None: it did not say.
        facts: what those of its prompts held that have ended, in the order of their ends.
        beams: it searches beams, each step of which is a request to the engine: none is noted.
        refusal: why the engine refused one of its prompts before it had an output; None: it did
            not.

    """

    method: str | None = None
    facts: list[dict[str, Any]] = field(default_factory=list)
    beams: bool = False
    refusal: str | None = None

    def under(self, params: Any) -> Any:
        """Sampling parameters that carry the method, where they do not yet."""
        extra = params.extra_args or {}
        if self.method is None or POLICY_KEY in extra:
            return params
        params = params.clone()
        params.extra_args = {**extra, POLICY_KEY: self.method}
        return params

    async def noted(self, outputs: AsyncGenerator[Any], constant: int) -> AsyncGenerator[Any]:
        """The same outputs; with the last one goes a note of what was held.

        Args:
            outputs: of the engine for one prompt.
            constant: bytes of any request to a model without attention, else zero.

        Raises:
            VLLMValidationError: the engine refused the prompt, of which vLLM makes an HTTP 400.

        """
        lengths: Counter[int] = Counter()  # a stream's outputs have the tokens since the last
        begun = False
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if reason := why_refused(output):
                        raise VLLMValidationError(reason)
                    if constant:
                        lengths.update({o.index: len(o.token_ids) for o in output.outputs})
                    if output.finished and not self.beams:
                        held = constant and _constant_facts(output, max(lengths.values()), constant)
                        found = held or (output.kv_transfer_params or {}).get(KV_CACHE)
                        self.facts += [found] if found else []
                    begun = True
                    yield output
        except VLLMClientError as error:
            self.refusal = self.refusal if begun else str(error)
            raise


CURRENT: ContextVar[Asked | None] = ContextVar("kvthrift_asked", default=None)


def _constant_facts(output: Any, answer: int, constant: int) -> dict[str, Any]:
    """What the states of a request held at its end: as many bytes as at its beginning.

    Args:
        output: the last.
        answer: tokens, of the longest sequence.
        constant: bytes.

    """
    prompt = len(output.prompt_token_ids or ())
    return KVCacheFacts(
        policy="none", prompt_tokens=prompt, cached_tokens=output.num_cached_tokens or 0,
        computed_tokens=max(0, prompt + answer - 1), kept_tokens=0, pages=0, bytes=constant,
        compression_ratio=None,
    ).as_dict()  # fmt: skip


def watch(engine_client: Any, constant: int = 0) -> None:
    """Have every generation of a request come under its method, and note what it held.

    Args:
        engine_client: of this process.
        constant: bytes of any request to a model without attention, else zero.

    """
    generate = engine_client.generate

    def watched(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        asked = CURRENT.get()
        if asked is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        return asked.noted(
            generate(prompt, asked.under(sampling_params), *args, **kwargs), constant
        )

    engine_client.generate = watched
