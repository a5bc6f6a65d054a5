"""Trace: requests recorded elsewhere, at their own times.

A line is ``{"timestamp": seconds, "prompt": text or "input_length": tokens, "output_length":
tokens}``. Mooncake's traces (time stamps in milliseconds, and ``hash_ids`` that name blocks of 512
tokens, the same id being the same text) are known by their ``hash_ids``.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from loadtest.errors import LoadTestError
from loadtest.workloads.base import Item, Workload
from loadtest.workloads.jsonl import read_jsonl
from loadtest.workloads.text import fill_exactly, sentences

if TYPE_CHECKING:
    from loadtest.workloads.tokens import Tokenizer

BLOCK_TOKENS = 512


class Trace(Workload):
    """The first ``requests`` lines of a file (0: all), in the order of their time stamps.

    ``scale`` shortens answers, and prompts given by their length, to replay a large model's trace
    on a small one.
    """

    kind: ClassVar[str] = "trace"
    about: ClassVar[str] = "recorded requests at their own times (plain or Mooncake JSONL)"

    file: str = ""
    requests: int = Field(default=0, ge=0)
    scale: float = Field(default=1.0, gt=0, le=1)

    def items(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        if not self.file:
            raise LoadTestError("workload trace: say which, trace(file=PATH)")
        path = Path(self.file).expanduser()
        found: list[Item] = []
        for number, row in read_jsonl(path):
            if self.requests and len(found) >= self.requests:
                break
            found.append(self._item(row, f"{path}:{number}", number, tokenizer, seed))
        if not found:
            raise LoadTestError(f"{path}: no requests in it")
        return sorted(found, key=lambda item: item.at or 0.0)

    def _item(
        self, row: dict[str, Any], place: str, number: int, tokenizer: Tokenizer, seed: int
    ) -> Item:
        mooncake = "hash_ids" in row
        stamp = _number(row, "timestamp", place) / (1000 if mooncake else 1)
        output = max(1, round(self.scale * _number(row, "output_length", place)))
        if "prompt" in row:
            prompt = row["prompt"]
            if not isinstance(prompt, str) or not prompt:
                raise LoadTestError(f"{place}: prompt is not a text")
        else:
            length = _number(row, "input_length", place)
            ids = row["hash_ids"] if mooncake else [f"line {number}"]
            if not isinstance(ids, list) or not ids:
                raise LoadTestError(f"{place}: hash_ids is not a list of ids")
            prompt = self._prompt(ids, round(length * self.scale), mooncake, tokenizer, seed)
        return Item(
            id=f"trace-{number}",
            task="trace",
            category="trace",
            prompt=prompt,
            max_tokens=output,
            at=stamp,
            exact_length=True,
        )

    def _prompt(
        self, ids: list[Any], length: int, mooncake: bool, tokenizer: Tokenizer, seed: int
    ) -> str:
        """Text of ``length`` tokens in which equal block ids are equal text."""
        block = round(BLOCK_TOKENS * self.scale) if mooncake else length
        parts: list[str] = []
        for index, name in enumerate(ids):
            pool = sentences("essay", seed)
            random.Random(f"{seed}-{name}").shuffle(pool)
            tokens = min(block, length - index * block)
            if tokens <= 0:
                break
            parts += fill_exactly([f"Block {name}.", *pool], tokens, tokenizer)
        return " ".join(parts) or f"Block {ids[0]}."


def _number(row: dict[str, Any], key: str, place: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise LoadTestError(f"{place}: {key} is not a number of at least 0")
    return float(value)
