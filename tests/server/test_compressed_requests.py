"""Prompts of requests that are shortened: what is kept and refused, and where that is done."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api import plugin
from server.api.state import ServerState
from server.compression import CompressorError, request, split_words
from server.compression.base import Compressor
from server.compression.request import PromptCompression, compress_request, split_question
from server.compression.served import ServedTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.compression.base import Word


class Words:
    """A token is a word with its space."""

    most_letters_per_token = 3

    async def encode(self, text: str, *, special: bool = False) -> tuple[list[int], Any]:
        spans = [(w.start, w.end) for w in split_words(text)]
        return list(range(len(spans))), spans

    async def count(self, text: str) -> int:
        return len(text.split())

    async def spans(self, text: str) -> list[tuple[int, int]]:
        return (await self.encode(text))[1]  # type: ignore[no-any-return]


class Longest(Compressor):
    name = "longest"
    most_letters = 40
    most_words = 6

    async def scores(self, text: str, words: Sequence[Word]) -> list[float]:
        return [float(len(w.text.strip())) for w in words]


def compress(asked: dict[str, Any], rate: float = 0.5) -> tuple[dict[str, Any], dict[str, Any]]:
    how = PromptCompression(method="selective", rate=rate)
    report = asyncio.run(compress_request(asked, how, Longest(), Words()))
    return asked, report.model_dump()


def test_a_completions_last_line_is_never_touched() -> None:
    asked, report = compress({"prompt": "longest a b words\nis it so?"})
    assert asked["prompt"] == "longest words\nis it so?"
    assert report == {
        "method": "selective", "rate": 0.5, "original_tokens": 7, "compressed_tokens": 5,
    }  # fmt: skip
    assert compress({"prompt": "one line of text"})[0]["prompt"] == "one line of text"
    both, report = compress({"prompt": ["aaa b\nq", "c ddd\nq"]})
    assert both["prompt"] == ["aaa\nq", "ddd\nq"]
    assert report["original_tokens"] == 6


def test_in_a_chat_only_user_messages_are_shortened_and_not_the_question() -> None:
    system = {"role": "system", "content": "a bbbb c dddd\nx"}
    first = {"role": "user", "content": "aaaa b cccc d"}
    answer = {"role": "assistant", "content": "aaaa b"}
    last = {"role": "user", "content": [{"type": "text", "text": "aaaa b\nc d?"}]}
    asked, _ = compress({"messages": [system, dict(first), answer, last]})
    assert [m["content"] for m in asked["messages"]] == [
        system["content"], "aaaa cccc", "aaaa b", [{"type": "text", "text": "aaaa\nc d?"}],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a" * 41, "longest: a text has 41 letters, at most 40 are taken"),
        (["a b\nc", "a" * 41], "41 letters"),  # before the first one is begun
        ("a " * 7 + "\nb", "more than 6 words"),
    ],
)
def test_a_long_text_is_refused_before_it_is_scored(
    prompt: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Longest, "scores", lambda *_: pytest.fail("scored"))
    with pytest.raises(CompressorError, match=says):
        compress({"prompt": prompt})


@given(st.text(alphabet="ab \n中", max_size=30), st.integers(1, 10))
def test_words_are_counted_while_they_are_split(text: str, most: int) -> None:
    words = split_words(text)
    if len(words) <= most:
        assert split_words(text, most) == words
    else:
        with pytest.raises(CompressorError, match=f"more than {most} words"):
            split_words(text, most)


def test_words_are_split_and_chosen_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noting(work: Any) -> Any:
        def run(*given: Any, **more: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*given, **more)

        return run

    for name in ("split_words", "tokens_by_word", "keep_words"):
        monkeypatch.setattr(request, name, noting(getattr(request, name)))
    compress({"prompt": "a bb ccc\nq"})
    assert len(threads) == 3
    assert threading.main_thread() not in threads


class Slow:
    """A tokenizer that is asked for one text at a time, whoever has left."""

    max_chars_per_token = 5

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0

    def __deepcopy__(self, _: Any) -> Slow:
        return self

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.05)
        self.inside -= 1
        return {"input_ids": [1], "offset_mapping": [(0, len(text))]}


def test_who_leaves_does_not_let_two_threads_into_a_tokenizer() -> None:
    slow = Slow()
    served = ServedTokenizer(slow)

    async def run() -> int:
        for _ in range(3):
            left = asyncio.create_task(served.count("a"))
            await asyncio.sleep(0.01)
            left.cancel()
        return await served.count("a")

    assert asyncio.run(run()) == 1
    assert slow.most == 1


def test_a_tokenizer_that_does_not_say_where_tokens_lie_is_refused() -> None:
    class Blind(Slow):
        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return {"input_ids": [1]}

    with pytest.raises(CompressorError, match="the tokenizer Blind has no offsets"):
        ServedTokenizer(Blind())


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]], 5, None, []])
def test_what_is_not_text_is_refused(prompt: object) -> None:
    with pytest.raises(CompressorError, match="needs a prompt of text"):
        compress({"prompt": prompt})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"method": "gzip"}, "method: Input should be 'llmlingua-2', 'selective' or 'none'"),
        ({"method": "selective", "rate": 0}, "rate: Input should be greater than 0"),
        ({"method": "selective", "speed": 1}, "speed: Extra inputs"),
        ("selective", "Input should be a valid"),
        ([], "Input should be a valid"),
    ],
)
def test_bad_options_are_named(value: object, says: str) -> None:
    with pytest.raises(CompressorError, match=says):
        PromptCompression.of(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a\nb", ("a\n", "b")),
        ("a\nb\n\n", ("a\n", "b\n\n")),
        ("a", ("", "a")),
        ("", ("", "")),
        ("a\n\nb c", ("a\n\n", "b c")),
    ],
)
def test_the_question_is_the_last_line(text: str, parts: tuple[str, str]) -> None:
    assert split_question(text) == parts


def test_a_server_without_a_tokenizer_says_so_and_ignores_no_classifier() -> None:
    def none() -> Any:
        raise ValueError("there is no tokenizer")

    client = SimpleNamespace(renderer=SimpleNamespace(get_tokenizer=none))
    state = ServerState()
    plugin._offer_compression(client, state, None)
    assert not state.compressors
    with pytest.raises(CompressorError, match="cannot be compressed here: there is no tokenizer"):
        asyncio.run(state.compressor({"method": "selective"}))
    with pytest.raises(CompressorError, match="--prompt-compressor folder: there is no tokenizer"):
        plugin._offer_compression(client, ServerState(), "folder")
