"""The contract of a retention method: which tokens of a request stay in its store.

A method says how important every token is (``score``) and how many are kept; this module
protects sinks and the recent window by a mask and takes the best of the others, per KV head.
What it costs and when it runs is decided by the plan (``cache_policies.pages.plan.Span``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from cache_policies.errors import PolicyError
from cache_policies.parameters import Value, parameters, shown
from cache_policies.retention.seen import Seen  # noqa: TC001 - plug-ins have it from here

if TYPE_CHECKING:
    from cache_policies.retention.adaptive import Budgets

FULL, BOUNDED = "full", "bounded"
UNIFORM, ADAPTIVE = "uniform", "adaptive"
NOTHING, VALUES = "nothing", "values"


@dataclass(frozen=True)
class Retention(ABC):
    """Which tokens stay. Subclasses are frozen data classes of parameters.

    Class attributes:
        PREFILL: forms of prefill the method supports, the default first: ``full`` attends to
            the whole prompt and cuts when it is complete, ``bounded`` cuts after every chunk.
        DECODE_CUTS: decode tokens are cut too, every ``interval`` tokens; otherwise they stay.
        NEEDS_EVERY_QUERY: the method looks at all queries of the prompt, so the prompt cannot
            begin with pages from the prefix cache, whose queries nobody computes.
        USES_QUERIES: ``Seen.queries`` is filled.
        UNROTATES: the method takes keys or queries back to before rotary embedding.
        ACCUMULATES: mass is summed over steps; False: over the asking step alone.
        COMPARABLE: scores of different KV heads may be compared, being shares of attention, so
            that ``heads=adaptive`` makes sense; see ``retention/adaptive.py``.
    """

    name: ClassVar[str]
    keeps: ClassVar[str]
    loses: ClassVar[str]
    PREFILL: ClassVar[tuple[str, ...]] = (FULL,)
    DECODE_CUTS: ClassVar[bool] = False
    NEEDS_EVERY_QUERY: ClassVar[bool] = False
    USES_QUERIES: ClassVar[bool] = False
    UNROTATES: ClassVar[bool] = False
    ACCUMULATES: ClassVar[bool] = True
    COMPARABLE: ClassVar[bool] = False

    ratio: float = 0.0
    prefill: str = ""
    interval: int = 128
    heads: str = UNIFORM
    merge: str = NOTHING

    @classmethod
    def build(cls, given: dict[str, Any]) -> Self:
        """Make the method from what a user gave; refuse what contradicts itself.

        Raises:
            PolicyError: naming what is allowed.

        """
        sizes = [name for name in given if name in cls.size_names()]
        if "ratio" in given and sizes:
            raise PolicyError(f"give either ratio or {', '.join(sizes)}")
        if "ratio" in given and not 0 < given["ratio"] <= 1:
            raise PolicyError(f"ratio={given['ratio']} is not above 0 and at most 1")
        return cls(**given)

    @classmethod
    def settable(cls) -> dict[str, Value]:
        """Parameters a user may set, with their defaults."""
        shown_last = {"merge": NOTHING} | ({"heads": UNIFORM} if cls.COMPARABLE else {})
        hidden = {"heads", "merge"} | (set() if cls.DECODE_CUTS else {"interval"})
        return {
            key: cls.PREFILL[0] if key == "prefill" else value
            for key, value in parameters(cls).items()
            if key not in hidden
        } | shown_last

    @classmethod
    def size_names(cls) -> tuple[str, ...]:
        """Parameters that fix the budget in tokens, instead of ``ratio``."""
        return ("budget",)

    def __post_init__(self) -> None:
        if not self.prefill:
            object.__setattr__(self, "prefill", self.PREFILL[0])
        if self.prefill not in self.PREFILL:
            raise PolicyError(f"prefill={self.prefill} is not one of {', '.join(self.PREFILL)}")
        if not 1 <= self.interval <= 4096:
            raise PolicyError(f"interval={self.interval} is not between 1 and 4096")
        if self.heads not in {UNIFORM, ADAPTIVE}:
            raise PolicyError(f"heads={self.heads} is not one of {UNIFORM}, {ADAPTIVE}")
        if self.merge not in {NOTHING, VALUES}:
            raise PolicyError(f"merge={self.merge} is not one of {NOTHING}, {VALUES}")
        if self.adaptive and not self.COMPARABLE:
            raise PolicyError(f"{self.name} has heads={UNIFORM} only")
        self.check()

    def check(self) -> None:  # noqa: B027  # not every method has a range
        """Refuse parameters out of range.

        Raises:
            PolicyError: naming the range.

        """

    def __str__(self) -> str:
        return shown(self.name, self, self.settable())

    # ---- how many

    @property
    @abstractmethod
    def protected_tokens(self) -> int:
        """Tokens that are never dropped: sinks and window."""

    @property
    @abstractmethod
    def budget_tokens(self) -> int:
        """Tokens kept where no ratio is given."""

    def kept(self, prompt: int, layer: int = 0, layers: int = 1) -> int:
        """Tokens a cut leaves in a layer.

        A ratio counts from the prompt; a short prompt still keeps its protected tokens and one.
        """
        if not self.ratio:
            return self.budget_tokens
        return max(ceil(self.ratio * prompt), self.protected_tokens + 1)

    def compared(self, candidates: int, kept: int) -> int:
        """Pairs of keys that a cut of so many candidates compares in each head."""
        return candidates * kept if self.merges else 0

    def most_compared(self, prompt: int, longest: int, chunk: int) -> int:
        """Pairs of keys that the largest cut of a request compares in each head.

        Args:
            prompt: tokens of its prompt.
            longest: tokens of prompt and answer.
            chunk: most tokens of a step.

        """
        kept = self.kept(prompt)
        first = min(prompt, kept + chunk) if self.bounded else prompt
        later = kept + self.interval if self.DECODE_CUTS and longest >= kept + self.interval else 0
        return self.compared(max(first if prompt > kept else 0, later), kept)

    @property
    def bounded(self) -> bool:
        """Whether the budget holds during prefill too."""
        return self.prefill == BOUNDED

    @property
    def merges(self) -> bool:
        """Whether dropped tokens' values are added to kept ones."""
        return self.merge == VALUES

    @property
    def adaptive(self) -> bool:
        """Whether the heads of a layer compete for its budget."""
        return self.heads == ADAPTIVE

    # ---- which

    def first_query(self, before: int, after: int, prompt: int, cuts: bool) -> int | None:
        """First position whose query's attention is to be counted into ``Seen.mass``.

        Args:
            before: tokens computed before this step.
            after: tokens computed after it.
            prompt: tokens of the prompt.
            cuts: whether tokens are dropped at the end of this step.

        Returns:
            A position in ``[before, after)``, or None to count nothing.

        """
        return None

    @property
    def counts_attention(self) -> bool:
        """Whether ``Seen.mass`` is filled."""
        return type(self).first_query is not Retention.first_query

    @abstractmethod
    def score(self, seen: Seen) -> torch.Tensor:
        """Importance ``[num_kv_heads, n]`` of every candidate; higher stays."""

    def protected(self, seen: Seen) -> torch.Tensor:
        """Mask ``[num_kv_heads, n]`` of the tokens that stay whatever their score."""
        return torch.zeros_like(seen.position, dtype=torch.bool)

    def select(self, seen: Seen, keep: int, budgets: Budgets | None = None) -> torch.Tensor:
        """The ``keep`` tokens of every head that stay, ``[num_kv_heads, keep]`` int64 ascending.

        With ``budgets``, heads keep unequal numbers of tokens; see ``Budgets.select``.
        """
        stays = self.protected(seen)
        if not self.DECODE_CUTS:  # a resumed request may bring answer tokens in its prompt's chunk
            stays = stays | (seen.position >= seen.prompt)
        # Whatever a method returns is finite beside the protected tokens, so that they are first
        # however many there are; only the device knows their number.
        least, most = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
        score = (
            self.score(seen).float().nan_to_num(least, most, least).masked_fill(stays, torch.inf)
        )
        if budgets is not None:
            return budgets.select(score.masked_fill(seen.position < 0, -torch.inf))
        return score.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values

    @property
    def observed_queries(self) -> int:
        """How many of a prompt's last queries the method looks at, and so must be computed.

        Of a method that counts attention and has a ``window``, that many; others say it.
        """
        window = getattr(self, "window", 1) if self.counts_attention else 1
        return max(1, window, self.recent_queries)

    @property
    def recent_queries(self) -> int:
        """How many of the last queries ``Seen.recent`` holds."""
        return 0

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk inside which ``Seen.near`` is counted; 0: not filled."""
        return 0

    @property
    def rotates(self) -> bool:
        """Whether the sinks are rotated on as tokens between them and the window are dropped."""
        return False


@dataclass(frozen=True)
class Budgeted(Retention):
    """A method with one budget, sinks and a recent window.

    Attributes:
        budget: tokens kept per KV head and layer.
        ratio: or their share of the prompt.
        sinks: first tokens of the text, always kept.
        window: last tokens, always kept.
        prefill: ``full`` or ``bounded``.
        interval: decode tokens between two cuts, for methods that cut them.

    """

    budget: int = 1024
    sinks: int = 4
    window: int = 32

    def check(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise PolicyError(f"sinks={self.sinks} is below 0 or window={self.window} below 1")
        if not self.ratio and self.budget <= self.protected_tokens:
            raise PolicyError(
                f"budget={self.budget} is not above sinks + window = {self.protected_tokens}"
            )

    @property
    def protected_tokens(self) -> int:
        return self.sinks + self.window

    @property
    def budget_tokens(self) -> int:
        return self.budget

    def protected(self, seen: Seen) -> torch.Tensor:
        end = seen.end if self.DECODE_CUTS else seen.prompt_end
        return (seen.position < self.sinks) | (seen.position >= end - self.window)
