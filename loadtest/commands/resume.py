"""Going on where an interrupted run stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from loadtest.errors import LoadTestError
from loadtest.files import REQUESTS, SETUP
from loadtest.measuring.summary import Setup
from loadtest.sending.client import hash_prompt
from loadtest.sending.records import OK, Record, read_records, write_records

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.workloads import Item

# what must be the same for the two parts to be one run
SAME = ("model", "policy", "extra_hash", "workload_hash", "arrivals", "arrivals_hash", "endpoint")


def begin(folder: Path, setup: Setup, items: Sequence[Item], *, resume: bool) -> list[Record]:
    """Make the folder ready, and give the requests that need not be sent again.

    Raises:
        LoadTestError: ``resume``, and the folder holds a run of something else.

    """
    kept: list[Record] = []
    if resume and (folder / REQUESTS).exists():
        _check(folder, setup)
        kept = _answered(folder, items)
    write_records(kept, folder / REQUESTS)
    (folder / SETUP).write_text(setup.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return kept


def _answered(folder: Path, items: Sequence[Item]) -> list[Record]:
    """The first answer to each item, joined by its id and the hash of its prompt."""
    asked = {item.id: item for item in items}
    kept: dict[str, Record] = {}
    for record in read_records(folder / REQUESTS):
        item = asked.get(record.id)
        if item is None or record.prompt_hash != hash_prompt(item):
            raise LoadTestError(
                f"--resume: {folder / REQUESTS}: {record.id!r} is not a request of this run; "
                "use another folder"
            )
        if record.status == OK:
            kept.setdefault(record.id, record)
    return list(kept.values())


def _check(folder: Path, setup: Setup) -> None:
    path = folder / SETUP
    try:
        known = Setup.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise LoadTestError(f"--resume: {path}: {error}; use another folder") from None
    differing = [name for name in SAME if getattr(known, name) != getattr(setup, name)]
    if differing:
        raise LoadTestError(
            f"--resume: {folder} holds a run with another {', '.join(differing)}; "
            "use another folder"
        )
