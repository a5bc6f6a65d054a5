"""Passkey: a key hidden in a long text, and a question for it.

Instruction, needle and question are those of LongCTX-Bench (arXiv 2407.01527). Lengths are in
tokens of the served model, not in words as there.
"""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PositiveInt

from loadtest.workloads.base import Item, Workload
from loadtest.workloads.text import fill, sentences

if TYPE_CHECKING:
    from loadtest.workloads.tokens import Tokenizer

Share = Annotated[float, Field(ge=0, le=1)]
INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


class Passkey(Workload):
    """Every text x length x depth x digits, ``keys`` times with other keys."""

    kind: ClassVar[str] = "passkey"
    about: ClassVar[str] = "a key of some digits hidden in a long text"

    lengths: tuple[PositiveInt, ...] = (400, 2800)
    depths: tuple[Share, ...] = (0.1, 0.5, 0.9)
    digits: tuple[PositiveInt, ...] = (7, 64)
    texts: tuple[str, ...] = ("noise", "essay")
    keys: int = Field(default=1, ge=1)

    def items(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        rng = random.Random(seed)
        found: list[Item] = []
        grid = product(self.texts, self.lengths, self.depths, self.digits, range(self.keys))
        for text, length, depth, digits, _ in grid:
            key = "".join(rng.choice("0123456789") for _ in range(digits))
            hay = fill(sentences(text, seed), length, tokenizer)
            position = round(depth * len(hay))
            hay.insert(position, NEEDLE.format(key=key))
            item = Item(
                id=f"passkey-{len(found)}",
                task=f"passkey-{digits}",
                category="passkey",
                prompt="\n".join((INSTRUCTION, " ".join(hay), QUESTION)),
                # room for the key when every digit is a token, and a little more
                max_tokens=digits + 8,
                metric="exact_key",
                references=(key,),
                tags={"length": length, "depth": depth, "digits": digits, "text": text},
            )
            found.append(item)
        return found
