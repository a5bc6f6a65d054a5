"""Samples over engines and endpoints: levels over time, growth of counters, restarts.

Sums are summed. Ratios are means weighted by the pools of the engines they belong to. Counters are
read as Prometheus's ``increase`` does: a counter that fell began again at 0.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from loadtest.measuring.scrape import CACHE_CONFIG, KV_USE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loadtest.measuring.scrape import Sample

    Engine = tuple[str, str]  # source, and engine label
    Counted = tuple[str, str, tuple[tuple[str, str], ...]]
    Points = list[tuple[float, float]]

POOL_BYTES = "kvthrift_kv_capacity_bytes"
TOKEN_BYTES = "kvthrift_kv_token_bytes"  # noqa: S105
RATIOS = ("_ratio", "_perc", "_percent", "_share", "_info")


def is_ratio(name: str) -> bool:
    """Whether a gauge says the same of one engine as of all: it is never summed."""
    return name in (KV_USE, TOKEN_BYTES) or name.endswith(RATIOS)


def engine(sample: Sample) -> Engine:
    """The engine a sample belongs to; endpoints of one engine may not name it."""
    return sample.source, sample.labels.get("engine", "")


def by_name(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each name, in their order."""
    found: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.name].append(sample)
    return found


def pools(samples: list[Sample]) -> dict[Engine, int]:
    """Tokens that each engine's pool holds, where its endpoint says so: the latest it said."""
    found: dict[Engine, int] = {}
    for sample in samples:
        if sample.name != CACHE_CONFIG:
            continue
        tokens = _digits(sample, "kv_cache_size_tokens")
        if tokens is None:
            blocks, size = _digits(sample, "num_gpu_blocks"), _digits(sample, "block_size")
            tokens = blocks * size if blocks and size else None
        if tokens:
            found[engine(sample)] = tokens
    return found


def pool_bytes(samples: list[Sample]) -> int | None:
    """Bytes of all engines' pools: as our servers measure them, or as stock vLLM was told."""
    ours = {engine(s): int(s.value) for s in samples if s.name == POOL_BYTES}
    configs = [s for s in samples if s.name == CACHE_CONFIG]
    told = {engine(s): _digits(s, "kv_cache_memory_bytes") for s in configs}
    if ours:
        return sum(ours.values())
    known = [size for size in told.values() if size]
    return sum(known) if known and len(known) == len(told) else None


def _digits(sample: Sample, label: str) -> int | None:
    text = sample.labels.get(label, "")
    return int(text) if text.isdecimal() else None


def series(samples: list[Sample], name: str) -> Points:
    """Time and level over all engines and endpoints, from when each endpoint has been read."""
    mine = [s for s in samples if s.name == name]
    weights = _weights(mine, samples) if is_ratio(name) else None
    rounds: defaultdict[tuple[float, str], list[Sample]] = defaultdict(list)
    for sample in mine:
        rounds[sample.time, sample.source].append(sample)
    sources = {source for _, source in rounds}
    last: dict[str, list[Sample]] = {}
    points: Points = []
    for (time, source), read in sorted(rounds.items(), key=lambda found: found[0]):
        last[source] = read
        if len(last) == len(sources):
            points.append((time, _level(list(chain(*last.values())), weights)))
    return points


def _weights(mine: list[Sample], samples: list[Sample]) -> dict[Engine, float]:
    """Size of each engine's pool; alike where one of them does not say."""
    engines = {engine(s) for s in mine}
    bytes_ = {engine(s): int(s.value) for s in samples if s.name == POOL_BYTES}
    ours = bool(mine) and mine[0].name.startswith("kvthrift_")
    for sizes in (bytes_ if ours else {}, pools(samples)):
        found = {e: _pool_of(e, sizes, engines) for e in engines}
        if all(found.values()):
            return {e: float(size) for e, size in found.items() if size}
    return dict.fromkeys(engines, 1.0)


def _pool_of(wanted: Engine, sizes: dict[Engine, int], engines: set[Engine]) -> int | None:
    """Its size; an endpoint of one engine may name it in one metric and not in another."""
    here = [size for (source, _), size in sizes.items() if source == wanted[0]]
    alone = sum(source == wanted[0] for source, _ in engines) == 1
    return sizes.get(wanted) or (here[0] if alone and len(here) == 1 else None)


def _level(read: list[Sample], weights: dict[Engine, float] | None) -> float:
    if weights is None:
        return sum(s.value for s in read)
    sizes = [weights[engine(s)] for s in read]
    return sum(size * s.value for size, s in zip(sizes, read, strict=True)) / sum(sizes)


def increase(samples: list[Sample], name: str) -> float | None:
    """Growth of a counter over the run; None without two readings of an endpoint that has it.

    Each engine's counter and each label is followed for itself. One that is new at an endpoint
    which was read before began at 0.
    """
    mine = [s for s in samples if s.name == name]
    first = _first_times(samples)
    grown = 0.0
    known = False
    for values in _each(mine).values():
        start = values[0]
        before = start.value if start.time <= first[start.source] else 0.0
        steps = pairwise([before, *(s.value for s in values)])
        grown += sum(b - a if b >= a else b for a, b in steps)
        known = known or values[-1].time > first[start.source]
    return grown if known else None


def _first_times(samples: list[Sample]) -> dict[str, float]:
    first: dict[str, float] = {}
    for sample in samples:
        first[sample.source] = min(sample.time, first.get(sample.source, sample.time))
    return first


def _each(samples: Iterable[Sample]) -> dict[Counted, list[Sample]]:
    """Samples of each counter, by endpoint, name and labels, in the order of time."""
    found: defaultdict[Counted, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.source, sample.name, tuple(sorted(sample.labels.items()))].append(sample)
    for values in found.values():
        values.sort(key=lambda s: s.time)
    return found


def restarts(samples: list[Sample]) -> int:
    """Times at which an endpoint's counters fell: it, or an engine behind it, began again."""
    growing = (s for s in samples if s.grows)
    return len(
        {
            (b.source, b.time)
            for values in _each(growing).values()
            for a, b in pairwise(values)
            if b.value < a.value
        }
    )
