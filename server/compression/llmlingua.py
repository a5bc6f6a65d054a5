"""LLMLingua-2 (arXiv 2403.12968): a token classifier says which words matter."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

from server.compression.base import Compressor, CompressorError, Word, mean_by_word

if TYPE_CHECKING:
    from collections.abc import Sequence

KEEP = 1  # index of the class "keep" in the published classifiers
BATCH = 4


class LLMLingua2(Compressor):
    """A word's score is the mean probability, over its sub-tokens, that they are kept.

    Args:
        model: folder or hub name of a token classifier with two classes.

    Raises:
        CompressorError: it cannot be loaded, or is something else.

    """

    name: ClassVar[str] = "llmlingua-2"
    most_letters = 1_000_000  # of English a quarter as many tokens
    most_words = 250_000

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, use_fast=True)
            self._model: Any = AutoModelForTokenClassification.from_pretrained(model).eval()
        except (OSError, ValueError) as error:
            raise CompressorError(f"--prompt-compressor {model}: {error}") from None
        if self._model.config.num_labels != 2 or not self._tokenizer.is_fast:
            raise CompressorError(
                f"--prompt-compressor {model}: no classifier of two classes with a fast tokenizer"
            )
        longest = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        # RoBERTa's positions begin after its padding index
        self._window = int(longest) - self._tokenizer.num_special_tokens_to_add() - 2
        # One at a time, for it uses the engine's cores; whoever leaves does not let the next begin.
        self._thread = ThreadPoolExecutor(1, "kvthrift-llmlingua")

    async def scores(self, text: str, words: Sequence[Word]) -> list[float]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._scores, text, words)

    def _scores(self, text: str, words: Sequence[Word]) -> list[float]:
        found: list[float] = []
        chunks = self._chunks(text, words)
        for begin in range(0, len(chunks), BATCH):
            batch = chunks[begin : begin + BATCH]
            for chunk, scores in zip(batch, self._classify(text, batch), strict=True):
                assert len(chunk) == len(scores)
                found += scores
        return found

    def _chunks(self, text: str, words: Sequence[Word]) -> list[list[Word]]:
        """Runs of words that fit the classifier's window."""
        counts = [
            len(ids)
            for ids in self._tokenizer([w.text.strip() for w in words], add_special_tokens=False)[
                "input_ids"
            ]
        ]
        chunks: list[list[Word]] = [[]]
        room = self._window
        for word, count in zip(words, counts, strict=True):
            if count > room and chunks[-1]:
                chunks.append([])
                room = self._window
            chunks[-1].append(word)
            room -= count
        return chunks

    def _classify(self, text: str, chunks: list[list[Word]]) -> list[list[float]]:
        import torch

        starts = [chunk[0].start for chunk in chunks]
        pieces = [text[chunk[0].start : chunk[-1].end] for chunk in chunks]
        given = self._tokenizer(
            pieces, return_tensors="pt", padding=True, truncation=True,
            max_length=self._window + self._tokenizer.num_special_tokens_to_add(),
            return_offsets_mapping=True,
        )  # fmt: skip
        spans = given.pop("offset_mapping")
        with torch.inference_mode():
            keep = self._model(**given).logits.softmax(-1)[..., KEEP]
        found = []
        for index, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
            local = [Word(w.start - start, w.end - start, w.text) for w in chunk]
            places = [(int(a), int(b)) for a, b in spans[index].tolist()]
            found.append(mean_by_word(local, places, keep[index].tolist()))
        return found
