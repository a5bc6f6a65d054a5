"""Several models in one comparison: one text, each with its own policies, in one picture."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from typer.main import get_command

from loadtest.commands import compare, rows, shared
from loadtest.commands.compare import STOCK, Variant, short_names
from loadtest.commands.rows import Asked, by_model
from loadtest.commands.session import Settings
from loadtest.errors import LoadTestError
from loadtest.measuring.scrape import CACHE_CONFIG, KV_USE, RUNNING, Sample
from loadtest.measuring.server_side import server_side
from loadtest.measuring.summary import summarize
from loadtest.report.data import Run
from loadtest.report.plots import pareto
from loadtest.sending.arrivals import parse_arrivals
from loadtest.sending.client import Target
from loadtest.workloads import Item, parse_workload
from server.cli import app
from server.serve import make_parser
from tests.loadtest.conftest import running_mock
from tests.loadtest.test_command import summary
from tests.loadtest.test_compare import comparison
from tests.loadtest.test_summary import SETUP, record

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Command


@pytest.mark.parametrize(
    ("first", "line", "found"),
    [
        ("a", "a --policy x -p y --stock", [Asked("a", ["x", "y"], True)]),
        ("a", "a -p x --model b --policy=y", [Asked("a", ["x"]), Asked("b", ["y"])]),
        (None, "--model a -px --model=b", [Asked("a", ["x"]), Asked("b")]),
        (None, "-p x --stock --model a --model b -p y",
         [Asked("a", ["x"], True), Asked("b", ["x", "y"], True)]),
        ("a", "a --stock --model b --no-stock", [Asked("a", [], True), Asked("b")]),
        (None, "-p x", []),
        (None, "-p=x --model a", [Asked("a", ["x"])]),
    ],
)  # fmt: skip
def test_policies_belong_to_the_model_before_them(
    first: str | None, line: str, found: list[Asked]
) -> None:
    assert by_model(first, line.split()) == found


def test_the_command_line_keeps_its_order_and_the_servers_flags(
    monkeypatch: pytest.MonkeyPatch, kvthrift: Command, tmp_path: Path
) -> None:
    made: list[compare.Comparison] = []
    monkeypatch.setattr(compare, "run_comparison", lambda c, _: made.append(c) or 0)
    line = ["compare", "--max-model-len", "512", "--model", "x/one", "-p", "kivi-4bit"]
    line += ["--enforce-eager", "--model", "y/two", "-o", str(tmp_path), "--stock"]
    done = kvthrift(*line)
    assert done.returncode == 0, done.stderr
    line = ["compare", "one", "--max-model-len", "512", "--policy", "fp16", "-o", str(tmp_path)]
    assert kvthrift(*line).returncode == 0
    assert made[0].flags == ("--max-model-len", "512", "--enforce-eager")
    assert [v.label for v in made[0].variants] == ["one: kivi-4bit", f"two: {STOCK}"]
    assert list(made[0].servers()) == [("x/one", "kivi-4bit"), ("y/two", None)]
    assert (made[1].models, made[1].flags) == (("one",), ("--max-model-len", "512"))
    assert [v.label for v in made[1].variants] == ["fp16"]
    done = kvthrift("compare", "--policy", "fp16")
    assert (done.returncode, "which model?" in done.stderr) == (2, True)
    assert isinstance(get_command(app).commands["compare"], rows.Ordered)  # type: ignore[attr-defined]


def test_vllms_short_flags_of_several_letters_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, kvthrift: Command, tmp_path: Path
) -> None:
    made: list[compare.Comparison] = []
    monkeypatch.setattr(compare, "run_comparison", lambda c, _: made.append(c) or 0)
    line = ["compare", "m", "--stock", "-tp", "2", "-pp=3", "-ep", "-o", str(tmp_path)]
    done = kvthrift(*line)
    assert done.returncode == 0, done.stderr
    assert made[0].flags == (
        "--tensor-parallel-size", "2", "--pipeline-parallel-size=3", "--enable-expert-parallel",
    )  # fmt: skip
    flags = (action.option_strings for action in make_parser()._actions)
    short = {
        name: next(long for long in some if long.startswith("--"))
        for some in flags
        for name in some
        if not name.startswith("--") and len(name) > 2
    }
    assert short == rows.SHORT


def test_rows_of_several_models() -> None:
    made = comparison(["fp16"], stock=True, others=[Asked("n"), Asked("o", ["snapkv+fp16"])])
    assert made.variants == (
        Variant(STOCK, None, None, "m", "m"),
        Variant("fp16", "fp16", "all", "m", "m"),
        Variant(STOCK, None, None, "n", "n"),
        Variant("snapkv+fp16", "fp16", "snapkv", "o", "o"),
    )
    assert made.plan["model"] == "m | n | o"
    names = [made.server_name(served) for served in made.servers()]
    assert names == [f"m: {STOCK}", "m: fp16", f"n: {STOCK}", "o: fp16"]
    assert made.arguments(("n", None))[:2] == ["n", "--kv-cache-memory-bytes"]
    assert short_names(["a/x", "b/y/"]) == {"a/x": "x", "b/y/": "y"}
    assert short_names(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
    for others in ([Asked("m")], [Asked("")]):
        with pytest.raises(LoadTestError, match="the same model twice"):
            comparison(["fp16"], others=others)
    with pytest.raises(LoadTestError, match="give --policy, or --stock"):
        comparison([], stock=False)


def test_all_models_get_the_same_text_and_are_in_one_report(
    monkeypatch: pytest.MonkeyPatch, kvthrift: Command, tmp_path: Path
) -> None:
    started: list[list[str]] = []

    @contextlib.contextmanager
    def server(arguments: list[str], *_: Any, **__: Any) -> Any:
        started.append(arguments)
        with running_mock(ttft=0.01, itl=0.001) as url:
            yield SimpleNamespace(url=url, pid=None)

    monkeypatch.setattr(compare, "running_server", server)
    line = ["compare", "a/one", "--stock", "--model", "b/two", "--warmup", "0", "-o", str(tmp_path)]
    done = kvthrift(*line, "-w", "passkey(lengths=200,depths=0.5,texts=noise,digits=7)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [a[0] for a in started] == ["a/one", "b/two"]
    folders = [tmp_path / f"{name}_stock_vLLM@closed_concurrency=4" for name in ("one", "two")]
    found = [summary(folder) for folder in folders]
    assert found[0].setup.workload_hash == found[1].setup.workload_hash
    assert [s.setup.label for s in found] == ["one: stock vLLM", "two: stock vLLM"]
    assert found[0].requests.prompt_tokens
    page = (tmp_path / "report.html").read_text()
    assert "two: stock vLLM" in page
    # a second call keeps the runs, and the text
    text = (tmp_path / "prompts.jsonl").read_text()
    again = kvthrift(*line, "-w", "passkey(lengths=200,depths=0.5,texts=noise,digits=7)")
    assert again.stdout.count("kept from before") == 2
    assert (tmp_path / "prompts.jsonl").read_text() == text
    other = kvthrift("compare", "a/one", "--stock", "-o", str(tmp_path))
    assert (other.returncode, "runs with another model" in other.stderr) == (2, True)


def test_text_is_kept_and_what_a_model_cannot_take_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(
        parse_workload("synthetic(requests=2,input=fixed:50,output=fixed:8)"),
        parse_arrivals("closed"),
        tokenizer="approximate",
    )
    path = tmp_path / "prompts.jsonl"
    first = shared.shared_items(path, settings, Target("u", "m", longest=100))
    with monkeypatch.context() as patch:
        patch.setattr(shared, "build_items", None)  # is not asked again
        again = shared.shared_items(path, settings, Target("u", "m"))
        assert again == first
        assert all(isinstance(item, Item) for item in again)
        with pytest.raises(shared.UnfitError, match=r"and 1 other requests.*the server takes 40"):
            shared.shared_items(path, settings, Target("u", "m", longest=40))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()]


def measured(label: str, *, memory: int | None, use: float, score: float) -> Run:
    told = {"kv_cache_memory_bytes": str(memory)} if memory else {}
    samples = [
        Sample(float(t), "a", name, labels, value)
        for t in range(3)
        for name, labels, value in (
            (KV_USE, {}, use),
            (RUNNING, {}, 4.0),
            (CACHE_CONFIG, told, 1.0),
        )
    ]
    setup = SETUP.model_copy(update={"label": label, "model": label})
    found = summarize(setup, [record(score=score)], samples, planned=1)
    return Run(found, [], samples)


def test_memory_of_a_request_is_on_the_pictures_axis() -> None:
    cached = measured("cache", memory=100 << 20, use=0.8, score=0.9)
    state = measured("state", memory=100 << 20, use=0.04, score=0.5)
    assert cached.summary.server is not None
    # 4 requests use 80 MiB of 100: 20 MiB each
    assert cached.summary.server.bytes_per_request == pytest.approx(20 << 20)
    assert state.summary.get("server.bytes_per_request") == pytest.approx(1 << 20)
    figure = pareto([cached, state])
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_xlabel() == "cache memory of a request, MiB (measured)\n(100 prompt tokens)"
    places = [float(box[0].get_xdata()[0]) for box in axis.containers]  # type: ignore[index]
    assert places == pytest.approx([20, 1])
    assert axis.get_xscale() == "log"
    unknown = measured("other", memory=None, use=0.5, score=0.5)
    figure = pareto([cached, unknown])
    assert figure is not None
    assert "fit in the cache at once" in figure.axes[0].get_xlabel()


def test_bytes_of_pools() -> None:
    def found(*samples: Sample) -> int | None:
        side = server_side(list(samples))
        assert side is not None
        return side.capacity_bytes

    def config(source: str, told: str | None) -> Sample:
        return Sample(0, source, CACHE_CONFIG, {"kv_cache_memory_bytes": told} if told else {}, 1.0)

    ours = [
        Sample(t, "a", "kvthrift_kv_capacity_bytes", {"engine": e}, 10.0)
        for t in (0, 1)
        for e in "01"
    ]
    assert found(*ours, config("a", "7")) == 20
    assert found(config("a", "7"), config("b", "8")) == 15
    assert found(config("a", "7"), config("b", "None")) is None
    assert found(config("a", None)) is None
