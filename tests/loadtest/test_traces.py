"""Recorded requests: units, blocks, and what is wrong in a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.errors import LoadTestError
from loadtest.workloads import Item, parse_workload
from tests.loadtest.counting import SPECIAL, Words

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]


def write(folder: Path, rows: list[Row]) -> Path:
    path = folder / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def make(path: Path, options: str = "", longest: int | None = None) -> list[Item]:
    return parse_workload(f"trace(file={path}{options})").items(Words(), 0, longest)


def mooncake(stamp: float, length: int, ids: list[Any], **more: Any) -> Row:
    return {"timestamp": stamp, "input_length": length, "output_length": 5, "hash_ids": ids} | more


def bailian(stamp: float, length: int, ids: list[Any]) -> Row:
    chat = {"chat_id": 159, "parent_chat_id": -1, "type": "text", "turn": 1}
    return chat | mooncake(stamp, length, ids)


def shared_words(a: str, b: str) -> int:
    pairs = zip(a.split(), b.split(), strict=False)
    return next(i for i, (x, y) in enumerate(pairs) if x != y)


def test_a_mooncake_trace_shares_blocks_and_keeps_its_times(tmp_path: Path) -> None:
    rows = [mooncake(2000, 1024, [7, 9], output_length=6), mooncake(1000, 700, [7, 8])]
    early, late = make(write(tmp_path, rows))
    assert (early.at, late.at) == (1.0, 2.0)
    assert (early.max_tokens, late.max_tokens) == (5, 6)
    assert len(early.prompt.split()) + SPECIAL == 700
    assert len(late.prompt.split()) + SPECIAL == 1024
    assert 512 <= shared_words(early.prompt, late.prompt) < 516


def test_a_bailian_trace_has_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    rows = [bailian(61.114, 40, [1, 2, 3]), bailian(62, 45, [1, 2, 4])]
    first, second = make(write(tmp_path, rows))
    assert (first.at, second.at) == (61.114, 62.0)
    assert len(first.prompt.split()) + SPECIAL == 40
    assert 32 <= shared_words(first.prompt, second.prompt) < 36
    # told from the number of ids and the fraction of a second, too
    bare = [mooncake(61.114, 40, [1, 2, 3]), mooncake(62.5, 521, list(range(33)))]
    assert [i.at for i in make(write(tmp_path, bare))] == [61.114, 62.5]
    # whole blocks only: the rest is text of its own
    (item,) = make(write(tmp_path, [bailian(1, 47, [1, 2])]))
    assert len(item.prompt.split()) + SPECIAL == 47


@pytest.mark.parametrize(
    ("rows", "options", "at"),
    [
        ([mooncake(61, 40, [1, 2, 3])], ",unit=s", 61.0),
        ([mooncake(61, 40, [1, 2, 3])], ",unit=ms", 0.061),
        ([mooncake(61.5, 1024, [1, 2])], ",unit=s", 61.5),
        ([mooncake(61, 10, [1])], ",unit=ms", 0.061),
        ([bailian(61, 10, [1])], "", 61.0),
        ([mooncake(3000, 128, [1, 2])], ",block=64,unit=ms", 3.0),
        ([{"timestamp": 5, "input_length": 9, "output_length": 1}], "", 5.0),
        ([{"timestamp": 5000, "input_length": 9, "output_length": 1}], ",unit=ms", 5.0),
    ],
)
def test_units_can_be_said(tmp_path: Path, rows: list[Row], options: str, at: float) -> None:
    assert make(write(tmp_path, rows), options)[0].at == pytest.approx(at)


@pytest.mark.parametrize(
    "rows",
    [
        [mooncake(61, 40, [1, 2, 3])],  # whole seconds, or milliseconds?
        [mooncake(61.5, 1024, [1, 2])],
        [mooncake(61, 10, [1])],
        [bailian(61, 1024, [1, 2])],
    ],
)
def test_ambiguous_units_must_be_said(tmp_path: Path, rows: list[Row]) -> None:
    with pytest.raises(LoadTestError, match=r"t\.jsonl:1: .*trace\(unit=s\) or trace\(unit=ms\)"):
        make(write(tmp_path, rows))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([mooncake(0, 1024, [7])], ":1: 1 hash_ids, but 1024 tokens are 2 blocks of 512, 64 "),
        ([mooncake(0, 700, [7])], ":1: 1 hash_ids, but 700 tokens are 2 blocks of 512"),
        ([mooncake(0, 600, [1, 2]), mooncake(9, 600, [1])], ":2: 1 hash_ids, .* 2 blocks of 512 "),
        ([mooncake(0, 600, [1, 2]), mooncake(9, 40, [1, 2, 3])], ":2: 3 hash_ids"),
        ([mooncake(0, 600, [1, 2, 3, 4])], ":1: 4 hash_ids"),
        ([bailian(0, 521, list(range(31)))], ":1: 31 hash_ids"),
        ([mooncake(0, 600, [])], ":1: hash_ids is not a list of ids"),
        ([mooncake(0, 600, [1, None])], ":1: hash_ids is not a list of ids"),
        ([mooncake(0, 600, [1, 2]) | {"hash_ids": "ab"}], ":1: hash_ids is not a list of ids"),
        ([mooncake(0, 600, [1, 2]) | {"hash_ids": None}], ":1: hash_ids is not a list of ids"),
        (
            [mooncake(0, 600, [1, 2]), {"timestamp": 1, "prompt": "x", "output_length": 1}],
            ":2: has no hash_ids, unlike",
        ),
    ],
)
def test_blocks_that_do_not_add_up_are_refused(tmp_path: Path, rows: list[Row], named: str) -> None:
    with pytest.raises(LoadTestError, match=f"t.jsonl{named}"):
        make(write(tmp_path, rows))


def test_a_plain_trace_replays_prompts_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\ufeff{"timestamp": 0.5, "prompt": "Hello", "output_length": 2}\n\n')
    (item,) = make(path)
    assert (item.prompt, item.at, item.max_tokens) == ("Hello", 0.5, 2)
    rows = [{"timestamp": 0, "input_length": n, "output_length": 10} for n in (1, 2, 90)]
    items = make(write(tmp_path, rows))
    assert [len(i.prompt.split()) + SPECIAL for i in items] == [2, 2, 90]
    (_, _, scaled) = make(path, ",scale=0.5")
    assert (len(scaled.prompt.split()) + SPECIAL, scaled.max_tokens) == (45, 5)


def test_a_request_that_cannot_fit_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = [{"timestamp": 0, "input_length": n, "output_length": 10} for n in (90, 91)]
    assert len(make(write(tmp_path, rows[:1]), longest=100)) == 1
    with pytest.raises(
        LoadTestError, match=r"trace-2: 91 tokens and an answer of 10: .* takes 100"
    ):
        make(write(tmp_path, rows), longest=100)


USUAL = {"timestamp": "1", "input_length": "8", "output_length": "1"}
NUMBERS = [
    ("NaN", "not JSON .NaN"),
    ("Infinity", "not JSON .Infinity"),
    ("-Infinity", "not JSON .-Infinity"),
    ("1e999", "1e999 is too large a number"),
    ("-1e999", "-1e999 is too large a number"),
    ("9" * 5000, "digits"),
    ("-1", "KEY is not a number"),
    ("1e300", "KEY is not a number"),
    ('"5"', "KEY is not a number"),
    ("true", "KEY is not a number"),
    ("null", "KEY is not a number"),
    ("[1]", "KEY is not a number"),
]


@pytest.mark.parametrize("key", list(USUAL))
@pytest.mark.parametrize(("value", "named"), NUMBERS)
def test_a_number_that_is_none_is_refused_with_file_and_line(
    tmp_path: Path, key: str, value: str, named: str
) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        ", ".join(f'"{k}": {v}' for k, v in row.items()) for row in (USUAL, USUAL | {key: value})
    ]
    path.write_text("".join(f"{{{line}}}\n" for line in lines))
    with pytest.raises(LoadTestError, match=rf"t\.jsonl:2: .*{named.replace('KEY', key)}") as error:
        make(path)
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no requests"),
        ('{"timestamp": 0}\n', ":1: input_length is not a number"),
        ('{"timestamp": 0, "input_length": 5}\n', ":1: output_length is not a number"),
        ('{"input_length": 5, "output_length": 5}\n', ":1: timestamp is not a number"),
        ('{"timestamp": 0, "prompt": "x", "output_length": 1}\n{broken\n', ":2: not JSON"),
        ("[1]\n", ":1: not a JSON object"),
        ("NaN\n", ":1: not JSON"),
        ('{"timestamp": 0, "prompt": "x", "output_length": 1, "x": [NaN]}', ":1: not JSON"),
        ('{"timestamp": 0, "prompt": "x", "output_length": 0}\n', ":1: output_length"),
        ('{"timestamp": 0, "prompt": "x", "output_length": 1.5}\n', ":1: output_length"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}\n', ":1: input_length"),
        ('{"timestamp": 0, "prompt": "", "output_length": 1}\n', ":1: prompt is not a text"),
        ("[" * 100_000, ":1: not JSON"),
    ],
)
def test_a_broken_line_is_named_with_its_file(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(LoadTestError, match=f"t.jsonl.*{named}"):
        make(path)
