"""The long-context benchmark: what it fits, shows, and does not begin."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from benchmarks.long_context import ANSWER, LENGTHS, MODELS, QUICK, expected, measure, parse
from benchmarks.long_context_report import Row, exponents, read_rows, write_report

if TYPE_CHECKING:
    from pathlib import Path

BLANK = Row(model="m", policy="p", length=0, memory=2**20)


def rows(exponent: float) -> list[Row]:
    return [
        replace(BLANK, length=n, ttft=1e-6 * n**exponent, tpot=0.01, pool_peak=n * 2.0**10)
        for n in QUICK
    ]


@pytest.mark.parametrize("exponent", [1.0, 1.7, 2.0])
def test_growth_is_fitted(exponent: float) -> None:
    found = exponents([*rows(exponent), replace(BLANK, length=2**15, note="out of memory")])
    assert found[("m", "p")]["ttft"] == pytest.approx(exponent)
    assert found[("m", "p")]["tpot"] == pytest.approx(0.0, abs=1e-9)
    assert exponents(rows(exponent)[:2]) == {}


def test_the_report_names_what_has_no_number(tmp_path: Path) -> None:
    lost = replace(BLANK, policy="stock", length=2**15, note="out of memory: 9 GiB")
    write_report([lost, *rows(2.0)], tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| m | stock | 32,768 | - | - | - | - | - | - | - | out of memory: 9 GiB |" in table
    assert "| m | p | 4,096 | 16.78 | - | 10.0 | 4 |" in table
    assert "| m | p | 2.00 | -0.00 |" in table.replace("| 0.00 |", "| -0.00 |")
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["rows"]) == 4
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_run_goes_on_where_one_ended(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    lost = replace(BLANK, policy="stock", length=2**15, note="out of memory: 9 GiB")
    later = replace(BLANK, length=2**17, note="not begun: about 900 s, 20 s left")
    write_report([*rows(2.0), later, lost], tmp_path)
    assert read_rows(tmp_path) == [*rows(2.0), lost]
    given = parse(["--lengths", "4096", "8192", "--model", "gemma3-270m"])
    model, until = replace(MODELS["gemma3-270m"], name="m"), time.monotonic()
    assert list(measure(model, "p", 2**20, rows(2.0), until, given)) == []  # no server is started


def test_what_takes_too_long_is_foreseen() -> None:
    assert expected([], 4096, 3) == 0.0
    known = [replace(BLANK, length=4096, ttft=10.0, tpot=0.1)]
    assert expected(known, 8192, 2) == pytest.approx(2 * (40.0 + ANSWER * 0.1))


def test_the_short_form_and_the_full_one() -> None:
    short, full = parse([]), parse(["--full"])
    assert (short.minutes, full.minutes) == (10.0, 90.0)
    assert (tuple(short.lengths), tuple(full.lengths)) == (QUICK, LENGTHS)
    assert len(full.models) == 2
    assert parse(["--memory", "1G"]).memory == 2**30
