"""What a workload is: prompts, how long answers may be, and how they are scored."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

from loadtest.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.workloads.tokens import Tokenizer


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


class Workload(Spec, ABC):
    """Makes items; everything follows from its parameters, the seed and the tokenizer."""

    kind: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def items(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        """The requests, in a fixed order.

        Args:
            tokenizer: counts and cuts.
            seed: fixes whatever is drawn.
            longest: most tokens of prompt and answer that the server takes; None: not known.

        Raises:
            LoadTestError: no data, or data that cannot be read (file and line named).

        """


def hash_items(items: Sequence[Item]) -> str:
    """Twelve hexadecimal digits that name this very list of requests."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True).encode())
    return digest.hexdigest()[:12]
