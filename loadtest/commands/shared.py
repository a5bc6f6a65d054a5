"""One text for several models: made once, with the first model's tokens, counted in each one's."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from loadtest.commands.session import build_items, choose_tokenizer
from loadtest.errors import CANNOT_WRITE, LoadTestError
from loadtest.workloads import Item
from loadtest.workloads.fitting import check_fit
from loadtest.workloads.jsonl import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.commands.session import Settings
    from loadtest.sending.client import Target

PROMPTS = "prompts.jsonl"


class UnfitError(RuntimeError):
    """A model cannot take the prompts; the others can be compared."""


def shared_items(path: Path, settings: Settings, target: Target) -> list[Item]:
    """The prompts of a comparison, made with the first server's tokens.

    Args:
        path: where they are kept, for the models that follow and for an interrupted comparison.
        settings: what to make.
        target: the server that is asked next.

    Raises:
        LoadTestError: bad data, or they cannot be kept.
        UnfitError: prompts and answers are longer than this server takes.

    """
    if path.exists():
        items = [_item(row) for _, row in read_jsonl(path)]
    else:
        items = build_items(settings, target)
        _keep(items, path)
    _check_length(items, settings, target)
    return items


def _item(row: dict[str, object]) -> Item:
    lists = {k: tuple(v) for k, v in row.items() if isinstance(v, list)}
    return Item(**{**row, **lists})  # type: ignore[arg-type]


def _keep(items: Sequence[Item], path: Path) -> None:
    new = path.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(item)) + "\n" for item in items)
        new.replace(path)
    except OSError as error:
        raise LoadTestError(f"cannot write {path}: {error.strerror}", CANNOT_WRITE) from None


def _check_length(items: Sequence[Item], settings: Settings, target: Target) -> None:
    try:
        check_fit(items, choose_tokenizer(settings.tokenizer, target), target.longest)
    except LoadTestError as error:
        raise UnfitError(
            f"{error}; name the model first whose tokens are the shortest, or ask for shorter "
            "prompts"
        ) from None
