"""Trace: requests recorded elsewhere, at their own times; see ``trace_file``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from loadtest.errors import LoadTestError
from loadtest.workloads.base import Workload
from loadtest.workloads.item import Item
from loadtest.workloads.trace_file import block_size, read_lines, seconds_per_unit
from loadtest.workloads.words import NOUNS

if TYPE_CHECKING:
    from loadtest.workloads.tokens import Tokenizer
    from loadtest.workloads.trace_file import Line

REPEATS = 16  # of a word, to know what it takes inside a text


class Trace(Workload):
    """The first ``requests`` lines of a file (0: all), in the order of their time stamps.

    ``scale`` shortens answers, and prompts given by their length, to replay a large model's trace
    on a small one. ``block`` (tokens; 0: as the lines say) and ``unit`` tell how to read a file
    that does not say itself.
    """

    kind: ClassVar[str] = "trace"
    about: ClassVar[str] = "recorded requests at their own times (plain, Mooncake, Qwen-Bailian)"

    file: str = ""
    requests: int = Field(default=0, ge=0)
    scale: float = Field(default=1.0, gt=0, le=1)
    block: int = Field(default=0, ge=0)
    unit: Literal["auto", "s", "ms"] = "auto"

    def make(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        if not self.file:
            raise LoadTestError("workload trace: say which, trace(file=PATH)")
        lines = read_lines(Path(self.file).expanduser(), self.requests)
        block = block_size(lines, self.block)
        second = seconds_per_unit(lines, block, self.unit)
        texts = Texts(tokenizer, seed)
        items = [self._item(line, block, second, texts) for line in lines]
        return sorted(items, key=lambda item: item.at or 0.0)

    def _item(self, line: Line, block: int, second: float, texts: Texts) -> Item:
        return Item(
            id=f"trace-{line.number}",
            task="trace",
            category="trace",
            prompt=line.prompt or self._prompt(line, block, texts),
            max_tokens=max(1, round(self.scale * line.output_length)),
            at=line.stamp * second,
            exact_length=True,
        )

    def _prompt(self, line: Line, block: int, texts: Texts) -> str:
        """Text of the length of the line in which equal block ids are equal text."""
        left = max(1, round(self.scale * line.input_length) - texts.around)
        size = max(1, round(self.scale * block))
        parts: list[str] = []
        for name in line.ids:
            parts += texts.make(str(name), min(size, left))
            left -= min(size, left)
        # a line without ids, or the end of one that names whole blocks only
        parts += texts.make(f"line {line.number}", left)
        return " ".join(parts)


class Texts:
    """Words drawn by a name: as many tokens as asked, the same for the same name.

    Attributes:
        around: tokens that the server adds to a prompt.

    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        counts = tokenizer.count([f" {word}" * REPEATS for word in NOUNS])
        priced = sorted((n / REPEATS, word) for n, word in zip(counts, NOUNS, strict=True))
        # the cheaper half: a short block still has several words, which tell it from others
        self._words = [(max(price, 1e-9), word) for price, word in priced[: len(priced) // 2]]
        self._seed = seed
        first = priced[0][1]
        self.around = tokenizer.count_sent(first, False) - tokenizer.count([first])[0]

    def make(self, name: str, tokens: int) -> list[str]:
        """Words of ``tokens`` tokens; fewer by less than a word."""
        rng = random.Random(f"{self._seed}-{name}")
        cheapest = self._words[0][0]
        chosen: list[str] = []
        left = float(tokens)
        while left >= cheapest:
            price, word = rng.choice(self._words)
            if price > left:
                price, word = self._words[0]
            chosen.append(word)
            left -= price
        return chosen
