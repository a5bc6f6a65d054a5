"""RULER (arXiv 2404.06654): needles with distractors, variable chains, most common words.

Built from the paper's definitions; the haystack is this project's own text or a folder. A length is
that of the prompt, with needles, question and chat template, and of its answer.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from loadtest.errors import LoadTestError
from loadtest.workloads.base import Workload
from loadtest.workloads.fitting import fit
from loadtest.workloads.item import Item
from loadtest.workloads.text import Filler, sentences
from loadtest.workloads.words import ADJECTIVES, NOUNS, WORDS

if TYPE_CHECKING:
    from loadtest.workloads.tokens import Tokenizer

Task = Literal["multikey", "multivalue", "multiquery", "vt", "cwe"]
TASKS: tuple[Task, ...] = ("multikey", "multivalue", "multiquery", "vt", "cwe")
CATEGORIES = {"vt": "multi-hop tracing", "cwe": "aggregation"}

NEEDLE = "One of the special magic numbers for {key} is: {value}."
FIND = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n{context}\nWhat are all the special magic "
    "numbers for {keys} mentioned in the provided text? The special magic numbers for {keys} "
    "mentioned in the provided text are"
)
TRACE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n\nQuestion: Find all variables that are assigned the value {value} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are:"
)
COUNT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the {count} most "
    "common words in the above list? Answer: The top {count} words that appear most often in the "
    "list are:"
)


class Ruler(Workload):
    """Every task x length, ``samples`` times."""

    kind: ClassVar[str] = "ruler"
    about: ClassVar[str] = "needles with distractors, variable chains, most common words"

    tasks: tuple[Task, ...] = TASKS
    lengths: tuple[PositiveInt, ...] = (2800,)
    samples: int = Field(default=2, ge=1)
    text: str = "essay"
    needles: int = Field(default=4, ge=1, le=64)
    hops: int = Field(default=4, ge=1, le=25)
    common: int = Field(default=10, ge=1, le=50)
    ratio: int = Field(default=10, ge=2)  # how much oftener the common words appear

    def make(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        filler = Filler(sentences(self.text, seed), tokenizer)
        numbered = Filler([f"{i}. {word}" for i, word in enumerate(WORDS, 100)], tokenizer)
        found: list[Item] = []
        for task, length, sample in product(self.tasks, self.lengths, range(self.samples)):
            name = f"{seed}-{task}-{length}-{sample}"
            pool = numbered if task == "cwe" else filler
            build = partial(self._item, task, length, sample, name, pool)
            found.append(fit(build, length, tokenizer, longest))
        return found

    def _item(
        self, task: Task, length: int, sample: int, name: str, filler: Filler, tokens: int
    ) -> Item:
        rng = random.Random(name)
        if task == "vt":
            prompt, answers = self._trace(tokens, filler, rng)
        elif task == "cwe":
            prompt, answers = self._count(tokens, filler, rng)
        else:
            prompt, answers = self._find(task, tokens, filler, rng)
        return Item(
            id=f"ruler-{task}-{length}-{sample}",
            task=task,
            category=CATEGORIES.get(task, "retrieval"),
            prompt=prompt,
            max_tokens={"vt": 30 + 6 * self.hops, "cwe": 12 * self.common}.get(task, 128),
            metric="all_strings",
            references=tuple(answers),
            tags={"length": length},
        )

    def _hide(self, needles: list[str], tokens: int, filler: Filler, rng: random.Random) -> str:
        """Needles at random places of a text; their order among themselves stays."""
        hay = filler.sentences(tokens)
        places = sorted(rng.randrange(len(hay) + 1) for _ in needles)
        parts: list[str] = []
        before = 0
        for place, needle in zip(places, needles, strict=True):
            parts += [*hay[before:place], needle]
            before = place
        return " ".join((*parts, *hay[before:]))

    def _find(
        self, task: Task, tokens: int, filler: Filler, rng: random.Random
    ) -> tuple[str, list[str]]:
        pairs = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
        keys = rng.sample(pairs, 1 if task == "multivalue" else self.needles)
        values = [str(v) for v in rng.sample(range(10**6, 10**7), self.needles)]
        owners = keys * self.needles if task == "multivalue" else keys
        needles = [NEEDLE.format(key=k, value=v) for k, v in zip(owners, values, strict=True)]
        rng.shuffle(needles)
        asked, answers = ([keys[0]], values[:1]) if task == "multikey" else (keys, values)
        context = self._hide(needles, tokens, filler, rng)
        listed = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        return FIND.format(context=context, keys=listed), answers

    def _trace(self, tokens: int, filler: Filler, rng: random.Random) -> tuple[str, list[str]]:
        letters = [chr(ord("A") + i) for i in range(26)]
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choices(letters, k=5))
            if name not in names:
                names.append(name)
        value = str(rng.randrange(10000, 100000))
        chain = [f"VAR {names[0]} = {value}."]
        chain += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
        context = self._hide(chain, tokens, filler, rng)
        return TRACE.format(context=context, value=value, count=len(names)), names

    def _count(self, tokens: int, filler: Filler, rng: random.Random) -> tuple[str, list[str]]:
        words = list(WORDS)
        rng.shuffle(words)
        common, rest = words[: self.common], words[self.common :]
        room = len(filler.sentences(tokens))
        # every other word appears so often that there are words enough to fill the text
        times = max(1, -(-room // (len(rest) + self.common * self.ratio)))
        others = room // times - self.common * self.ratio
        if tokens and others < self.common:
            raise LoadTestError(
                f"workload ruler: there is room for {room} words, too few for cwe with "
                f"common={self.common}, ratio={self.ratio}"
            )
        drawn = (common * self.ratio + rest[: max(0, others)]) * times if tokens else []
        rng.shuffle(drawn)
        context = " ".join(f"{i}. {word}" for i, word in enumerate(drawn, 1))
        return COUNT.format(context=context, count=self.common), common
