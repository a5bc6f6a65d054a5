"""Whatever numbers a request gives a method: it is refused, or it runs. An engine may not end."""

from __future__ import annotations

import pytest

from cache_policies.errors import PolicyError
from cache_policies.parameters import LARGEST
from cache_policies.policy import parse_method
from cache_policies.retention import retention_methods
from cache_policies.retrieval import RETRIEVAL
from tests.cache_policies.worker import Text, Worker

TEXT = Text(350)
METHODS = {**retention_methods(), **RETRIEVAL}
NUMBERS = {
    int: (str(LARGEST), str(LARGEST - 1), "65535", "512", "129", "0", "1", "-1", f"-{LARGEST}"),
    float: ("1e-300", "1e9", "0", "-0.0", "1"),
}
BESIDE = ("", "budget=64", "ratio=0.2")


def cases(name: str) -> list[str]:
    """Each parameter at its ends, alone and beside a size; without those that are refused."""
    found = []
    for key, default in METHODS[name].settable().items():
        for value in NUMBERS.get(type(default), ()):
            for beside in BESIDE:
                if not beside.startswith(f"{key}="):
                    text = f"{name}({','.join(filter(None, (beside, f'{key}={value}')))})"
                    try:
                        parse_method(text)
                    except PolicyError:
                        continue
                    found.append(text)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_at_the_ends_of_its_ranges(name: str) -> None:
    allowed = cases(name)
    assert allowed
    for text in allowed:
        worker = Worker("raw")
        worker.run(worker.start(TEXT, text, 300), [140, 160, 1])


@pytest.mark.parametrize("name", METHODS)
def test_numbers_no_engine_can_count_with_are_refused(name: str) -> None:
    for key, default in METHODS[name].settable().items():
        for value in ("9" * 30, str(LARGEST + 1), f"-{LARGEST + 1}", "nan", "inf", "-inf"):
            if not isinstance(default, str):
                with pytest.raises(PolicyError):
                    parse_method(f"{name}({key}={value})")
