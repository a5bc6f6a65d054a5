"""Lengths: what is in them, what cannot fit, and how they are made quickly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from loadtest.commands.session import Settings, build_items
from loadtest.errors import LoadTestError
from loadtest.sending.arrivals import parse_arrivals
from loadtest.sending.client import Target
from loadtest.sending.records import read_records
from loadtest.workloads import Item, parse_workload
from loadtest.workloads.tokens import ApproximateTokenizer, ServerTokenizer, middle
from tests.loadtest.counting import CHAT, SPECIAL, Digits, Words

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Command, MockServer

SPECS = [
    "passkey(lengths={})",
    "ruler(lengths={})",
    "ruler(lengths={},needles=20,hops=12)",
]


def total(item: Item, tokenizer: Words) -> int:
    around = CHAT if item.chat else SPECIAL
    return tokenizer.tokens(item.prompt) + around + item.max_tokens


@pytest.mark.parametrize("tokenizer", [Words(), Digits()])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [1300, 2048])
def test_a_length_is_that_of_prompt_and_answer(spec: str, length: int, tokenizer: Words) -> None:
    for item in parse_workload(spec.format(length)).items(tokenizer, 0, length):
        assert 0.95 * length < total(item, tokenizer) <= length, item.id
        for answer in item.references if item.metric == "all_strings" else ():
            assert answer in item.prompt


class Quarters(Words):
    """Four characters a token."""

    def tokens(self, text: str) -> int:
        return -(-len(text) // 4)


@pytest.mark.parametrize("length", [500, 4000])
def test_a_length_of_code_holds_its_answer(length: int) -> None:
    for item in parse_workload(f"code(lengths={length})").items(Quarters(), 0, length):
        assert 0.95 * length - 40 < total(item, Quarters()) <= length, item.id


@pytest.mark.parametrize("shared", [0, 0.4, 1])
@pytest.mark.parametrize("tokenizer", [Words(), Digits()])
def test_a_synthetic_prompt_has_the_tokens_that_were_drawn(tokenizer: Words, shared: float) -> None:
    spec = f"synthetic(requests=8,input=uniform:3:900,output=fixed:5,shared={shared})"
    for item in parse_workload(spec).items(tokenizer, 0, 905):
        size = float(item.tags["length"])
        least = tokenizer.tokens("Part 0.") + SPECIAL
        assert size - 6 <= total(item, tokenizer) - 5 <= max(size, least), item.id


@pytest.mark.parametrize("spec", [*SPECS, "code(lengths={})", "synthetic(input=fixed:{})"])
def test_what_cannot_fit_is_refused(spec: str) -> None:
    with pytest.raises(LoadTestError, match="the server takes 2047 tokens of prompt and answer"):
        parse_workload(spec.format(2048)).items(Words(), 0, 2047)


def test_a_length_too_short_for_its_question_is_refused() -> None:
    with pytest.raises(LoadTestError, match=r"length 90: too short for passkey-64, .* \d+ "):
        parse_workload("passkey(lengths=90)").items(Words(), 0, None)
    with pytest.raises(LoadTestError, match="length 100: too short for multikey"):
        parse_workload("ruler(lengths=100)").items(Words(), 0, None)


def long_row(words: int) -> str:
    context = " ".join(f"w{i}" for i in range(words))
    return json.dumps({"context": context, "input": "Why?", "answers": ["b"]}) + "\n"


@pytest.mark.parametrize("task", ["hotpotqa", "trec", "gov_report"])
def test_longbench_is_cut_to_what_the_server_takes(tmp_path: Path, task: str) -> None:
    (tmp_path / f"{task}.jsonl").write_text(long_row(3000))
    spec = f"longbench(folder={tmp_path},tasks={task})"
    (item,) = parse_workload(spec).items(Words(), 0, 1000)
    assert total(item, Words()) == 1000
    (item,) = parse_workload(f"{spec[:-1]},cap=300)").items(Words(), 0, 1000)
    assert len(item.prompt.split(" ")) == 300
    with pytest.raises(LoadTestError, match="leave no room: the server takes 40"):
        parse_workload(spec).items(Words(), 0, 40)


class Regrown(Words):
    """What was cut counts more tokens than those it was made of."""

    def cut_middle(self, text: str, tokens: int) -> str:
        return super().cut_middle(text, tokens + 7)


def test_a_cut_that_grows_again_is_cut_further(tmp_path: Path) -> None:
    (tmp_path / "hotpotqa.jsonl").write_text(long_row(3000))
    spec = f"longbench(folder={tmp_path},tasks=hotpotqa)"
    (item,) = parse_workload(spec).items(Regrown(), 0, 1000)
    assert 990 < total(item, Words()) <= 1000


@pytest.mark.parametrize(
    "spec", ["passkey(lengths={})", "ruler(lengths={})", "synthetic(requests=4,input=fixed:{})"]
)
def test_the_work_grows_with_the_length(spec: str) -> None:
    def work(length: int) -> tuple[int, int]:
        tokenizer = Words()
        parse_workload(spec.format(length)).items(tokenizer, 0, None)
        return tokenizer.calls, tokenizer.characters

    (calls, characters), (long_calls, long_characters) = work(4096), work(131072)
    assert long_calls <= calls + 24
    assert long_characters < 1.5 * 32 * characters


def test_a_trace_of_long_prompts_asks_for_words_only(tmp_path: Path) -> None:
    counts = []
    for length in (4096, 131072):
        ids = list(range(length // 512))
        row = {"timestamp": 1, "input_length": length, "output_length": 1, "hash_ids": ids}
        (tmp_path / "t.jsonl").write_text(json.dumps(row))
        tokenizer = Words()
        (item,) = parse_workload(f"trace(file={tmp_path}/t.jsonl)").items(tokenizer, 0, None)
        assert tokenizer.tokens(item.prompt) + SPECIAL == length
        counts.append(tokenizer.calls)
    assert counts[0] == counts[1]


class Vllm:
    """vLLM's /tokenize, a word being a token; what it was asked is kept."""

    def __init__(self, *, template: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self.template = template
        self.http = httpx.Client(transport=httpx.MockTransport(self.answer), base_url="http://x")

    def answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked.append(body)
        if request.url.path == "/detokenize":
            return httpx.Response(200, json={"prompt": " ".join(f"w{i}" for i in body["tokens"])})
        if "messages" in body:
            if not self.template:
                return httpx.Response(400, json={"error": "no chat template"})
            count = len(body["messages"][0]["content"].split()) + CHAT
        else:
            count = len(body["prompt"].split()) + body.get("add_special_tokens", True)
        return httpx.Response(200, json={"count": count, "tokens": list(range(count))})


def test_the_server_counts_what_is_sent() -> None:
    server = Vllm()
    asked = ServerTokenizer(server.http, "m")
    assert asked.count(["a b", "a b"]) == [2, 2]
    assert [asked.count_sent("a b", chat) for chat in (True, False)] == [2 + CHAT, 3]
    assert len(server.asked) == 3
    assert asked.count_sent("a b", True) == 2 + CHAT
    assert len(server.asked) == 3  # known
    chat = ServerTokenizer(server.http, "m", "chat", {"chat_template_kwargs": {"x": 1}, "n": 1})
    assert chat.count_sent("a b", False) == 2 + CHAT
    assert server.asked[-1]["chat_template_kwargs"] == {"x": 1}
    assert "n" not in server.asked[-1]
    plain = ServerTokenizer(server.http, "m", "completions")
    assert plain.count_sent("a b", True) == 3
    # where there is no template, room is left for one
    assert ServerTokenizer(Vllm(template=False).http, "m").count_sent("a b", True) > 50
    assert ApproximateTokenizer("chat").count_sent("abcd", False) > 50


def test_a_long_prompt_costs_the_server_few_questions() -> None:
    server = Vllm()
    spec = parse_workload("passkey(lengths=131072,texts=essay)")
    items = spec.items(ServerTokenizer(server.http, "m"), 0, 131072)
    assert len(items) == 6
    assert len(server.asked) < 40


def test_answers_set_by_the_user_count() -> None:
    settings = Settings(
        parse_workload("passkey(lengths=500)"), parse_arrivals("closed"), tokenizer="approximate"
    )
    target = Target("http://x", "m", longest=600, extra={"max_tokens": 400})
    with pytest.raises(LoadTestError, match="and an answer of 400: the server takes 600"):
        build_items(settings, target)
    for extra in ({"max_tokens": 40}, {"max_tokens": None}, {}):
        assert build_items(settings, Target("http://x", "m", longest=600, extra=extra))


@pytest.mark.parametrize(
    "spec",
    [
        "passkey(lengths=500,depths=0.5,texts=noise)",
        "ruler(lengths=500,samples=1,common=4,ratio=3)",
        "synthetic(requests=4,input=fixed:436)",
    ],
)
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_server_of_that_length_answers_everything(
    mock: MockServer, kvthrift: Command, tmp_path: Path, spec: str, endpoint: str
) -> None:
    url = mock(ttft=0.0, itl=0.0, longest=500)
    where = ("-o", str(tmp_path / "out"), "--endpoint", endpoint)
    done = kvthrift("loadtest", url, "-w", spec, *where, "--warmup", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    for record in read_records(tmp_path / "out" / "requests.jsonl"):
        assert (record.prompt_tokens or 0) + (record.output_tokens or 0) <= 500
        assert (record.prompt_tokens or 0) + (record.output_tokens or 0) > 440


def test_nothing_is_sent_where_something_cannot_fit(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(longest=500)
    for spec in ("passkey(lengths=400|501)", "synthetic(input=fixed:437)", "ruler"):
        done = kvthrift("loadtest", url, "-w", spec, "-o", str(tmp_path / "out"))
        assert done.returncode == 2
        assert "the server takes 500 tokens" in done.stderr
    assert httpx.get(f"{url}/truth").json() == {}


def test_halves_add_up() -> None:
    assert middle(list(range(9)), 5) == ([0, 1], [6, 7, 8])
