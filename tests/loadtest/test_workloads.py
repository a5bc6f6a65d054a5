from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from loadtest.errors import LoadTestError
from loadtest.quality import score
from loadtest.workloads import Item, hash_items, parse_workload
from loadtest.workloads.longbench import DATA_SETS, hub_rows
from loadtest.workloads.passkey import NEEDLE
from loadtest.workloads.tokens import ApproximateTokenizer
from tests.loadtest.counting import CHAT, Words


def make(spec: str, seed: int = 0, longest: int | None = None) -> list[Item]:
    return parse_workload(spec).items(Words(), seed, longest)


@pytest.mark.parametrize(
    "spec",
    [
        "passkey(lengths=200)",
        "ruler(lengths=400|700,common=4,ratio=3)",
        "code(lengths=200,samples=3)",
        "synthetic(requests=5,input=lognormal:80:0.5,shared=0.3)",
    ],
)
def test_a_seed_fixes_everything_and_ids_are_unique(spec: str) -> None:
    first, again, other = make(spec, 3), make(spec, 3), make(spec, 4)
    assert first == again
    assert hash_items(first) == hash_items(again) != hash_items(other)
    assert len({i.id for i in first}) == len(first)
    assert str(parse_workload(str(parse_workload(spec)))) == str(parse_workload(spec))


def test_the_needle_sits_once_at_its_depth() -> None:
    items = make("passkey(lengths=240|400,depths=0|0.5|1,keys=2)")
    assert len(items) == 2 * 3 * 2 * 2 * 2
    for item in items:
        (key,) = item.references
        needle = NEEDLE.format(key=key)
        assert item.prompt.count(needle) == 1
        hay = item.prompt.split("\n")[1]
        position = hay.index(needle) / max(1, len(hay) - len(needle))
        assert position == pytest.approx(float(item.tags["depth"]), abs=0.15)
        assert len(key) == item.tags["digits"]
        assert item.max_tokens > len(key)


def test_essays_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, text in (("b.txt", "Second here. Third!"), ("a.txt", "First one.")):
        (tmp_path / name).write_text(text)
    item = make(f"passkey(texts={tmp_path},lengths=69,depths=1,digits=7)")[0]
    assert item.prompt.split("\n")[1].startswith("First one. Second here. Third! The pass key")


def test_ruler_tasks_hold_their_answers() -> None:
    for item in make("ruler(lengths=700,samples=3,common=5,ratio=4)"):
        assert all(r in item.prompt for r in item.references), item.id
        expected = {"multikey": 1, "multivalue": 4, "multiquery": 4, "vt": 5, "cwe": 5}
        assert len(item.references) == expected[item.task]
        if item.task == "cwe":
            words = [w for w in item.prompt.split() if w.isalpha()]
            rare = max(words.count(w) for w in ("acorn", "zebra") if w not in item.references)
            assert min(words.count(w) for w in item.references) >= 4 * max(1, rare) // 2


def test_code_asks_for_the_line_after_the_context(tmp_path: Path) -> None:
    lines = [f"value_{i} = compute({i})  # step" for i in range(400)]
    (tmp_path / "long.py").write_text("\n".join(lines))
    (item,) = make(f"code(folder={tmp_path},lengths=100,samples=1)")
    context = item.prompt.removeprefix("Please complete the code given below. \n")
    context = context.removesuffix("Next line of code:\n")
    last = context.rstrip("\n").split("\n")[-1]
    assert lines.index(item.references[0]) == lines.index(last) + 1
    assert 10 < len(context.split()) <= 100 - 64


def test_synthetic_shares_a_beginning_and_nothing_more() -> None:
    items = make("synthetic(requests=4,input=fixed:200,output=uniform:3:9,shared=0.5)")
    for item in items:
        assert 196 <= len(item.prompt.split()) <= 200
        assert 3 <= item.max_tokens <= 9
    a, b = items[0].prompt, items[1].prompt
    same = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert 0.4 < same / len(a) < 0.7


def row(**changed: Any) -> str:
    usual = {"_id": "x", "context": "one two three", "input": "Why?", "answers": ["b", "c"]}
    return json.dumps(usual | {"all_classes": None} | changed) + "\n"


def test_longbench_reads_a_folder_and_cuts_the_middle(tmp_path: Path) -> None:
    long = " ".join(f"w{i}" for i in range(500))
    (tmp_path / "hotpotqa.jsonl").write_text(row(context=long))
    (tmp_path / "trec.jsonl").write_text(row(all_classes="['b', 'd']"))
    qa, trec = make(f"longbench(folder={tmp_path},tasks=hotpotqa|trec,cap=100)")
    assert len(qa.prompt.split(" ")) == 100
    assert qa.prompt.startswith("Answer the question based on")
    assert qa.prompt.endswith("Question: Why?\nAnswer:")
    assert (qa.chat, trec.chat) == (True, False)
    assert (qa.references, trec.classes) == (("b", "c"), ("b", "d"))
    assert (qa.max_tokens, trec.max_tokens) == (32, 64)
    # without a cap, what the server takes decides
    (item, _) = make(f"longbench(folder={tmp_path},tasks=hotpotqa|trec)", longest=64 + CHAT + 60)
    assert 64 + 60 - 32 - 5 < len(item.prompt.split()) <= 64 + 60 - 32


def test_rows_of_one_id_are_scored_against_their_own_answers(tmp_path: Path) -> None:
    ids: list[Any] = ["x", "x", None, None, 7, "7", "", "a b\n", "a/b", "\ud800"]
    rows = [row(_id=name, answers=[f"answer{i}"]) for i, name in enumerate(ids)]
    rows.append(json.dumps({"context": "c", "input": "i", "answers": ["answer10"]}) + "\n")
    (tmp_path / "hotpotqa.jsonl").write_text("".join(rows))
    items = make(f"longbench(folder={tmp_path},tasks=hotpotqa)")
    by_id = {i.id: i for i in items}
    assert len(by_id) == len(items) == 11
    assert [by_id[i.id].references for i in items] == [(f"answer{n}",) for n in range(11)]
    assert items[0].id == "hotpotqa-0-x"  # the benchmark's is still to be seen
    assert all(i.id.isascii() and i.id.isprintable() for i in items)


@pytest.mark.parametrize("classes", [None, [], "", "[]"])
def test_trec_without_classes_takes_the_benchmarks(tmp_path: Path, classes: Any) -> None:
    (tmp_path / "trec.jsonl").write_text(row(answers=["Date"], all_classes=classes))
    (item,) = make(f"longbench(folder={tmp_path},tasks=trec)")
    assert len(item.classes) == 50
    assert score(item, "Date\nQuestion: ...") == 1.0
    assert score(item, " \nDate") == 1.0
    assert score(item, "Date, Price") == 0.5
    assert score(item, "Price") == 0.0


@pytest.mark.parametrize("classes", [{"a": 1}, 5, ["a", None], "not a list", "('a',)", [""]])
def test_classes_that_are_no_list_are_refused(tmp_path: Path, classes: Any) -> None:
    (tmp_path / "trec.jsonl").write_text(row(all_classes=classes))
    with pytest.raises(LoadTestError, match=r"trec\.jsonl:1: all_classes is not a list"):
        make(f"longbench(folder={tmp_path},tasks=trec)")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text(row() + "\ufeff" + row(_id="y"), encoding="utf-8-sig")
    assert len(make(f"longbench(folder={tmp_path},tasks=hotpotqa)")) == 2
    (tmp_path / "essay.txt").write_text("First one. Second.", encoding="utf-8-sig")
    assert "\ufeff" not in make(f"passkey(texts={tmp_path},lengths=200,digits=7)")[0].prompt
    code = "\n".join(f"value_{i} = compute({i})" for i in range(400))
    (tmp_path / "long.py").write_text(code, encoding="utf-8-sig")
    (item,) = make(f"code(folder={tmp_path},lengths=1000,samples=1)")
    assert "\ufeff" not in item.prompt


def test_longbench_reads_the_hubs_archive(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/qasper.jsonl", row() + row(_id="y"))
    rows = list(hub_rows("qasper", str(archive)))
    assert [r["_id"] for _, r in rows] == ["x", "y"]
    with pytest.raises(LoadTestError, match="musique"):
        list(hub_rows("musique", str(archive)))


def test_all_sixteen_english_data_sets_are_there() -> None:
    assert len(DATA_SETS) == 16
    categories = [d.category for d in DATA_SETS.values()]
    assert [categories.count(c) for c in dict.fromkeys(categories)] == [3, 3, 3, 3, 1, 1, 2]


SHARED = Path(__file__).parents[3] / "shared" / "data" / "longbench"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no LongBench files beside the checkout")
def test_real_longbench_rows_load() -> None:
    items = make(f"longbench(folder={SHARED},rows=2,cap=500)")
    assert len({i.task for i in items}) == 16
    assert all(i.references and len(i.prompt.split(" ")) <= 500 for i in items)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("foo", "unknown workload 'foo'; allowed: passkey, ruler, longbench"),
        ("passkey(x=1)", "'x=1' is not one of lengths=400|2800"),
        ("passkey(keys=1,keys=2)", "keys is given twice"),
        ("passkey(lengths=a)", "lengths.0: Input should be a valid integer"),
        ("passkey(keys=0)", "keys: Input should be greater"),
        ("passkey(texts=/nowhere)", "neither noise, essay nor a folder"),
        ("synthetic(input=foo)", "allowed: fixed:N"),
        ("synthetic(input=uniform:9:3)", "3 is below 9"),
        ("ruler(tasks=xx)", "should be 'multikey'"),
        ("ruler(tasks=cwe,lengths=300)", "too few for cwe"),
        ("ruler(tasks=cwe,lengths=30)", "length 30: too short for cwe"),
        ("passkey(depths=nan)", "depths.0: Input should be"),
        ("trace(scale=inf)", "scale: Input should be"),
        ("synthetic(input=fixed:999999999999999999999)", "more than 100000000 tokens"),
        ("synthetic(input=lognormal:1000:900)", "above 100000000 tokens"),
        ("longbench(folder=/nowhere)", "/nowhere/narrativeqa.jsonl: .*No such file"),
        (
            "longbench(folder=/nowhere,tasks=foo)",
            "unknown LongBench task 'foo'; known: narrativeqa",
        ),
        ("code(folder=/nowhere)", "no .py file in /nowhere"),
        ("trace", r"say which, trace\(file=PATH\)"),
    ],
)
def test_what_is_wrong_is_named(spec: str, named: str) -> None:
    with pytest.raises(LoadTestError, match=named.replace("|", r"\|")):
        make(spec)


def test_tokens_can_be_guessed() -> None:
    guess = ApproximateTokenizer()
    assert guess.count(["", "abc", "abcde"]) == [0, 1, 2]
    assert guess.cut_middle("a" * 10 + "b" * 10, 2) == "aaaabbbb"
    assert guess.cut_middle("abc", 2) == "abc"
