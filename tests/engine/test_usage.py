"""What answers say was held and compressed, with the `openai` client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.engine.asking import MODEL, NOISE, held, prompt, stats

if TYPE_CHECKING:
    from loadtest.commands.process import Server

pytestmark = pytest.mark.engine


def test_usage_says_what_the_block_manager_counted(client: openai.OpenAI, server: Server) -> None:
    before = stats(server)
    whole = held(client.completions.create(model=MODEL, prompt=prompt("count"), max_tokens=9))
    tokens = whole["prompt_tokens"]
    assert whole["policy"] == "kivi-4bit"
    assert whole["computed_tokens"] == whole["kept_tokens"] == tokens + 8  # the last is not stored
    # 4 ring pages of 128 tokens, and a store page for every 128 tokens absorbed
    assert whole["pages"] == 4 + (tokens + 8) // 128
    assert whole["bytes"] == whole["pages"] * 128 * 7200
    assert whole["compression_ratio"] == pytest.approx((tokens + 8) * 23040 / whole["bytes"], 1e-3)
    cut = held(client.completions.create(model="fast", prompt=prompt("count"), max_tokens=9))
    assert cut["policy"] == "snapkv(budget=96)+kivi-4bit"
    assert cut["kept_tokens"] == 96 + 8
    assert cut["pages"] < whole["pages"]
    assert cut["cached_tokens"] > 0
    after = stats(server)
    assert after["tokens_dropped"] - before["tokens_dropped"] == tokens - 96
    assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] == cut["cached_tokens"]
    assert after["pages_given_back"] > before["pages_given_back"]
    assert after["used_pages"] == 0


def test_streams_chats_several_prompts_and_samples_say_it_too(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    stream = client.completions.create(
        model="fast", prompt=prompt("stream"), stream=True, stream_options={"include_usage": True},
        **ask,
    )  # fmt: skip
    last = list(stream)[-1]
    assert held(last)["kept_tokens"] == 96 + 4
    said = [{"role": "user", "content": prompt("chat")}]
    chat = client.chat.completions.create(
        model=f"{MODEL}@streaming-llm(window=60)",
        messages=said,
        **ask,  # type: ignore[arg-type]
    )
    assert held(chat)["policy"] == "streaming-llm(window=60)+kivi-4bit"
    chunks = client.chat.completions.create(
        model="fast", messages=said, stream=True, stream_options={"include_usage": True},  # type: ignore[arg-type]
        **ask,
    )  # fmt: skip
    assert held(list(chunks)[-1])["policy"] == "snapkv(budget=96)+kivi-4bit"
    two = client.completions.create(model="fast", prompt=[prompt("one"), prompt("two")], **ask)
    assert held(two)["kept_tokens"] == 2 * (96 + 4)
    assert held(two)["prompt_tokens"] == two.usage.prompt_tokens  # type: ignore[union-attr]
    many = client.completions.create(
        model="fast", prompt=prompt("many"), n=3, max_tokens=5, temperature=1.0
    )
    assert len(many.choices) == 3
    assert held(many)["policy"] == "snapkv(budget=96)+kivi-4bit"


def test_what_a_stop_string_ends_says_it_too(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "fast", "max_tokens": 60, "temperature": 0}
    # Twice: an answer after a prefix hit is computed in other steps, and rounded otherwise, than
    # the first one; those after it are alike.
    for _ in range(2):
        free = client.completions.create(prompt=prompt("stop"), **ask)
    word = free.choices[0].text.split()[3]
    done = client.completions.create(prompt=prompt("stop"), stop=word, **ask)
    assert (done.choices[0].finish_reason, word in done.choices[0].text) == ("stop", False)
    usage = done.usage
    assert usage is not None
    assert held(done)["policy"] == "snapkv(budget=96)+kivi-4bit"
    # all but the last token has passed through the model
    assert held(done)["computed_tokens"] == usage.prompt_tokens + usage.completion_tokens - 1
    assert held(done)["kept_tokens"] == 96 + usage.completion_tokens - 1
    stream = client.completions.create(
        prompt=prompt("stop"), stop=word, stream=True, stream_options={"include_usage": True}, **ask
    )
    assert held(list(stream)[-1])["kept_tokens"] == held(done)["kept_tokens"]


def test_a_prompt_is_compressed_and_the_question_stays(client: openai.OpenAI) -> None:
    text = prompt("compress") + "The code of the door is 4711. " + NOISE * 5
    ask: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "logprobs": 1}
    how = {"method": "selective", "rate": 0.3}
    question = "\nThe code of the door is"
    done = client.completions.create(
        model="fast", prompt=text + question, extra_body={"prompt_compression": how}, **ask
    )
    report = done.usage.prompt_compression  # type: ignore[union-attr]
    assert report["method"] == "selective"
    assert report["compressed_tokens"] < 0.4 * report["original_tokens"]
    assert done.usage.prompt_tokens == report["compressed_tokens"]  # type: ignore[union-attr]
    assert "4711" in done.choices[0].text  # digits stay
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text + question}], max_tokens=3,
        stream=True, stream_options={"include_usage": True},
        extra_body={"prompt_compression": how},
    )  # fmt: skip
    last = list(stream)[-1]
    assert last.usage.prompt_compression["rate"] == 0.3  # type: ignore[union-attr]
    assert held(last)["policy"] == "kivi-4bit"
    for wrong, says in (
        ({"method": "gzip"}, "method: Input should be"),
        ({"method": "llmlingua-2"}, "no compressor 'llmlingua-2'"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.completions.create(
                model=MODEL, prompt="x", extra_body={"prompt_compression": wrong}
            )
