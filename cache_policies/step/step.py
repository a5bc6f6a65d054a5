"""One step of a batch in which requests drop tokens or read a part of them.

``Step.run`` does for one layer what ``attend`` and ``append`` do for plain requests: attend,
count attention where a method asks for it, write the fresh tokens, and cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache_policies.kernels.contract import Batch, Mass
from cache_policies.retention.adaptive import Budgets
from cache_policies.retention.near import NearAttention
from cache_policies.retention.seen import QueryStatistics
from cache_policies.step.cut import Cut, Cuts
from cache_policies.step.heads import Slots
from cache_policies.step.reads import Choice, reads_of, sparse_choice, unread_pages

if TYPE_CHECKING:
    import numpy.typing as npt

    from cache_policies.kernels.contract import Reads
    from cache_policies.kernels.counts import Buffers
    from cache_policies.pages.plan import Plan
    from cache_policies.retention import Retention
    from cache_policies.retrieval import Retrieval
    from cache_policies.step.cut import Layer, Tokens
    from cache_policies.step.heads import Division
    from cache_policies.step.request import RequestState


@dataclass
class LayerStep:
    """A step in the layers in which every request keeps as much.

    Attributes:
        slots: counts and block table, and slot maps of heads that own unequal numbers of pages.
        cuts: requests that drop tokens or move at the end of the step.
        counted: by request the first query, among the fresh ones, and the first token whose
            attention is counted.

    """

    slots: Slots
    cuts: Cuts
    counted: dict[int, tuple[int, int]]
    _masses: dict[tuple[int, ...], Mass] = field(default_factory=dict)

    def mass(self, place: tuple[int, ...], out: torch.Tensor) -> Mass:
        """Count into these places; layers whose requests have the same ones share the counts."""
        if place not in self._masses:
            first = np.zeros((2, len(place)), dtype=np.int32)
            for seq, pair in self.counted.items():
                first[:, seq] = pair
            query, token = torch.from_numpy(first)
            self._masses[place] = Mass(query, token, torch.tensor(place, dtype=torch.int32), out)
        return self._masses[place].into(out)


@dataclass
class Step:
    """A batch with at least one request that is not plain.

    Attributes:
        plan: the codec's arithmetic.
        query_start: ``[num_seqs + 1]`` int32.
        computed: ``[num_seqs]`` int32, tokens computed before the step.
        states: per request, None for plain ones.
        block_table: ``[num_seqs, row]`` int32.
        buffers: memory for the counts on a device.

    """

    plan: Plan
    query_start: npt.NDArray[np.int32]
    computed: npt.NDArray[np.int32]
    states: list[RequestState | None]
    block_table: torch.Tensor
    buffers: Buffers | None = None
    _batches: dict[tuple[object, ...], LayerStep] = field(default_factory=dict)

    def run(self, layer: Layer, tokens: Tokens, output: torch.Tensor) -> None:
        """Attend, append and cut in one layer."""
        clock = layer.clock
        clock.start()
        divisions = self._divisions(layer)
        of_layer = self._of_layer(layer, divisions)
        slots, kernel, pages = of_layer.slots, layer.kernel, layer.pages
        batch, own = slots.given(divisions, layer.slots), slots.reads(divisions, layer.reads)
        mass, reads = self._mass(layer, of_layer), self._reads(layer, batch, tokens, own)
        kernel.attend(pages, batch, *tokens, output, mass, reads)
        self._note_prompt(layer, tokens)
        clock.lap("attend")
        kernel.append(pages, batch, tokens.key, tokens.value)
        clock.lap("append")
        of_layer.cuts.run(layer, tokens, divisions)
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

    def _of_layer(self, layer: Layer, divisions: dict[int, Division]) -> LayerStep:
        """Counts and cuts; layers in which every request keeps as much share them."""
        keeps = tuple(
            retention.kept(state.span.prompt, layer.index, layer.layers)
            for _, state, retention in self._evicting
        )
        held = {seq: division.budgets for seq, division in divisions.items()}
        key = keeps, tuple(held.items()), layer.heads
        if key not in self._batches:
            self._batches[key] = self._make(keeps, held, layer.heads)
        return self._batches[key]

    def _divisions(self, layer: Layer) -> dict[int, Division]:
        """Requests whose heads own unequal numbers of pages of the layer."""
        known = ((seq, state.layers[layer.index].division) for seq, state, _ in self._evicting)
        return {seq: division for seq, division in known if division is not None}

    def _make(self, keeps: tuple[int, ...], uneven: dict[int, Budgets], heads: int) -> LayerStep:
        batch = Batch.of(self.plan, self.query_start, self.computed, self.block_table, self.buffers)
        counts, cuts, places = batch.host, [], {}
        for (seq, state, retention), keep in zip(self._evicting, keeps, strict=True):
            before, fresh = int(self.computed[seq]), self._fresh(seq)
            span, after, budgets = state.span, before + fresh, uneven.get(seq)
            mean, appended = span.held(before, keep), fresh
            held = mean + budgets.lead if budgets else mean
            if span.is_cut(before, after, keep):
                moves = span.moved(after) and not span.moved(before)
                appended = span.first_cut - before if moves and not span.private else 0  # type: ignore[operator]
                target, new = span.held(after, keep), None
                if retention.adaptive and target < mean + fresh:
                    new = Budgets.of(heads, target, held + fresh, self.plan.page_tokens)
                    target += new.lead
                cuts.append(Cut(seq, state, before, fresh, held, appended, target, moves, new))
            stored = self.plan.stored(held)
            counts.stored[seq], counts.ring[seq] = stored, held - stored
            counts.appended[seq] = appended
            counts.stored_after[seq] = self.plan.stored(held + appended) if appended else stored
            counts.store_row[seq] = self.plan.ring_pages if budgets else span.store_row(before)
            if budgets:
                places[seq] = budgets, span.store_row(before)
        slots, source = (Slots(x, self.plan, heads, places) for x in (batch, batch.after_append()))
        cutting = Cuts(cuts, source, self._after(source.batch, cuts, heads))
        return LayerStep(slots, cutting, self._counted(batch, cuts))

    def _after(self, source: Batch, cuts: list[Cut], heads: int) -> Slots:
        """The counts when the cuts are done."""
        places = {}
        stored, ring, row = source.stored.clone(), source.ring.clone(), source.store_row.clone()
        for cut in cuts:
            held = self.plan.stored(cut.target)
            stored.numpy()[cut.seq], ring.numpy()[cut.seq] = held, cut.target - held
            first = cut.state.span.store_row(cut.before + cut.fresh)
            row.numpy()[cut.seq] = self.plan.ring_pages if cut.budgets else first
            if cut.budgets:
                places[cut.seq] = cut.budgets, first
        after = replace(source, stored=stored, ring=ring, stored_after=stored, store_row=row)
        return Slots(after, self.plan, heads, places)

    def _fresh(self, seq: int) -> int:
        return int(self.query_start[seq + 1] - self.query_start[seq])

    @staticmethod
    def _held(batch: Batch, seq: int) -> int:
        """Tokens a request holds before the step, in the layers of this batch."""
        return int(batch.host.stored[seq] + batch.host.ring[seq])

    # ---- attention to be counted

    def _counted(self, batch: Batch, cuts: list[Cut]) -> dict[int, tuple[int, int]]:
        """First query and first token whose attention is counted, by request."""
        cutting = {cut.seq for cut in cuts}
        wanted: dict[int, tuple[int, int]] = {}
        for seq, state, retention in self._evicting:
            if not state.span.drops:  # nothing will be chosen
                continue
            before, after = int(self.computed[seq]), int(self.computed[seq]) + self._fresh(seq)
            first = retention.first_query(before, after, state.span.prompt, seq in cutting)
            if first is not None:
                wanted[seq] = first - before, 0
        for seq, _, retrieval in self._retrieving:
            if retrieval.OBSERVES:
                wanted[seq] = 0, max(0, self._held(batch, seq) - retrieval.OBSERVES)
        return wanted

    def _mass(self, layer: Layer, of_layer: LayerStep) -> Mass | None:
        if not of_layer.counted:
            return None
        place = [-1] * len(self.states)
        for seq in of_layer.counted:
            place[seq] = self._place(layer, of_layer.slots.batch, seq)
        return of_layer.mass(tuple(place), layer.mass.data)

    def _place(self, layer: Layer, batch: Batch, seq: int) -> int:
        """Where a request's mass is counted."""
        state = self.states[seq]
        assert state is not None
        needed = self._held(batch, seq) + self._fresh(seq)
        room = state.layers[layer.index].mass_for(layer.mass, needed)
        retention = state.method.retention
        if retention is not None and not retention.ACCUMULATES:
            room.view(room.size).zero_()
        return room.start

    def _note_prompt(self, layer: Layer, tokens: Tokens) -> None:
        """What methods ask to know of queries and keys that no page holds, if they will choose."""
        for seq, state, retention in self._evicting:
            if not state.span.drops:
                continue
            start, before = int(self.query_start[seq]), int(self.computed[seq])
            known = state.layers[layer.index]
            if retention.recent_queries:
                fresh = tokens.query[start : start + self._fresh(seq)]
                known.note_recent(fresh, retention.recent_queries)
            count = min(self._fresh(seq), state.span.prompt - before)
            if retention.chunk_tokens and count > 0:
                known.near = known.near or NearAttention(retention.chunk_tokens, layer.scale)
                prompt = slice(start, start + count)
                known.near.add(tokens.query[prompt], tokens.key[prompt])
            skip = max(0, getattr(retention, "sinks", 0) - before)
            if retention.USES_QUERIES and count > skip:
                known.queries = known.queries or QueryStatistics(layer.rope, layer.scale)
                known.queries.add(tokens.query[start + skip : start + count], before + skip)

    # ---- pages to be read

    def _reads(self, layer: Layer, batch: Batch, tokens: Tokens, own: Reads | None) -> Reads | None:
        """Pages that requests choose, and those that uneven heads own, which choose none."""
        chosen = self._sparse(layer, batch, tokens)
        for seq, state, retrieval in self._retrieving:
            before = int(self.computed[seq])
            if before < state.span.prompt and not retrieval.bounded:
                continue
            held = self._held(batch, seq)
            middle = retrieval.middle(held, self.plan.page_tokens)
            middle = range(middle.start, min(middle.stop, self.plan.full_pages(held)))
            if len(middle) <= retrieval.topk:
                continue
            summary = self._summary(layer, batch, seq, middle, tokens)
            start, end = int(self.query_start[seq]), int(self.query_start[seq + 1])
            query = tokens.query[start:end].float().mean(0).unflatten(0, (layer.heads, -1))
            row = retrieval.choose(query, summary, middle, self.plan.store_pages(held))
            chosen.append(Choice(seq, None, row[None], row.shape[1]))
        if not chosen:
            return own
        if own is not None:
            lists = zip(own.pages.split(1), own.count.split(1), strict=True)
            taken = {choice.seq for choice in chosen}
            chosen += [Choice(q, None, *x) for q, x in enumerate(lists) if q not in taken]
        return reads_of(chosen, [self._fresh(seq) for seq in range(len(self.states))])

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
            stored_pages = self.plan.store_pages(int(batch.host.stored[seq]))
            unread = unread_pages(choices[-1], stored_pages, fresh) if blocks else None
            # Once, for to report waits for the device.
            ends = before + fresh >= state.span.prompt and layer.index == layer.layers - 1
            state.reading.add(fresh * stored_pages * layer.heads, unread, last=ends)
        return choices

    def _summary(
        self, layer: Layer, batch: Batch, seq: int, middle: range, tokens: Tokens
    ) -> torch.Tensor:
        """Summaries of the pages in ``middle``; those of new ones are made from their keys."""
        state = self.states[seq]
        assert state is not None
        retrieval = state.method.retrieval
        assert retrieval is not None
        known = state.layers[layer.index]
        have = 0 if known.summary is None else known.summary.shape[1]
        if have < len(middle):
            size = self.plan.page_tokens
            span = range((middle.start + have) * size, middle.stop * size)
            index = torch.arange(
                span.start, span.stop, dtype=torch.int32, device=layer.pages.device
            )
            index = index.expand(layer.heads, -1).contiguous()
            row = int(batch.host.store_row[seq])
            one = batch.one(seq, held=span.stop, stored=span.stop, store_row=row)
            keys, _ = layer.kernel.read(layer.pages, one, tokens.key, tokens.value, index)
            if known.mass is not None and retrieval.OBSERVES:
                mass = known.mass.view(span.stop)[:, span.start :]
            else:  # a retention method's own count is not kept up between its cuts
                mass = torch.zeros(index.shape, device=index.device, dtype=torch.float32)
            shape = (len(middle) - have, size)
            new = retrieval.summarize(keys.unflatten(1, shape), mass.unflatten(1, shape))
            known.summary = new if known.summary is None else torch.cat([known.summary, new], 1)
        assert known.summary is not None
        return known.summary
