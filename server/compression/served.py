"""The served model's tokenizer, off the event loop."""

from __future__ import annotations

import asyncio
import copy
from typing import Any


class ServedTokenizer:
    """A copy of its own: fast tokenizers may not be used by two threads at a time.

    Args:
        tokenizer: the engine's, a fast one of transformers.

    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = asyncio.Lock()

    async def encode(self, text: str, *, special: bool = False) -> tuple[list[int], Any]:
        """Token ids, and start and end of each in the text."""

        def run() -> tuple[list[int], Any]:
            given = self._tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
            return given["input_ids"], given["offset_mapping"]

        async with self._lock:
            return await asyncio.to_thread(run)

    async def count(self, text: str) -> int:
        return len((await self.encode(text))[0])

    async def spans(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = (await self.encode(text))[1]
        return spans
