"""How much one cut may compute: all other requests wait for the step it is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from cache_policies.errors import PolicyError

if TYPE_CHECKING:
    from cache_policies.policy import Method

# Multiplications in all layers of a rank: 95 s on the two cores on which r-kv took 12 s for 2.8e11
# (docs/benchmarks.md); on a GPU seconds, by arithmetic.
MOST_ON_CPU, MOST_ON_GPU = 2**41, 2**46


def refuse_work(method: Method, prompt: int, longest: int, chunk: int, key: int) -> None:
    """Refuse a request whose method compares too many keys with each other at once.

    Args:
        method: the request's.
        prompt: tokens of its prompt.
        longest: tokens of prompt and answer.
        chunk: most tokens of a step.
        key: numbers of a token's keys in all layers under the policy.

    Raises:
        PolicyError: naming the way out.

    """
    if method.retention is None:
        return
    pairs = method.retention.most_compared(prompt, longest, chunk)
    work = pairs * key
    most = MOST_ON_CPU if current_platform.is_cpu() else MOST_ON_GPU
    if work > most:
        raise PolicyError(
            f"{method} compares {pairs:.2g} pairs of keys of every head at once for {longest} "
            f"tokens of prompt and answer: {work:.2g} multiplications, for which all other "
            f"requests wait, and {most:.2g} are taken; ask for a smaller budget, a shorter prompt, "
            "or a method that compares none (merge=nothing)"
        )
