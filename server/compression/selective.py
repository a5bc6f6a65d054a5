"""Selective Context (arXiv 2310.06201): words the model could have guessed are dropped.

The self-information of a token is minus its log probability given what comes before it; here it
comes from the served model's own prompt log probabilities, so no further weights are needed. The
unit is the word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

from cache_policies.vllm_plugin.config import POLICY_KEY
from cache_policies.vllm_plugin.versions import why_refused
from server.compression.base import Compressor, CompressorError, Word, mean_by_word

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.compression.served import ServedTokenizer

# on average; in scripts without spaces a letter is a word, and a token may have several
MOST_WORDS_PER_TOKEN = 4


class SelectiveContext(Compressor):
    """A word's score is the mean self-information of its tokens.

    Args:
        engine: vLLM's engine client.
        tokenizer: of the served model.

    """

    name: ClassVar[str] = "selective"

    def __init__(self, engine: Any, tokenizer: ServedTokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        length = engine.vllm_config.model_config.max_model_len
        self.most_letters = length * tokenizer.most_letters_per_token
        self.most_words = length * MOST_WORDS_PER_TOKEN

    async def scores(self, text: str, words: Sequence[Word]) -> list[float]:
        ids, spans = await self._tokenizer.encode(text, special=True)
        limit = self._engine.vllm_config.model_config.max_model_len
        if len(ids) >= limit:
            raise CompressorError(
                f"selective: the text has {len(ids)} tokens, the model reads {limit}; "
                "use llmlingua-2"
            )
        return mean_by_word(words, spans, await self._self_information(ids))

    async def _self_information(self, ids: list[int]) -> list[float]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        extra = {POLICY_KEY: "all"} if self._has_policy else None
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, extra_args=extra
        )
        last = None
        request_id = f"selective-{uuid4().hex}"
        try:
            prompt = {"prompt_token_ids": ids}
            async for output in self._engine.generate(prompt, params, request_id):
                last = output
        except VLLMClientError as error:  # 0.33's way to say that the scheduler refuses it
            raise CompressorError(f"selective: {error}") from None
        assert last is not None
        if reason := why_refused(last):
            raise CompressorError(f"selective: {reason}")
        found = last.prompt_logprobs
        # of the first token there is none: it stays
        values = [float("inf")]
        values += [-found[i][ids[i]].logprob for i in range(1, len(ids))]
        return values

    @property
    def _has_policy(self) -> bool:
        extra = self._engine.vllm_config.additional_config
        return isinstance(extra, dict) and POLICY_KEY in extra
