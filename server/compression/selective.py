"""Selective Context (arXiv 2310.06201): words the model could have guessed are dropped.

The self-information of a token is minus its log probability given what comes before it; here it
comes from the served model's own prompt log probabilities, so no further weights are needed. The
unit is the word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

from cache_policies.vllm_plugin.config import POLICY_KEY
from server.compression.base import Compressor, CompressorError, Word, mean_by_word

if TYPE_CHECKING:
    from collections.abc import Sequence


class SelectiveContext(Compressor):
    """A word's score is the mean self-information of its tokens.

    Args:
        engine: vLLM's engine client.

    """

    name: ClassVar[str] = "selective"

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def scores(self, text: str, words: Sequence[Word]) -> list[float]:
        tokenizer = self._engine.renderer.get_tokenizer()
        given = tokenizer(text, return_offsets_mapping=True)
        limit = self._engine.vllm_config.model_config.max_model_len
        count = len(given["input_ids"])
        if count >= limit:
            raise CompressorError(
                f"selective: the text has {count} tokens, the model reads {limit}; use llmlingua-2"
            )
        values = await self._self_information(given["input_ids"])
        return mean_by_word(words, given["offset_mapping"], values)

    async def _self_information(self, ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        extra = {POLICY_KEY: "all"} if self._has_policy else None
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, extra_args=extra
        )
        last = None
        request_id = f"selective-{uuid4().hex}"
        async for output in self._engine.generate({"prompt_token_ids": ids}, params, request_id):
            last = output
        assert last is not None
        found = last.prompt_logprobs
        # of the first token there is none: it stays
        values = [float("inf")]
        values += [-found[i][ids[i]].logprob for i in range(1, len(ids))]
        return values

    @property
    def _has_policy(self) -> bool:
        extra = self._engine.vllm_config.additional_config
        return isinstance(extra, dict) and POLICY_KEY in extra
