"""What a worker remembers of a request that drops tokens or reads only a part of them.

Everything here is private to one request and one worker. It is rebuilt when the request starts
over, so nothing of it can reach another request.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cache_policies.pages.plan import Plan, Span
from cache_policies.step.mass import Room

if TYPE_CHECKING:
    from collections.abc import Callable

    from cache_policies.policy import Method
    from cache_policies.retention.near import NearAttention
    from cache_policies.retention.seen import QueryStatistics
    from cache_policies.step.heads import Division
    from cache_policies.step.mass import MassBuffer


@dataclass(frozen=True)
class Engine:
    """What scheduler and workers of an engine know alike.

    Attributes:
        plan: the codec's arithmetic.
        layers: attention layers of the model.
        longest: most tokens of a request, prompt and answer.
        room: pages of the pool that a request's row may take; None where no page is published to a
            prefix cache.

    """

    plan: Plan
    layers: int
    longest: int
    room: int | None


def span_of(method: Method, engine: Engine, prompt: int) -> Span:
    """The token arithmetic of a request; scheduler and workers call this alike."""
    plan, layers = engine.plan, engine.layers
    retention = method.retention
    if retention is None:
        return Span(plan, prompt)
    keeps = [retention.kept(prompt, layer, layers) for layer in range(layers)]
    interval = retention.interval if retention.DECODE_CUTS else 0

    def span(private: bool) -> Span:
        return Span(plan, prompt, max(keeps), min(keeps), retention.bounded, interval, private)

    public = span(private=False)
    fits = engine.room is not None and public.pages(engine.longest) <= engine.room
    return public if fits else span(private=True)


def _shares_nothing(method: Method, span: Span) -> bool:
    """Whether the request's pages hold something else than full attention's keys from the start."""
    return method.bounded or (span.private and span.first_cut is not None)


def published_tokens(method: Method, span: Span) -> int | None:
    """Tokens whose full pages may be published to the prefix cache; None: all.

    A page may be published if its tokens were computed under full attention.
    """
    if method.is_plain:
        return None
    if _shares_nothing(method, span):
        return 0
    return min(span.prompt, method.prefill.exact) if method.prefill else span.prompt


def readable_tokens(method: Method, span: Span) -> int | None:
    """Tokens of the prompt that may come from the prefix cache; None: as many as vLLM finds.

    The queries that a method looks at must be computed, so the prompt's last ones are not taken.
    """
    chosen = [part for part in (method.retention, method.retrieval) if part is not None]
    if not chosen:
        return None
    if any(part.NEEDS_EVERY_QUERY for part in chosen) or _shares_nothing(method, span):
        return 0
    observed = method.retention.observed_queries if method.retention else 1
    return max(0, span.prompt - observed)


@dataclass
class LayerState:
    """One request in one layer.

    Attributes:
        position: ``[num_kv_heads, held]`` int32, positions in the text of the tokens held after
            the last cut, packed by ``division``; None before the first one, when they are 0, 1,
            2, ...
        end: tokens computed at the last cut.
        mass: where attention is counted per held token; None where none is.
        queries: statistics of the prompt's queries.
        near: mass inside chunks of the prompt, for methods that ask for it.
        recent: ``[n, num_heads, head_size]``, the last queries, for methods that ask for some.
        summary: of the pages between sinks and local window, for retrieval; None once tokens
            have moved.
        sinks: ``[num_kv_heads, n, head_size]`` keys of the sinks before they were moved on.
        division: of the full pages among the heads; None: every head has as many.

    """

    position: torch.Tensor | None = None
    end: int = 0
    mass: Room | None = None
    queries: QueryStatistics | None = None
    near: NearAttention | None = None
    recent: torch.Tensor | None = None
    summary: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    division: Division | None = None

    def positions(self, heads: int, after: int, device: torch.device | None = None) -> torch.Tensor:
        """Positions of everything held or fresh once ``after`` tokens are computed.

        Below 0 where a head has no token.
        """
        new = torch.arange(self.end, after, dtype=torch.int32, device=device).expand(heads, -1)
        if self.position is None:
            return new
        held = self.division.unpacked(self.position) if self.division else self.position
        return torch.cat([held, new], 1)

    def note_recent(self, query: torch.Tensor, count: int) -> None:
        """Remember the last ``count`` of the queries so far; ``query`` are the newest."""
        newest = query[-count:].float()
        if self.recent is not None and newest.shape[0] < count:
            newest = torch.cat([self.recent, newest])[-count:]
        self.recent = newest.clone()

    def mass_for(self, buffer: MassBuffer, tokens: int) -> Room:
        """The request's room with at least ``tokens`` places, new ones zero."""
        if self.mass is None or self.mass.buffer is not buffer:  # the layer got other pages
            self.mass = Room(buffer)
        self.mass.hold(tokens)
        return self.mass


@dataclass
class Reading:
    """How much of the store a prompt's queries read, for methods that read a part.

    Attributes:
        report: called with pages read and pages there were, summed over queries, KV heads and
            layers, when the prompt is complete; None: nobody asks.
        possible: pages there were so far.
        unread: of those, pages not read.

    """

    report: Callable[[float, float], None] | None = None
    possible: int = 0
    unread: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def add(self, possible: int, unread: torch.Tensor | None, *, last: bool) -> None:
        """Count one layer of a step; ``last``: of the model, in the prompt's last step."""
        self.possible += possible
        if unread is not None:
            self.unread = self.unread + unread
        if last and self.report is not None:
            self.report(self.possible - float(self.unread), self.possible)


@dataclass
class RequestState:
    """A request whose method is not plain.

    Attributes:
        method: what stays and what is read.
        span: its token arithmetic.
        computed: tokens computed so far.
        layers: per layer index.
        reading: how much of the store the prompt's queries read.

    """

    method: Method
    span: Span
    computed: int = 0
    layers: defaultdict[int, LayerState] = field(default_factory=lambda: defaultdict(LayerState))
    reading: Reading = field(default_factory=Reading)

    def advance(self, before: int, after: int) -> None:
        """Note a step; a request that starts over forgets what it knew.

        Raises:
            RuntimeError: the step does not follow from what this worker has seen. That would
                mean that scheduler and worker disagree.

        """
        if before != self.computed or before == 0:
            self.layers.clear()
            self.reading = Reading(self.reading.report)
            if before and not self._may_begin_at(before):
                raise RuntimeError(
                    f"a request under {self.method} continues at token {before}, but this worker "
                    f"has seen {self.computed} tokens of it"
                )
        self.computed = after

    def _may_begin_at(self, before: int) -> bool:
        readable = readable_tokens(self.method, self.span)
        return readable is None or before <= readable
