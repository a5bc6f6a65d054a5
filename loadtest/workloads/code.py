"""Code: complete the next line of a Python file, the standard library's unless told."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from loadtest.errors import LoadTestError
from loadtest.quality.metrics import first_code_line
from loadtest.workloads.base import Workload
from loadtest.workloads.fitting import fit
from loadtest.workloads.item import Item
from loadtest.workloads.longbench import DATA_SETS

if TYPE_CHECKING:
    from loadtest.workloads.tokens import Tokenizer


SAMPLE = 4000  # characters from which the length of a token is guessed


class Code(Workload):
    """The lines before a line of code are the prompt, the line is the answer (as LongBench's LCC).

    Each sample is of another file while there are enough, at a random line that is neither
    blank nor has a comment (which the metric would skip). ``length`` is that of prompt and answer.
    """

    kind: ClassVar[str] = "code"
    about: ClassVar[str] = "the next line of a Python file"

    folder: str = ""
    lengths: tuple[PositiveInt, ...] = (2000,)
    samples: int = Field(default=8, ge=1)

    def make(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        folder = Path(self.folder).expanduser() if self.folder else _standard_library()
        files = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
        if not files:
            raise LoadTestError(f"workload code: no .py file in {folder}")
        found: list[Item] = []
        for length in self.lengths:
            order = files.copy()
            random.Random(f"{seed}-{length}").shuffle(order)
            # long enough files only: four characters a token is a first guess, not a count
            long = [p for p in order if p.stat().st_size > 5 * length]
            if not long:
                raise LoadTestError(f"workload code: no .py file in {folder} has {length} tokens")
            for sample in range(self.samples):
                rng = random.Random(f"{seed}-{length}-{sample}")
                path = long[sample % len(long)]
                source = _Source.of(path, folder, length, sample, rng)
                build = partial(source.item, tokenizer)
                found.append(fit(build, length, tokenizer, longest))
        return found


@dataclass(frozen=True)
class _Source:
    """A line to be guessed, and what stands before it."""

    lines: list[str]
    target: int
    id: str
    length: int

    @classmethod
    def of(cls, path: Path, folder: Path, length: int, sample: int, rng: random.Random) -> _Source:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        lines = text.splitlines(keepends=True)
        first = _line_after(lines, 4 * length)
        candidates = [i for i in range(first, len(lines)) if first_code_line(lines[i]).strip()]
        target = rng.choice(candidates) if candidates else len(lines) - 1
        name = path.relative_to(folder).as_posix()
        return cls(lines, target, f"code-{length}-{sample}-{name}:{target + 1}", length)

    def item(self, tokenizer: Tokenizer, tokens: int) -> Item:
        """With about so many tokens before the line."""
        context = self._last_lines(tokens * self.characters(tokenizer))
        return Item(
            id=self.id,
            task="code",
            category="code",
            prompt=DATA_SETS["lcc"].prompt.format(context=context),
            max_tokens=64,
            metric="edit_similarity",
            references=(self.lines[self.target].rstrip("\r\n"),),
            tags={"length": self.length},
        )

    def characters(self, tokenizer: Tokenizer) -> float:
        """Of a token, right before the line."""
        sample = self._last_lines(SAMPLE)
        return len(sample) / max(1, tokenizer.count([sample])[0])

    def _last_lines(self, characters: float) -> str:
        first = self.target
        while first and (characters := characters - len(self.lines[first - 1])) >= 0:
            first -= 1
        return "".join(self.lines[first : self.target])


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _line_after(lines: list[str], characters: int) -> int:
    total = 0
    for index, line in enumerate(lines):
        total += len(line)
        if total >= characters:
            return index + 1
    return len(lines) - 1
