"""What a workload is: prompts, how long answers may be, and how they are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from loadtest.errors import LoadTestError
from loadtest.spec import Spec
from loadtest.workloads.fitting import check_fit

if TYPE_CHECKING:
    from loadtest.workloads.item import Item
    from loadtest.workloads.tokens import Tokenizer


class Workload(Spec, ABC):
    """Makes items; everything follows from its parameters, the seed and the tokenizer."""

    kind: ClassVar[str]
    about: ClassVar[str]

    def items(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        """The requests, in a fixed order; each fits the server and has an id of its own.

        Args:
            tokenizer: counts and cuts.
            seed: fixes whatever is drawn.
            longest: most tokens of prompt and answer that the server takes; None: not known.

        Raises:
            LoadTestError: no data, data that cannot be read (file and line named), or a request
                that the server could only refuse.

        """
        made = self.make(tokenizer, seed, longest)
        twice = [name for name, n in Counter(i.id for i in made).items() if n > 1]
        if twice:  # answers are scored, and runs resumed, by id
            raise LoadTestError(f"workload {self.kind}: two requests have the id {twice[0]!r}")
        check_fit(made, tokenizer, longest)
        return made

    @abstractmethod
    def make(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        """The requests; see ``items``."""
