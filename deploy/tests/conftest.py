from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deploy.tests.hosts import answers_of_one_host, two_hosts
from tests.engine.conftest import tiny  # noqa: F401  # a fixture

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def hosts() -> Iterator[None]:
    with two_hosts():
        yield


@pytest.fixture(scope="session")
def expected(
    tiny: str,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> list[list[int]]:
    """The tokens of one rank on one host."""
    with two_hosts():
        return answers_of_one_host(tiny, tmp_path_factory.mktemp("one host") / "log")
