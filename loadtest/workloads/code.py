"""Code: complete the next line of a Python file, the standard library's unless told."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from loadtest.errors import LoadTestError
from loadtest.quality.metrics import first_code_line
from loadtest.workloads.base import Item, Workload
from loadtest.workloads.longbench import DATA_SETS

if TYPE_CHECKING:
    from loadtest.workloads.tokens import Tokenizer


class Code(Workload):
    """The lines before a line of code are the prompt, the line is the answer (as LongBench's LCC).

    Each sample is of another file while there are enough, at a random line that is neither
    blank nor has a comment (which the metric would skip), and has ``length`` tokens before it.
    """

    kind: ClassVar[str] = "code"
    about: ClassVar[str] = "the next line of a Python file"

    folder: str = ""
    lengths: tuple[PositiveInt, ...] = (2000,)
    samples: int = Field(default=8, ge=1)

    def items(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
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
                found.append(self._item(path, folder, length, sample, rng, tokenizer))
        return found

    def _item(
        self,
        path: Path,
        folder: Path,
        length: int,
        sample: int,
        rng: random.Random,
        tokenizer: Tokenizer,
    ) -> Item:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        first = _line_after(lines, 4 * length)
        candidates = [i for i in range(first, len(lines)) if first_code_line(lines[i]).strip()]
        target = rng.choice(candidates) if candidates else len(lines) - 1
        context = _last_tokens(lines[:target], length, tokenizer)
        name = path.relative_to(folder).as_posix()
        return Item(
            id=f"code-{length}-{sample}-{name}:{target + 1}",
            task="code",
            category="code",
            prompt=DATA_SETS["lcc"].prompt.format(context=context),
            max_tokens=64,
            metric="edit_similarity",
            references=(lines[target].rstrip("\n"),),
            tags={"length": length},
        )


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _line_after(lines: list[str], characters: int) -> int:
    total = 0
    for index, line in enumerate(lines):
        total += len(line)
        if total >= characters:
            return index + 1
    return len(lines) - 1


def _last_tokens(lines: list[str], tokens: int, tokenizer: Tokenizer) -> str:
    """The last lines that have about ``tokens`` tokens together."""
    kept: list[str] = []
    total = 0
    for line in reversed(lines):
        total += tokenizer.count([line])[0]
        if total > tokens:
            break
        kept.append(line)
    return "".join(reversed(kept))
