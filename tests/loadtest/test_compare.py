from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.commands import compare
from loadtest.commands.compare import Comparison, Variant
from loadtest.commands.session import Settings
from loadtest.errors import NO_SERVER, SOME_FAILED, LoadTestError
from loadtest.measuring.summary import summarize
from loadtest.sending.arrivals import parse_arrivals
from loadtest.workloads import parse_workload
from tests.loadtest.test_summary import SETUP

if TYPE_CHECKING:
    from pathlib import Path


def comparison(policies: list[str], **changed: Any) -> Comparison:
    settings = Settings(parse_workload("passkey"), parse_arrivals("closed"))
    given: dict[str, Any] = {
        "model": "m", "policies": policies, "stock": True, "memory": "2M", "flags": ["--x"],
        "settings": settings, "arrivals": [parse_arrivals("closed")], "timeout": 1.0,
    }  # fmt: skip
    return Comparison.of(**given | changed)


def test_methods_share_the_server_of_their_codec() -> None:
    made = comparison(["kivi-4bit", "snapkv(budget=64)+kivi-4bit", "fp16", "kivi-4bit"])
    servers = made.servers()
    assert list(servers) == [("m", None), ("m", "kivi-4bit"), ("m", "fp16")]
    assert servers["m", "kivi-4bit"] == [
        Variant("kivi-4bit", "kivi-4bit", "all"),
        Variant("snapkv(budget=64)+kivi-4bit", "kivi-4bit", "snapkv(budget=64)"),
    ]
    assert made.arguments(("m", "fp16"))[:3] == ["m", "--cache-policy", "fp16"]
    assert made.arguments(("m", None))[:3] == ["m", "--kv-cache-memory-bytes", str(2 << 20)]


def test_the_same_load_twice_is_refused(tmp_path: Path) -> None:
    loads = [parse_arrivals(x) for x in ("closed", "closed(concurrency=4)")]
    with pytest.raises(LoadTestError, match=r"closed\(concurrency=4\) is given twice"):
        comparison(["fp16"], arrivals=loads)
    loads = [parse_arrivals("closed"), parse_arrivals("closed(concurrency=2)")]
    made = comparison(["fp16", "snapkv(budget=64)"], arrivals=loads)
    folders = {made.folder(tmp_path, v, a) for v in made.variants for a in loads}
    assert len(folders) == 6


def test_a_run_with_failures_does_not_end_the_others_and_an_interruption_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []
    codes = {"kivi-4bit": 1, "h2o+kivi-4bit": 3, "tova+kivi-4bit": 130, "knorm+kivi-4bit": 0}

    @contextlib.contextmanager
    def server(*_: Any, **__: Any) -> Any:
        yield SimpleNamespace(url="u", pid=1)

    def run(_: Any, variant: Variant, *__: Any) -> int:
        ran.append(variant.label)
        return codes[variant.label]

    monkeypatch.setattr(compare, "running_server", server)
    monkeypatch.setattr(compare, "_run", run)
    made = comparison(list(codes), stock=False)
    with pytest.raises(LoadTestError, match="no run was finished") as error:
        compare.run_comparison(made, tmp_path)
    assert ran == ["kivi-4bit", "h2o+kivi-4bit", "tova+kivi-4bit"]
    assert error.value.status == 130


def test_a_server_that_dies_between_two_rows_ends_those_that_need_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was measured before is reported."""
    ran: list[str] = []

    @contextlib.contextmanager
    def server(*_: Any, **__: Any) -> Any:
        yield SimpleNamespace(url="u", pid=1)

    def run(_: Any, variant: Variant, __: Any, folder: Path, *___: Any) -> int:
        ran.append(variant.label)
        if variant.method == "h2o":
            raise LoadTestError("http://u answers nothing", NO_SERVER)
        folder.mkdir()
        (folder / "summary.json").write_text(summarize(SETUP, [], [], planned=0).model_dump_json())
        return 0

    monkeypatch.setattr(compare, "running_server", server)
    monkeypatch.setattr(compare, "_run", run)
    monkeypatch.setattr(compare, "finish", lambda done, *_: ran.append(f"{len(done)} reported"))
    made = comparison(["kivi-4bit", "h2o+kivi-4bit", "fp16"], stock=False)
    assert compare.run_comparison(made, tmp_path) == SOME_FAILED
    assert ran == ["kivi-4bit", "h2o+kivi-4bit", "fp16", "2 reported"]
    assert "h2o+kivi-4bit: http://u answers nothing" in capsys.readouterr().out


def test_a_run_of_another_load_is_kept_beside(tmp_path: Path) -> None:
    loads = [[parse_arrivals(f"closed(concurrency={n})") for n in some] for some in ([2], [8, 2])]
    made = [comparison(["fp16"], arrivals=some) for some in loads]
    (one, *_), two = (m.variants for m in made)
    assert made[0].folder(tmp_path, one, loads[0][0]) == made[1].folder(
        tmp_path, two[0], loads[1][1]
    )
