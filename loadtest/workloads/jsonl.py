"""Reading JSONL: a broken line is named, with its file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of every line that is not blank.

    Raises:
        LoadTestError: cannot be read, or a line is not a JSON object.

    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise LoadTestError(f"{path}:{number}: not JSON ({error.msg})") from None
                if not isinstance(row, dict):
                    raise LoadTestError(f"{path}:{number}: not a JSON object")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path}: {error}") from None
