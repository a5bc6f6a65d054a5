"""R-KV: what the last queries look at, less what other keys already say.

Source: Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
arXiv 2505.24133. For long answers: every ``interval`` tokens of them the store is cut to the
budget. Differences: a key without a similar one keeps its similarity to the first token; the prompt
is cut too, when it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional

from cache_policies.errors import PolicyError
from cache_policies.retention.base import BOUNDED, FULL, Budgeted
from cache_policies.retention.snapkv import check_kernel

if TYPE_CHECKING:
    from cache_policies.retention.seen import Seen

AT_ONCE = 2**25  # similarities of all heads that are in memory together, or probabilities
WIDEST_WINDOW = 512  # its queries are remembered, and compared with all keys


@dataclass(frozen=True)
class RKV(Budgeted):
    """Tokens that are attended to and that no newer one repeats.

    Attributes:
        budget: tokens kept per KV head and layer, the window included.
        ratio: or their share of the prompt.
        window: last tokens, which observe and are kept; at most 512.
        kernel: tokens over which the largest attention counts; odd, at most 129.
        balance: weight of attention; that of redundancy is what is left to 1.
        similar: cosine above which a key repeats another.
        interval: decode tokens between two cuts.

    """

    name: ClassVar[str] = "r-kv"
    keeps: ClassVar[str] = "what the last queries attend to and no newer token repeats"
    loses: ClassVar[str] = "tokens whose keys are like newer ones, repeated reasoning first"
    PREFILL: ClassVar[tuple[str, ...]] = (FULL, BOUNDED)
    DECODE_CUTS: ClassVar[bool] = True

    sinks: int = 0
    window: int = 8
    kernel: int = 7
    balance: float = 0.1
    similar: float = 0.5

    def check(self) -> None:
        super().check()
        check_kernel(self.kernel)
        if self.window > WIDEST_WINDOW:
            raise PolicyError(f"window={self.window} is not between 1 and {WIDEST_WINDOW}")
        if not 0 <= self.balance <= 1 or not 0 <= self.similar <= 1:
            raise PolicyError(
                f"balance={self.balance} or similar={self.similar} is not between 0 and 1"
            )

    @property
    def recent_queries(self) -> int:
        return self.window

    def compared(self, candidates: int, kept: int) -> int:
        return candidates**2 + super().compared(candidates, kept)

    def score(self, seen: Seen) -> torch.Tensor:
        order = seen.position.argsort(dim=1)  # a kept token may have come to any place
        keys = seen.keys.gather(1, order[..., None].expand_as(seen.keys))
        attention, redundancy = self._attention(seen, keys), self._redundancy(keys)
        score = self.balance * attention - (1 - self.balance) * redundancy
        return torch.zeros_like(score).scatter(1, order, score)

    def _attention(self, seen: Seen, keys: torch.Tensor) -> torch.Tensor:
        """``[num_kv_heads, n]``: pooled probabilities among the tokens before the window."""
        assert seen.recent is not None
        query = seen.recent.transpose(0, 1).unflatten(0, (keys.shape[0], -1))
        past = keys[:, : keys.shape[1] - self.window].transpose(1, 2)
        total = torch.zeros_like(past[:, 0])
        rows = max(1, AT_ONCE // (query.shape[1] * total.numel()))
        for part in query.split(rows, 2):
            logits = part.flatten(1, 2) @ past * seen.scale
            total += logits.unflatten(1, part.shape[1:3]).amax(1).softmax(-1).sum(1)
        mean = total / query.shape[2]
        pooled = functional.max_pool1d(mean, self.kernel, 1, self.kernel // 2)
        return functional.pad(pooled, (0, self.window))

    def _redundancy(self, keys: torch.Tensor) -> torch.Tensor:
        """``[num_kv_heads, n]``: mean similarity of other keys, the newest like them left out."""
        unit = functional.normalize(keys, dim=-1)
        heads, count = keys.shape[:2]
        # All similarities of a key are one product with the sum of keys; of each row of the
        # matrix only the entry that is left out is looked for.
        total = (unit @ unit.sum(1)[..., None]).squeeze(-1) - unit.square().sum(-1)
        newest_first, number = unit.flip(1), torch.arange(count, device=keys.device)
        rows = max(1, AT_ONCE // (heads * count))
        for part, own in zip(unit.split(rows, 1), number.split(rows), strict=True):
            repeats = part @ newest_first.transpose(1, 2) > self.similar
            repeats[:, torch.arange(len(own), device=own.device), count - 1 - own] = False
            found, place = repeats.byte().max(-1)
            newest = count - 1 - place
            like = (part * unit.gather(1, newest[..., None].expand_as(part))).sum(-1)
            total.scatter_add_(1, newest, -like * found)
        return (total / count).softmax(-1)
