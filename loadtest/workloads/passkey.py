"""Passkey: a key hidden in a long text, and a question for it.

Instruction, needle and question are those of LongCTX-Bench (arXiv 2407.01527). Lengths are in
tokens of the served model, of the whole prompt and its answer, not in words of the text as there.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PositiveInt

from loadtest.workloads.base import Workload
from loadtest.workloads.fitting import fit
from loadtest.workloads.item import Item
from loadtest.workloads.text import Filler, sentences

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

    def make(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        rng = random.Random(seed)
        fillers = {text: Filler(sentences(text, seed), tokenizer) for text in self.texts}
        found: list[Item] = []
        grid = product(self.texts, self.lengths, self.depths, self.digits, range(self.keys))
        for number, (text, length, depth, digits, _) in enumerate(grid):
            key = "".join(rng.choice("0123456789") for _ in range(digits))
            tags: dict[str, float | str] = {
                "length": length, "depth": depth, "digits": digits, "text": text
            }  # fmt: skip
            build = partial(_item, number, key, fillers[text], tags)
            found.append(fit(build, length, tokenizer, longest))
        return found


def _item(number: int, key: str, filler: Filler, tags: dict[str, float | str], tokens: int) -> Item:
    hay = filler.sentences(tokens)
    hay.insert(round(float(tags["depth"]) * len(hay)), NEEDLE.format(key=key))
    return Item(
        id=f"passkey-{number}",
        task=f"passkey-{tags['digits']}",
        category="passkey",
        prompt="\n".join((INSTRUCTION, " ".join(hay), QUESTION)),
        # room for the key when every digit is a token, and a little more
        max_tokens=len(key) + 8,
        metric="exact_key",
        references=(key,),
        tags=tags,
    )
