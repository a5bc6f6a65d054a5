"""Prompts as long as they may be: with instruction, question, chat template and answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.workloads.item import Item
    from loadtest.workloads.tokens import Tokenizer

ROUNDS = 8
ROOM = 128  # tokens that no chat template needs, unless it adds a system prompt


def fit(
    build: Callable[[int], Item],
    length: int,
    tokenizer: Tokenizer,
    longest: int | None,
    slack: int | None = None,
) -> Item:
    """The item with as much text as ``length`` tokens of prompt and answer hold.

    The tokenizer is asked for whole prompts a few times only, so the work grows with the length.

    Args:
        build: makes the item with about so many tokens of text, 0 being none; the same for the
            same number.
        length: tokens of the prompt, as it is sent, and of the answer.
        tokenizer: counts.
        longest: most tokens the server takes; None: not known.
        slack: tokens that may be missing; None: a sentence, or half a percent.

    Raises:
        LoadTestError: even without text it is longer, or ``length`` is more than ``longest``.

    """
    bare = build(0)
    name = bare.id.split("-")[0]
    if longest is not None and length > longest:
        raise LoadTestError(
            f"workload {name}: length {length}: the server takes {longest} tokens of prompt and "
            "answer"
        )
    least = _total(bare, tokenizer)
    if least > length:
        raise LoadTestError(
            f"workload {name}: length {length}: too short for {bare.task}, whose instruction, "
            f"question and answer alone are {least} tokens"
        )
    slack = max(40, length // 200) if slack is None else slack
    return _grown(build, bare, length - least, length, slack, tokenizer)


def _grown(
    build: Callable[[int], Item],
    best: Item,
    text: int,
    length: int,
    slack: int,
    tokenizer: Tokenizer,
) -> Item:
    tried: set[int] = set()
    longest = 0
    for _ in range(ROUNDS):
        if text <= 0 or text in tried:
            break
        tried.add(text)
        item = build(text)
        total = _total(item, tokenizer)
        if longest < total <= length:
            best, longest = item, total
            if length - total <= slack:
                break
        # what is over, and a little more: characters of a token differ from place to place
        text += length - total - (2 if total > length else 0)
        if len(tried) > ROUNDS // 2 and not longest:
            text = text * 3 // 4
    return best


def _total(item: Item, tokenizer: Tokenizer) -> int:
    return tokenizer.count_sent(item.prompt, item.chat) + item.max_tokens


def check_fit(
    items: Sequence[Item], tokenizer: Tokenizer, longest: int | None, answer: int | None = None
) -> None:
    """Refuse what the server could only refuse.

    Args:
        items: all requests.
        tokenizer: counts.
        longest: most tokens of prompt and answer that the server takes; None: not known.
        answer: tokens of every answer, where the user set them; None: the items' own.

    Raises:
        LoadTestError: names the first that is too long.

    """
    if longest is None:
        return
    found = [(i, n) for i in items if (n := excess(i, tokenizer, longest, answer)) > 0]
    if found:
        item, over = found[0]
        wanted = item.max_tokens if answer is None else answer
        more = f" (and {len(found) - 1} other requests)" if len(found) > 1 else ""
        raise LoadTestError(
            f"request {item.id}{more}: {longest + over - wanted} tokens and an answer of "
            f"{wanted}: the server takes {longest}"
        )


def excess(item: Item, tokenizer: Tokenizer, longest: int, answer: int | None = None) -> int:
    """Tokens of prompt and answer above ``longest``; 0 or less: it fits."""
    wanted = item.max_tokens if answer is None else answer
    # a token is at least a byte: short prompts need no counting
    if len(item.prompt.encode(errors="surrogatepass")) + ROOM + wanted <= longest:
        return 0
    return tokenizer.count_sent(item.prompt, item.chat) + wanted - longest
