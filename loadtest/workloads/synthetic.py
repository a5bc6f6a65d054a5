"""Synthetic: prompts and answers of drawn lengths, some of each prompt shared by all."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from loadtest.errors import LoadTestError
from loadtest.workloads.base import Item, Workload
from loadtest.workloads.text import fill_exactly, sentences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from loadtest.workloads.tokens import Tokenizer

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
    return [max(1, round(float(x))) for x in draw[match[1]]()]


class Synthetic(Workload):
    """Prompts of sentences in an order of their own; ``shared`` is the common beginning's share.

    The common beginning is the same text for all requests: what a prefix cache can use.
    """

    kind: ClassVar[str] = "synthetic"
    about: ClassVar[str] = "drawn prompt and answer lengths, with a shared beginning"

    requests: int = Field(default=32, ge=1)
    input: str = "uniform:500:3000"
    output: str = "fixed:64"
    shared: float = Field(default=0.0, ge=0, le=1)

    def items(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        rng = np.random.default_rng(seed)
        inputs = draw_lengths(self.input, self.requests, rng)
        outputs = draw_lengths(self.output, self.requests, rng)
        common = sentences("essay", f"{seed}-shared")
        made: list[Item] = []
        for index, (size, answer) in enumerate(zip(inputs, outputs, strict=True)):
            pool = sentences("essay", seed)
            random.Random(f"{seed}-{index}").shuffle(pool)
            beginning = fill_exactly(common, round(self.shared * size), tokenizer)
            left = size - sum(tokenizer.count([f" {s}" for s in beginning]))
            # numbered right after the shared part, so that no two prompts go on alike by chance
            rest = fill_exactly([f"Part {index}.", *pool], left, tokenizer)
            item = Item(
                id=f"synthetic-{index}",
                task="synthetic",
                category="synthetic",
                prompt=" ".join((*beginning, *rest)),
                max_tokens=answer,
                exact_length=True,
                tags={"length": size},
            )
            made.append(item)
        return made
