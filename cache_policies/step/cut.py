"""Cuts: what retention methods keep of requests, written where the plan says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cache_policies.kernels.moves import Moves, move
from cache_policies.retention.seen import Seen
from cache_policies.step.clock import Clock
from cache_policies.step.heads import Division, Latest, Slots
from cache_policies.step.mass import MassBuffer
from cache_policies.step.merge import merge_values

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Kernel, Reads
    from cache_policies.pages.layout import PageLayout
    from cache_policies.retention.adaptive import Budgets
    from cache_policies.retention.base import Retention
    from cache_policies.retention.rope import Rope
    from cache_policies.step.request import RequestState


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
        mass: attention that was counted.
        slots: the last slot map, of heads that own unequal numbers of pages.
        reads: the last lists of their pages.

    """

    index: int
    layers: int
    layout: PageLayout
    kernel: Kernel
    pages: torch.Tensor
    rope: Rope
    scale: float
    clock: Clock = field(default_factory=Clock)
    mass: MassBuffer = field(init=False)
    slots: Latest[torch.Tensor] = field(default_factory=Latest)
    reads: Latest[Reads] = field(default_factory=Latest)

    def __post_init__(self) -> None:
        self.mass = MassBuffer(self.heads, self.pages.device)

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
        budgets: of heads that hold unequal numbers of tokens after the cut; ``held`` and
            ``target`` are then those that the longest head could hold.

    """

    seq: int
    state: RequestState
    before: int
    fresh: int
    held: int
    appended: int
    target: int
    moves: bool
    budgets: Budgets | None = None

    @property
    def retention(self) -> Retention:
        """The method that chooses."""
        assert self.state.method.retention is not None
        return self.state.method.retention

    @property
    def candidates(self) -> int:
        """Tokens to choose from."""
        return self.held + self.fresh

    @property
    def _is_last(self) -> bool:
        """Whether the retention method chooses no more."""
        goes_on = self.retention.DECODE_CUTS or self.before + self.fresh < self.state.span.prompt
        return not goes_on

    def is_whole(self, layer: Layer) -> bool:
        """Whether all kept tokens are written anew, in their order; else only those that move.

        Retrieval needs their order: a page of neighbours, and the newest in the last pages.
        """
        ordered = self.retention.rotates or self.state.method.retrieval is not None
        changed = self.budgets is not None or self.retention.merges
        return self.moves or layer.rewrites_all or ordered or changed

    def choose(self, layer: Layer, source: Batch, tokens: Tokens) -> Kept:
        """Which candidate comes to each place, and what must be written for it."""
        end = self.before + self.fresh
        known = self.state.layers[layer.index]
        position = known.positions(layer.heads, end, layer.pages.device).long()
        assert position.shape[1] == self.candidates, "positions and plan disagree"
        if self.budgets is not None:
            seen = self._seen(layer, position, source, tokens)
            return self._uneven(self.retention.select(seen, self.target, self.budgets), position)
        if self.target < self.candidates:
            kept = self.retention.select(self._seen(layer, position, source, tokens), self.target)
        else:
            kept = _places(self.target, position)
        if self.is_whole(layer):
            return Kept(
                kept, position.gather(1, kept), _places(self.target, kept).int(), kept.int()
            )
        kept = _fill_holes(kept, self.candidates)
        width = min(self.target, self.candidates - self.target + max(0, self.target - self.held))
        index, number = _changes(kept, self.held, width)
        return Kept(kept, position.gather(1, kept), index, number)

    def _uneven(self, kept: torch.Tensor, position: torch.Tensor) -> Kept:
        assert self.budgets is not None
        lacks = kept < 0
        place = _places(self.target, kept).masked_fill(lacks, -1)
        position = position.gather(1, kept.clamp(min=0)).masked_fill(lacks, -1)
        division = Division.of(self.budgets, kept)
        return Kept(kept, position, place.int(), kept.int(), division)

    def remember(self, layer: Layer, kept: Kept) -> None:
        """Note what is held now."""
        known = self.state.layers[layer.index]
        position = kept.position.int()
        known.position = kept.division.packed(position) if kept.division else position
        known.end = self.before + self.fresh
        known.summary = None  # other tokens are in the pages now
        known.division = kept.division
        if self._is_last:
            known.queries = known.near = None
            if not (self.state.method.retrieval and self.state.method.retrieval.OBSERVES):
                known.mass = None
        if known.mass is not None:
            known.mass.keep(kept.token)

    def merge(self, layer: Layer, source: Batch, tokens: Tokens, kept: Kept) -> torch.Tensor | None:
        """Values of the kept tokens, ``[num_kv_heads, target, head_size]``; None: as they are."""
        uneven = self.budgets is not None  # as wide as all candidates, though heads drop some
        if not self.retention.merges or (self.target == self.candidates and not uneven):
            return None
        known, end = self.state.layers[layer.index], self.before + self.fresh
        there = known.positions(layer.heads, end, layer.pages.device) >= 0
        both = layer.kernel.read(layer.pages, source.row(self.seq), tokens.key, tokens.value)
        return merge_values(*both, there, kept.token)

    def move_sinks(self, layer: Layer, key: torch.Tensor) -> None:
        """Rotate the sinks on by all tokens dropped so far, from their first state, in place."""
        known = self.state.layers[layer.index]
        dropped = self.before + self.fresh - self.target
        sinks = min(self.retention.protected_tokens, self.target)
        if known.sinks is None:
            known.sinks = key[:, :sinks].clone()
        turns = torch.full((sinks,), dropped, device=key.device)
        key[:, :sinks] = layer.rope.turn_on(known.sinks, turns)

    def _seen(self, layer: Layer, position: torch.Tensor, source: Batch, tokens: Tokens) -> Seen:
        known = self.state.layers[layer.index]
        if known.mass is None:
            mass = torch.zeros(position.shape, device=position.device, dtype=torch.float32)
        else:
            known.mass.hold(self.candidates)
            mass = known.mass.view(self.candidates)
        one = source.row(self.seq)
        return Seen(
            position=position,
            mass=mass,
            end=self.before + self.fresh,
            prompt=self.state.span.prompt,
            layer=layer.index,
            layers=layer.layers,
            load=lambda: layer.kernel.read(layer.pages, one, tokens.key, tokens.value),
            queries=known.queries,
            recent=known.recent,
            scale=layer.scale,
            rope=layer.rope,
            near=known.near.total() if known.near else None,
        )


@dataclass(frozen=True)
class Kept:
    """What a cut leaves of one request.

    Attributes:
        token: ``[num_kv_heads, target]`` int64, the candidate that comes to each place; below 0
            where a head lacks one.
        position: same shape, their positions in the text.
        index: ``[num_kv_heads, width]`` int32, places that are written; below 0: none.
        number: same shape, the candidates that come there; below 0: none.
        division: of the full pages among the heads; None: every head has as many.

    """

    token: torch.Tensor
    position: torch.Tensor
    index: torch.Tensor
    number: torch.Tensor
    division: Division | None = None


@dataclass(frozen=True)
class Cuts:
    """The requests of a step that drop tokens or move; they are rewritten together.

    Attributes:
        cuts: at most one a request.
        source: the batch when the step's tokens are appended: where the candidates are.
        target: its counts after the cuts, with the slot maps of those that are cut.

    """

    cuts: list[Cut]
    source: Slots
    target: Slots
    _starts: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def run(self, layer: Layer, tokens: Tokens, divisions: dict[int, Division]) -> None:
        """Choose and rewrite in one layer, whose uneven requests are divided so."""
        if not self.cuts:
            return
        source = self.source.given(divisions, layer.slots)
        kept = [cut.choose(layer, source, tokens) for cut in self.cuts]
        pairs = ((cut.seq, one.division) for cut, one in zip(self.cuts, kept, strict=True))
        divided = {seq: division for seq, division in pairs if division}
        target = self.target.given(divided, layer.slots)
        start = self._start(tuple(k.index.shape[1] for k in kept))
        index, number = _beside([k.index for k in kept]), _beside([k.number for k in kept])
        moves = Moves(source, target, index, number, start)
        if layer.rewrites_all and self._only_moves:
            size = layer.layout.page_tokens
            move(layer.kernel, size, layer.pages, tokens.key, tokens.value, moves)
        else:
            self._rewrite(layer, tokens, kept, moves)
        for cut, one in zip(self.cuts, kept, strict=True):
            cut.remember(layer, one)

    @property
    def _only_moves(self) -> bool:
        """Whether no token changes, and each stays in pages of its own head."""
        if self.source.uneven or self.target.uneven:
            return False
        return not any(cut.retention.rotates or cut.retention.merges for cut in self.cuts)

    def _rewrite(self, layer: Layer, tokens: Tokens, kept: list[Kept], moves: Moves) -> None:
        """Move tokens by way of floats, some of which change."""
        key, value = layer.kernel.read(
            layer.pages, moves.source, tokens.key, tokens.value, moves.number, moves.start
        )
        done = 0
        for cut, one in zip(self.cuts, kept, strict=True):
            if cut.retention.rotates:
                cut.move_sinks(layer, key[:, done:])
            end = done + one.index.shape[1]
            merged = cut.merge(layer, moves.source, tokens, one)
            if merged is not None:
                value[:, done:end] = merged
            done = end
        layer.kernel.write(layer.pages, moves.target, moves.index, key, value, moves.start)

    def _start(self, widths: tuple[int, ...]) -> torch.Tensor:
        """Where the tokens of every request of the batch begin; layers share it."""
        if widths not in self._starts:
            count = np.zeros(self.target.batch.num_seqs + 1, dtype=np.int32)
            count[[cut.seq + 1 for cut in self.cuts]] = widths
            self._starts[widths] = torch.from_numpy(count.cumsum(dtype=np.int32))
        return self._starts[widths]


def _beside(parts: list[torch.Tensor]) -> torch.Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).contiguous()


def _places(count: int, like: torch.Tensor) -> torch.Tensor:
    """``[num_kv_heads, count]`` int64: 0, 1, 2, ..."""
    return torch.arange(count, device=like.device).expand(like.shape[0], -1)


def _fill_holes(kept: torch.Tensor, candidates: int) -> torch.Tensor:
    """The kept tokens, but those that can stay in their place do, so that few must be written.

    Args:
        kept: ``[num_kv_heads, target]``, ascending.
        candidates: how many there were.

    """
    target = kept.shape[1]
    stays = torch.zeros(kept.shape[0], candidates, dtype=torch.bool, device=kept.device)
    stays = stays.scatter_(1, kept, True)[:, :target]
    # Holes are filled in order by the kept tokens behind the last place, which are the last ones.
    holes = (~stays).cumsum(1)
    filler = (target - 1 - holes[:, -1:] + holes).clamp(min=0)
    return torch.where(stays, _places(target, kept), kept.gather(1, filler))


def _changes(kept: torch.Tensor, held: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places whose token is another or a new one, padded with -1 to ``width``, and the tokens."""
    place = _places(kept.shape[1], kept)
    changed = (kept != place) | (place >= held)
    order = torch.where(changed, changed.cumsum(1) - 1, width)  # the others go to a last column
    index = torch.full((kept.shape[0], width + 1), -1, device=kept.device)
    index = index.scatter_(1, order, place)[:, :width]
    number = torch.where(index < 0, -1, kept.gather(1, index.clamp(min=0)))
    return index.int(), number.int()
