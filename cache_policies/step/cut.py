"""A cut: what a retention method keeps of one request, written where the plan says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from cache_policies.retention.base import Seen
from cache_policies.step.clock import Clock

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Kernel
    from cache_policies.pages.layout import PageLayout
    from cache_policies.retention.base import Retention
    from cache_policies.retention.rope import Rope
    from cache_policies.step.request import LayerState, RequestState


class Tokens(NamedTuple):
    """The tensors of one layer's step; see ``Kernel.attend``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass
class Layer:
    """One attention layer of the model.

    Attributes:
        index: its number.
        layers: number of layers of the model.
        layout: fields of a page.
        kernel: attends and moves.
        pages: ``[num_pages, num_kv_heads, head_bytes]`` uint8.
        rope: the model's rotary embedding.
        scale: factor of the attention scores.
        clock: adds up what is spent in it.

    """

    index: int
    layers: int
    layout: PageLayout
    kernel: Kernel
    pages: torch.Tensor
    rope: Rope
    scale: float
    clock: Clock = field(default_factory=Clock)

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.pages.shape[1]

    @property
    def rewrites_all(self) -> bool:
        """Whether a token shares scales or its place with others, and is not replaced alone."""
        return self.layout.residual > 0


@dataclass(frozen=True)
class Cut:
    """One request at the end of a step in which it drops tokens or moves.

    Candidates are the tokens of store and ring before the step and the fresh ones, numbered in
    this order. Where a request moves for the first time, the fresh prompt tokens were appended
    before, so that what is published is complete and every token went through the codec.

    Attributes:
        seq: index in the batch.
        state: what is known of the request.
        before: tokens computed before the step.
        fresh: tokens of the step.
        held: tokens held before it.
        appended: fresh tokens that were appended.
        target: tokens held after the cut.
        moves: whether the kept tokens go to the end of the row.

    """

    seq: int
    state: RequestState
    before: int
    fresh: int
    held: int
    appended: int
    target: int
    moves: bool

    def run(self, layer: Layer, batch: Batch, tokens: Tokens) -> None:
        """Choose and rewrite."""
        retention = self.state.method.retention
        assert retention is not None
        known = self.state.layers[layer.index]
        source_batch = self._source(layer, batch)
        seen = self._seen(layer, known, source_batch, tokens)
        stays = torch.ones_like(seen.position, dtype=torch.bool)
        if self.target < self.held + self.fresh:
            stays = retention.select(seen, self.target)
        whole = self.moves or layer.rewrites_all or retention.rotates
        source = _in_order(stays) if whole else _fill_holes(stays, self.target)
        index, target = self._changes(source, whole)
        at = target.clamp(min=0).long()
        key, value = layer.kernel.read(
            layer.pages, source_batch, tokens.key, tokens.value, source.gather(1, at).int()
        )
        position = seen.position.gather(1, source)
        if retention.rotates:
            key = _move_sinks(retention, layer, known, key, position, self._dropped())
        layer.kernel.write(layer.pages, self._after(layer, batch), index, key, value)
        known.position, known.end = position.int(), self.before + self.fresh
        if known.mass is not None:
            mass = torch.zeros_like(known.mass)
            mass[:, : self.target] = known.mass.gather(1, source)
            known.mass = mass

    def _seen(self, layer: Layer, known: LayerState, batch: Batch, tokens: Tokens) -> Seen:
        total, end = self.held + self.fresh, self.before + self.fresh
        position = known.positions(layer.heads, end).long()
        assert position.shape[1] == total, "positions and plan disagree"
        return Seen(
            position=position,
            mass=known.mass_for(layer.heads, total)[:, :total],
            end=end,
            prompt=self.state.span.prompt,
            layer=layer.index,
            layers=layer.layers,
            load=lambda: layer.kernel.read(layer.pages, batch, tokens.key, tokens.value),
            queries=known.queries,
        )

    def _source(self, layer: Layer, batch: Batch) -> Batch:
        """Where the candidates are now: after the append, where there was one."""
        held = self.held + self.appended
        start = int(batch.query_start[self.seq])
        fresh = range(start + self.appended, start + self.fresh)
        row, stored = int(batch.store_row[self.seq]), int(batch.stored_after[self.seq])
        return batch.one(self.seq, held=held, stored=stored, store_row=row, fresh=fresh)

    def _after(self, layer: Layer, batch: Batch) -> Batch:
        span = self.state.span
        return batch.one(
            self.seq,
            held=self.target,
            stored=span.plan.stored(self.target),
            store_row=span.store_row(self.before + self.fresh),
        )

    def _changes(self, source: torch.Tensor, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Places to write, padded with -1, and the same as indices into ``source``."""
        place = torch.arange(self.target, dtype=torch.int32).expand(source.shape[0], -1)
        if whole:
            return place.contiguous(), place
        changed = (source != place) | (place >= self.held)
        width = int(changed.sum(1).max())
        order = changed.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        index = torch.where(changed.gather(1, order), order, -1).int()
        return index.contiguous(), index

    def _dropped(self) -> int:
        return self.before + self.fresh - self.target


def _in_order(stays: torch.Tensor) -> torch.Tensor:
    """Numbers of the kept tokens, ``[num_kv_heads, kept]``."""
    return stays.nonzero()[:, 1].unflatten(0, (stays.shape[0], -1))


def _fill_holes(stays: torch.Tensor, target: int) -> torch.Tensor:
    """The same, but a token that can stay in its place does, so that few must be written."""
    source = torch.arange(target).repeat(stays.shape[0], 1)
    for head, row in enumerate(stays):
        source[head, ~row[:target]] = row[target:].nonzero().flatten() + target
    return source


def _move_sinks(
    retention: Retention,
    layer: Layer,
    known: LayerState,
    key: torch.Tensor,
    position: torch.Tensor,
    dropped: int,
) -> torch.Tensor:
    """Rotate the sinks on by all tokens dropped so far, from their first state."""
    sinks = int((position[0] < retention.protected_tokens).sum())
    if known.sinks is None:
        known.sinks = key[:, :sinks].clone()
    moved = layer.rope.turn_on(known.sinks, torch.full((sinks,), dropped, device=key.device))
    return torch.cat([moved, key[:, sinks:]], 1)
