"""All retention methods by the name a user writes: ours and those of installed packages."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from cache_policies.errors import PolicyError
from cache_policies.retention.base import Retention
from cache_policies.retention.compactor import Compactor
from cache_policies.retention.expected_attention import ExpectedAttention
from cache_policies.retention.h2o import H2O
from cache_policies.retention.keydiff import KeyDiff
from cache_policies.retention.knorm import Knorm
from cache_policies.retention.lagkv import LagKV
from cache_policies.retention.pyramidkv import PyramidKV
from cache_policies.retention.r_kv import RKV
from cache_policies.retention.random import Random
from cache_policies.retention.snapkv import SnapKV
from cache_policies.retention.streaming_llm import StreamingLLM
from cache_policies.retention.tova import Tova

if TYPE_CHECKING:
    from collections.abc import Mapping

BUILT_IN: tuple[type[Retention], ...] = (
    StreamingLLM, H2O, SnapKV, PyramidKV, Tova, KeyDiff, Knorm, ExpectedAttention, LagKV, RKV,
    Compactor, Random,
)  # fmt: skip
ENTRY_POINT = "kvthrift.retention"
__all__ = ["BUILT_IN", "ENTRY_POINT", "Retention", "retention_methods"]


@cache
def retention_methods() -> Mapping[str, type[Retention]]:
    """Name -> class; other packages add theirs by the entry point ``kvthrift.retention``.

    Raises:
        PolicyError: an entry point is not a retention method, or takes a name that is in use.

    """
    methods = {cls.name: cls for cls in BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT):
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Retention)):
            raise PolicyError(f"{ENTRY_POINT} entry {entry.value} is not a Retention class")
        if entry.name in methods or cls.name != entry.name:
            raise PolicyError(
                f"{ENTRY_POINT} entry {entry.name!r} is a name in use, or not its class's name"
            )
        methods[entry.name] = cls
    return methods
