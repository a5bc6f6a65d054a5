"""One step of a batch in which requests drop tokens or read a part of them.

``Step.run`` does for one layer what ``attend`` and ``append`` do for plain requests: attend,
count attention where a method asks for it, write the fresh tokens, and cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from cache_policies.kernels.contract import Batch, Mass
from cache_policies.retention.base import QueryStatistics
from cache_policies.step.cut import Cut
from cache_policies.step.reads import Choice, reads_of, sparse_choice, unread_pages

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cache_policies.kernels.contract import Reads
    from cache_policies.pages.plan import Plan
    from cache_policies.retention import Retention
    from cache_policies.retrieval import Retrieval
    from cache_policies.step.cut import Layer, Tokens
    from cache_policies.step.request import RequestState


@dataclass
class Step:
    """A batch with at least one request that is not plain.

    Attributes:
        plan: the codec's arithmetic.
        query_start: ``[num_seqs + 1]`` int32.
        computed: ``[num_seqs]`` int32, tokens computed before the step.
        states: per request, None for plain ones.
        block_table: ``[num_seqs, row]`` int32.

    """

    plan: Plan
    query_start: npt.NDArray[np.int32]
    computed: npt.NDArray[np.int32]
    states: list[RequestState | None]
    block_table: torch.Tensor
    _batches: dict[tuple[int, ...], tuple[Batch, list[Cut]]] = field(default_factory=dict)

    def run(self, layer: Layer, tokens: Tokens, output: torch.Tensor) -> None:
        """Attend, append and cut in one layer."""
        clock = layer.clock
        clock.start()
        batch, cuts = self._batch(layer)
        kernel, pages = layer.kernel, layer.pages
        mass, reads = self._mass(layer, batch, cuts), self._reads(layer, batch, tokens)
        kernel.attend(pages, batch, *tokens, output, mass, reads)
        self._note_queries(layer, tokens.query)
        clock.lap("attend")
        kernel.append(pages, batch, tokens.key, tokens.value)
        clock.lap("append")
        for cut in cuts:
            cut.run(layer, batch, tokens)
        clock.lap("cut")

    @cached_property
    def _evicting(self) -> list[tuple[int, RequestState, Retention]]:
        """Requests under a retention method, with their place in the batch."""
        pairs = ((seq, state) for seq, state in enumerate(self.states) if state is not None)
        return [(q, s, s.method.retention) for q, s in pairs if s.method.retention is not None]

    @cached_property
    def _retrieving(self) -> list[tuple[int, RequestState, Retrieval]]:
        """Requests under a retrieval method, with their place in the batch."""
        pairs = ((seq, state) for seq, state in enumerate(self.states) if state is not None)
        return [(q, s, s.method.retrieval) for q, s in pairs if s.method.retrieval is not None]

    # ---- the batch of a layer

    def _batch(self, layer: Layer) -> tuple[Batch, list[Cut]]:
        """Counts and cuts; layers in which every request keeps as much share them."""
        keeps = tuple(
            retention.kept(state.span.prompt, layer.index, layer.layers)
            for _, state, retention in self._evicting
        )
        if keeps not in self._batches:
            self._batches[keeps] = self._make_batch(keeps)
        return self._batches[keeps]

    def _make_batch(self, keeps: tuple[int, ...]) -> tuple[Batch, list[Cut]]:
        batch = Batch.of(self.plan, self.query_start, self.computed, self.block_table)
        cuts: list[Cut] = []
        for (seq, state, _), keep in zip(self._evicting, keeps, strict=True):
            before, fresh = int(self.computed[seq]), self._fresh(seq)
            span, after = state.span, before + fresh
            held, appended = span.held(before, keep), fresh
            if span.is_cut(before, after, keep):
                moves = span.moved(after) and not span.moved(before)
                appended = span.first_cut - before if moves and not span.private else 0  # type: ignore[operator]
                target = span.held(after, keep)
                cuts.append(Cut(seq, state, before, fresh, held, appended, target, moves))
            stored = self.plan.stored(held)
            batch.stored[seq], batch.ring[seq] = stored, held - stored
            batch.appended[seq] = appended
            batch.stored_after[seq] = self.plan.stored(held + appended) if appended else stored
            batch.store_row[seq] = span.store_row(before)
        return batch, cuts

    def _fresh(self, seq: int) -> int:
        return int(self.query_start[seq + 1] - self.query_start[seq])

    # ---- attention to be counted

    def _mass(self, layer: Layer, batch: Batch, cuts: list[Cut]) -> Mass | None:
        cutting = {cut.seq for cut in cuts}
        wanted: dict[int, tuple[int, int]] = {}  # first query and first token, both as positions
        for seq, state, retention in self._evicting:
            before, after = int(self.computed[seq]), int(self.computed[seq]) + self._fresh(seq)
            first = retention.first_query(before, after, state.span.prompt, seq in cutting)
            if first is not None:
                wanted[seq] = first, 0
        for seq, _, retrieval in self._retrieving:
            if retrieval.OBSERVES:
                before = int(self.computed[seq])
                wanted[seq] = before, max(0, before - retrieval.OBSERVES)
        if not wanted:
            return None
        out: list[torch.Tensor | None] = [None] * len(self.states)
        first_query = torch.zeros(len(self.states), dtype=torch.int32)
        first_token = torch.zeros(len(self.states), dtype=torch.int32)
        for seq, (query, token) in wanted.items():
            first_query[seq], first_token[seq] = query - int(self.computed[seq]), token
            out[seq] = self._buffer(layer, batch, seq)
        return Mass(first_query, first_token, out)

    def _buffer(self, layer: Layer, batch: Batch, seq: int) -> torch.Tensor:
        """Where a request's mass is counted."""
        state = self.states[seq]
        assert state is not None
        needed = int(batch.stored[seq] + batch.ring[seq]) + self._fresh(seq)
        buffer = state.layers[layer.index].mass_for(layer.heads, needed)
        retention = state.method.retention
        if retention is not None and not retention.ACCUMULATES:
            buffer.zero_()
        return buffer

    def _note_queries(self, layer: Layer, query: torch.Tensor) -> None:
        for seq, state, retention in self._evicting:
            if not retention.USES_QUERIES:
                continue
            before = int(self.computed[seq])
            skip = max(0, getattr(retention, "sinks", 0) - before)
            count = min(self._fresh(seq), state.span.prompt - before)
            if count <= skip:
                continue
            known = state.layers[layer.index]
            if known.queries is None:
                known.queries = QueryStatistics(layer.rope, layer.scale)
            start = int(self.query_start[seq])
            known.queries.add(query[start + skip : start + count], before + skip)

    # ---- pages to be read

    def _reads(self, layer: Layer, batch: Batch, tokens: Tokens) -> Reads | None:
        chosen = self._sparse(layer, batch, tokens)
        for seq, state, retrieval in self._retrieving:
            before = int(self.computed[seq])
            if before < state.span.prompt and not retrieval.bounded:
                continue
            total = -(-int(batch.stored[seq]) // self.plan.page_tokens)
            middle = retrieval.middle(before, self.plan.page_tokens)
            middle = range(middle.start, min(middle.stop, self.plan.full_pages(before)))
            if len(middle) <= retrieval.topk:
                continue
            summary = self._summary(layer, batch, seq, middle, tokens)
            start, end = int(self.query_start[seq]), int(self.query_start[seq + 1])
            query = tokens.query[start:end].float().mean(0).unflatten(0, (layer.heads, -1))
            row = retrieval.choose(query, summary, middle, total)
            count = torch.full((1, layer.heads), row.shape[1], dtype=torch.int32)
            chosen.append(Choice(seq, None, row[None], count))
        return reads_of(chosen, [self._fresh(seq) for seq in range(len(self.states))], layer.heads)

    def _sparse(self, layer: Layer, batch: Batch, tokens: Tokens) -> list[Choice]:
        """What the prompts' queries read under a sparse prefill."""
        choices = []
        for seq, state in enumerate(self.states):
            if state is None or state.method.prefill is None:
                continue
            before, fresh = int(self.computed[seq]), self._fresh(seq)
            if before >= state.span.prompt:
                continue
            sparse = state.method.prefill
            blocks = sparse.blocks(before, fresh, state.span.prompt) if before else range(0)
            if blocks:
                choices.append(sparse_choice(sparse, layer, batch, tokens, seq, blocks, fresh))
            stored_pages = self.plan.store_pages(int(batch.stored[seq]))
            unread = unread_pages(choices[-1], stored_pages, fresh) if blocks else None
            ends = before + fresh >= state.span.prompt
            state.reading.add(fresh * stored_pages * layer.heads, unread, last=ends)
        return choices

    def _summary(
        self, layer: Layer, batch: Batch, seq: int, middle: range, tokens: Tokens
    ) -> torch.Tensor:
        """Summaries of the pages in ``middle``; those of new ones are made from their keys."""
        state = self.states[seq]
        assert state is not None
        assert state.method.retrieval is not None
        known = state.layers[layer.index]
        have = 0 if known.summary is None else known.summary.shape[1]
        if have < len(middle):
            size = self.plan.page_tokens
            span = range((middle.start + have) * size, middle.stop * size)
            index = torch.arange(span.start, span.stop, dtype=torch.int32)
            index = index.expand(layer.heads, -1).contiguous()
            row = int(batch.store_row[seq])
            one = batch.one(seq, held=span.stop, stored=span.stop, store_row=row)
            keys, _ = layer.kernel.read(layer.pages, one, tokens.key, tokens.value, index)
            mass = known.mass_for(layer.heads, span.stop)[:, span.start : span.stop]
            shape = (len(middle) - have, size)
            new = state.method.retrieval.summarize(
                keys.unflatten(1, shape), mass.unflatten(1, shape)
            )
            known.summary = new if known.summary is None else torch.cat([known.summary, new], 1)
        assert known.summary is not None
        return known.summary
