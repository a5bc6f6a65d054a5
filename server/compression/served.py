"""The served model's tokenizer, off the event loop."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.compression.base import CompressorError


class ServedTokenizer:
    """A copy of its own: fast tokenizers may not be used by two threads at a time.

    Args:
        tokenizer: the engine's, a fast one of transformers.

    Raises:
        CompressorError: it does not say where in a text its tokens lie.

    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        # One thread, which ends what it began even if whoever asked has left.
        self._thread = ThreadPoolExecutor(1, "kvthrift-tokenizer")
        self.most_letters_per_token = int(tokenizer.max_chars_per_token)
        try:
            self._run("a", special=False)
        except (TypeError, KeyError, NotImplementedError) as error:
            name = type(tokenizer).__name__
            raise CompressorError(f"the tokenizer {name} has no offsets: {error}") from None

    def _run(self, text: str, *, special: bool) -> tuple[list[int], Any]:
        given = self._tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        return given["input_ids"], given["offset_mapping"]

    async def encode(self, text: str, *, special: bool = False) -> tuple[list[int], Any]:
        """Token ids, and start and end of each in the text."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._run(text, special=special))

    async def count(self, text: str) -> int:
        return len((await self.encode(text))[0])

    async def spans(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = (await self.encode(text))[1]
        return spans
