"""How much of a text is its end repeating itself: a failure that no status code shows."""

from __future__ import annotations

REPEATS = 3  # a loop is what stands at least so many times, one after the other, up to the end


def looped(text: str) -> float:
    """Share of a text that the loop at its end takes, 0 to 1.

    A loop may be of any length, and its last turn may be cut off. Characters are compared, so
    scripts without spaces count alike; white space counts as one space.
    """
    letters = " ".join(text.split())
    count, longest = len(letters), 0
    for period in range(1, count // REPEATS + 1):
        at = count - 1
        while at >= period and letters[at] == letters[at - period]:
            at -= 1
        same = count - 1 - at  # letters that stand the same one period before
        if same >= (REPEATS - 1) * period:
            longest = max(longest, same + period)
    return longest / count if count else 0.0
