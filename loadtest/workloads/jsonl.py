"""Reading JSON to the letter of its standard: what is broken is named, with file and line."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BYTE_ORDER_MARK = "\ufeff"


def strict_json(text: str) -> Any:
    """Parse JSON; Python's ``NaN`` and ``Infinity``, and numbers too large to hold, are refused.

    Raises:
        ValueError: says what is wrong.

    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON ({name} is not a number)")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large a number")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of every line that is not blank.

    A byte-order mark is passed over, at the beginning and where files were put together.

    Raises:
        LoadTestError: cannot be read, or a line is not a JSON object.

    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = line.lstrip(BYTE_ORDER_MARK)
                if not text.strip():
                    continue
                try:
                    row = strict_json(text)
                except ValueError as error:
                    raise LoadTestError(f"{path}:{number}: {error}") from None
                if not isinstance(row, dict):
                    raise LoadTestError(f"{path}:{number}: not a JSON object")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path}: {error}") from None
