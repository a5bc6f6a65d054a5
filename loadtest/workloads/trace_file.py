"""Recorded requests: what a line says, and in which units.

Three kinds of lines are known:

* plain: ``{"timestamp": s, "prompt" or "input_length": tokens, "output_length": tokens}``;
* Mooncake's (arXiv 2407.00079): time stamps in whole milliseconds, and ``hash_ids`` that name
  blocks of 512 tokens, the same id being the same text;
* Qwen-Bailian's (arXiv 2506.02634): ``chat_id``, ``turn``; seconds; ``hash_ids`` of 16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadtest.errors import LoadTestError
from loadtest.workloads.jsonl import read_jsonl

if TYPE_CHECKING:
    from pathlib import Path

MOONCAKE = 512
BAILIAN = 16
BAILIAN_FIELDS = frozenset({"chat_id", "parent_chat_id", "turn"})
MOST_TOKENS = 100_000_000  # of a prompt or answer: more is a mistake in the file


@dataclass(frozen=True)
class Line:
    """A request.

    Attributes:
        place: file and line; number: the line.
        stamp: time as it stands in the file.
        prompt: its text; None: known by its length only.
        input_length, output_length: tokens; the first is 0 with a prompt.
        ids: of its blocks; empty: the line names none.
        fields: names of all its fields.

    """

    place: str
    number: int
    stamp: float
    prompt: str | None
    input_length: int
    output_length: int
    ids: tuple[int | str, ...]
    fields: frozenset[str]


def read_lines(path: Path, most: int) -> list[Line]:
    """The first ``most`` requests (0: all) of a file.

    Raises:
        LoadTestError: names file, line and reason.

    """
    found: list[Line] = []
    for number, row in read_jsonl(path):
        if most and len(found) >= most:
            break
        line = _line(row, f"{path}:{number}", number)
        if found and bool(line.ids) != bool(found[0].ids):
            has = "has hash_ids" if line.ids else "has no hash_ids"
            raise LoadTestError(f"{line.place}: {has}, unlike {found[0].place}")
        found.append(line)
    if not found:
        raise LoadTestError(f"{path}: no requests in it")
    return found


def _line(row: dict[str, Any], place: str, number: int) -> Line:
    prompt = row.get("prompt")
    if "prompt" in row and (not isinstance(prompt, str) or not prompt):
        raise LoadTestError(f"{place}: prompt is not a text")
    return Line(
        place=place,
        number=number,
        stamp=_number(row, "timestamp", place),
        prompt=prompt,
        input_length=0 if prompt else _tokens(row, "input_length", place),
        output_length=_tokens(row, "output_length", place),
        ids=() if prompt else _ids(row, place),
        fields=frozenset(row),
    )


def _number(row: dict[str, Any], key: str, place: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise LoadTestError(f"{place}: {key} is not a number of at least 0")
    return float(value)


def _tokens(row: dict[str, Any], key: str, place: str) -> int:
    value: Any = row.get(key)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not 1 <= value <= MOST_TOKENS:
        raise LoadTestError(
            f"{place}: {key} is not a number of tokens (a whole number from 1 to {MOST_TOKENS})"
        )
    return int(value)


def _ids(row: dict[str, Any], place: str) -> tuple[int | str, ...]:
    ids = row.get("hash_ids", ())
    good = all(isinstance(i, int | str) and not isinstance(i, bool) for i in ids or ())
    if "hash_ids" in row and (not isinstance(ids, list) or not ids or not good):
        raise LoadTestError(f"{place}: hash_ids is not a list of ids")
    return tuple(ids)


def block_size(lines: list[Line], given: int) -> int:
    """Tokens of a block: what all lines' numbers of ids agree with; 0 where there are no ids.

    Args:
        lines: of one file.
        given: by the user; 0: Mooncake's or Qwen-Bailian's.

    Raises:
        LoadTestError: a line has too few ids, or too many.

    """
    if not lines[0].ids:
        return 0
    left = [given] if given else [MOONCAKE, BAILIAN]
    for line in lines:
        agreed = [b for b in left if len(line.ids) in _numbers_of_ids(line.input_length, b)]
        if not agreed:
            needed = ", ".join(f"{-(-line.input_length // b)} blocks of {b}" for b in left)
            raise LoadTestError(
                f"{line.place}: {len(line.ids)} hash_ids, but {line.input_length} tokens are "
                f"{needed} (another size: trace(block=N))"
            )
        left = agreed
    return left[-1]


def _numbers_of_ids(length: int, block: int) -> tuple[int, ...]:
    whole, rest = divmod(length, block)
    # some files name whole blocks only, or an empty one at the end
    short = (whole,) if block <= BAILIAN and whole else ()
    return (*short, whole + 1) if rest else (whole, whole + 1)


def seconds_per_unit(lines: list[Line], block: int, given: str) -> float:
    """What a time stamp of 1 means.

    Args:
        lines: of one file.
        block: tokens of a block.
        given: ``s`` or ``ms`` by the user; ``auto``: by what the lines say.

    Raises:
        LoadTestError: they do not say.

    """
    if given != "auto":
        return {"s": 1.0, "ms": 0.001}[given]
    if not block:
        return 1.0
    whole = all(line.stamp.is_integer() for line in lines)
    bailian = any(line.fields & BAILIAN_FIELDS for line in lines)
    several = any(len(line.ids) > 1 or line.input_length > BAILIAN for line in lines)
    if block == MOONCAKE and whole and not bailian:
        return 0.001
    if block == BAILIAN and (bailian or (several and not whole)):
        return 1.0
    raise LoadTestError(
        f"{lines[0].place}: the lines do not tell whether time stamps are seconds, as "
        f"Qwen-Bailian's, or milliseconds, as Mooncake's: say trace(unit=s) or trace(unit=ms)"
    )
