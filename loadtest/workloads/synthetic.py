"""Synthetic: prompts and answers of drawn lengths, some of each prompt shared by all."""

from __future__ import annotations

import random
import re
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from loadtest.errors import LoadTestError
from loadtest.workloads.base import Workload
from loadtest.workloads.fitting import fit
from loadtest.workloads.item import Item
from loadtest.workloads.text import Filler, sentences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from loadtest.workloads.tokens import Tokenizer

MOST_TOKENS = 100_000_000
_LENGTHS = re.compile(r"(fixed|uniform|normal|lognormal):(\d+(?:\.\d+)?)(?::(\d+(?:\.\d+)?))?")


def draw_lengths(text: str, count: int, rng: np.random.Generator) -> list[int]:
    """Draw token lengths, at least 1 each.

    Args:
        text: ``fixed:N``, ``uniform:LOW:HIGH``, ``normal:MEAN:DEVIATION`` or
            ``lognormal:MEDIAN:SIGMA`` (sigma of the logarithm).
        count: how many.
        rng: drawn from.

    Raises:
        LoadTestError: not such a text.

    """
    match = _LENGTHS.fullmatch(text)
    if not match or (match[3] is None) != (match[1] == "fixed"):
        raise LoadTestError(
            f"lengths {text!r}: allowed: fixed:N, uniform:LOW:HIGH, normal:MEAN:DEVIATION, "
            "lognormal:MEDIAN:SIGMA"
        )
    a, b = float(match[2]), float(match[3] or 0)
    if match[1] == "uniform" and b < a:
        raise LoadTestError(f"lengths {text!r}: {b:g} is below {a:g}")
    draw: dict[str, Callable[[], Iterable[float]]] = {
        "fixed": lambda: [a] * count,
        "uniform": lambda: rng.integers(int(a), int(b), count, endpoint=True),
        "normal": lambda: rng.normal(a, b, count),
        "lognormal": lambda: rng.lognormal(np.log(max(a, 1)), b, count),
    }
    if max(a, b) > MOST_TOKENS:
        raise LoadTestError(f"lengths {text!r}: more than {MOST_TOKENS} tokens")
    with np.errstate(over="ignore"):
        drawn = [float(x) for x in draw[match[1]]()]
    # the tail of a wide distribution, or infinity
    if max(drawn, default=0.0) > MOST_TOKENS:
        raise LoadTestError(f"lengths {text!r}: drew {max(drawn):g}, above {MOST_TOKENS} tokens")
    return [max(1, round(x)) for x in drawn]


class Synthetic(Workload):
    """Prompts of sentences in an order of their own; ``shared`` is the common beginning's share.

    ``input`` is the prompt as the server counts it, at least its number; ``output`` the answer.
    The common beginning is the same text for all requests: what a prefix cache can use.
    """

    kind: ClassVar[str] = "synthetic"
    about: ClassVar[str] = "drawn prompt and answer lengths, with a shared beginning"

    requests: int = Field(default=32, ge=1)
    input: str = "uniform:500:3000"
    output: str = "fixed:64"
    shared: float = Field(default=0.0, ge=0, le=1)

    def make(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        rng = np.random.default_rng(seed)
        inputs = draw_lengths(self.input, self.requests, rng)
        outputs = draw_lengths(self.output, self.requests, rng)
        filler = Filler(sentences("essay", f"{seed}-shared"), tokenizer)
        made: list[Item] = []
        for index, (size, answer) in enumerate(zip(inputs, outputs, strict=True)):
            pool = sentences("essay", seed)
            random.Random(f"{seed}-{index}").shuffle(pool)
            build = partial(self._item, index, size, answer, filler, pool)
            least = tokenizer.count_sent(build(0).prompt, False)
            whole = max(size, least) + answer
            made.append(fit(build, whole, tokenizer, longest, slack=max(2, size // 500)))
        return made

    def _item(
        self, index: int, size: int, answer: int, filler: Filler, pool: list[str], tokens: int
    ) -> Item:
        first = min(tokens, round(self.shared * size))
        beginning, rest = filler.words(first), filler.words(tokens - first, pool)
        return Item(
            id=f"synthetic-{index}",
            task="synthetic",
            category="synthetic",
            # numbered right after the shared part, so that no two prompts go on alike by chance
            prompt=" ".join((*beginning, f"Part {index}.", *rest)),
            max_tokens=answer,
            exact_length=True,
            tags={"length": size},
        )
