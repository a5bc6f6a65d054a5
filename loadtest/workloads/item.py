"""One request and what its answer is scored against."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Item:
    """One request and what its answer is scored against.

    Attributes:
        id: unique in the workload.
        task: e.g. ``hotpotqa``; scores are averaged per task.
        category: of the task, e.g. ``multi-doc QA``.
        prompt: the text; sent as one user message when ``chat``.
        max_tokens: most tokens of the answer.
        metric: name in ``quality.METRICS``; None: not scored.
        references: right answers.
        classes: all classes, for classification.
        chat: whether the model's chat template belongs around the prompt.
        at: time stamp in seconds, of a trace.
        exact_length: ask for exactly ``max_tokens`` tokens (vLLM's ``ignore_eos``).
        tags: what plots group by, e.g. ``{"length": 2800, "depth": 0.5}``.

    """

    id: str
    task: str
    category: str
    prompt: str
    max_tokens: int
    metric: str | None = None
    references: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    chat: bool = False
    at: float | None = None
    exact_length: bool = False
    tags: dict[str, float | str] = field(default_factory=dict)


def hash_items(items: Sequence[Item]) -> str:
    """Twelve hexadecimal digits that name this very list of requests."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True).encode())
    return digest.hexdigest()[:12]
