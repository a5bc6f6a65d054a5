"""Expected attention: what future queries, distributed like the prompt's, would look at.

Source: Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from
Future Queries Distribution", arXiv 2510.00636. The mean and covariance of the prompt's queries
before rotary embedding are rotated to the average of the next ``future`` positions; a key's
score is the expected exponential of its product with such a query, normalized over the keys and
averaged over the query heads of a KV head, times the norm of its value. Sinks are no part of it:
their keys would take the mass of the heads that look at them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from cache_policies.errors import PolicyError
from cache_policies.retention.base import Budgeted

if TYPE_CHECKING:
    from cache_policies.retention.seen import Seen

MOST_FUTURE = 2**16  # a table of so many rotations is made at a cut


@dataclass(frozen=True)
class ExpectedAttention(Budgeted):
    """Tokens that queries like those of the prompt are expected to attend to.

    Attributes:
        future: positions over which the rotation is averaged.
        epsilon: added to the expected attention before it is weighted by the value.

    """

    name: ClassVar[str] = "expected-attention"
    keeps: ClassVar[str] = "what queries like the prompt's are expected to attend to"
    loses: ClassVar[str] = "what only an unusual query would need"
    NEEDS_EVERY_QUERY: ClassVar[bool] = True
    USES_QUERIES: ClassVar[bool] = True
    UNROTATES: ClassVar[bool] = True
    COMPARABLE: ClassVar[bool] = True

    window: int = 1
    future: int = 512
    epsilon: float = 0.0

    def check(self) -> None:
        super().check()
        if not 1 <= self.future <= MOST_FUTURE or self.epsilon < 0:
            raise PolicyError(
                f"future={self.future} is not between 1 and {MOST_FUTURE} or "
                f"epsilon={self.epsilon} below 0"
            )

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.queries is not None
        scale, keys = seen.queries.scale, seen.keys
        means, covariances = (x.unflatten(0, (len(keys), -1)) for x in self._future_queries(seen))
        sinks = seen.position < self.sinks
        total = torch.zeros(sinks.shape, device=sinks.device, dtype=torch.float32)
        # A query head of every KV head at a time: keys are copied for each.
        for mean, covariance in zip(means.unbind(1), covariances.unbind(1), strict=True):
            linear = (keys @ mean[..., None]).squeeze(-1) * scale
            square = ((keys @ covariance) * keys).sum(-1) * scale**2 / 2
            total += (linear + square).masked_fill(sinks, -torch.inf).softmax(-1)
        expected = total / means.shape[1]
        return (expected + self.epsilon) * seen.values.norm(dim=-1)

    def _future_queries(self, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean ``[heads, d]`` and covariance ``[heads, d, d]`` at the next positions."""
        queries = seen.queries
        assert queries is not None
        mean = queries.total / queries.count
        covariance = queries.square / queries.count - mean[:, :, None] * mean[:, None, :]
        rotation = queries.rope.mean_rotation(seen.end, seen.end + self.future)
        return mean @ rotation.T, rotation @ covariance @ rotation.T
