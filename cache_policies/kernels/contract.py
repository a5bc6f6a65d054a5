"""What every kernel takes and does; the three implementations are compared on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from cache_policies.kernels.counts import Counts, beside

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cache_policies.kernels.counts import Buffers
    from cache_policies.pages.layout import PageLayout
    from cache_policies.pages.plan import Plan


@dataclass(frozen=True)
class Batch:
    """The requests of one step, and where their tokens lie. Counts are on the host.

    Attributes:
        query_start: ``[num_seqs + 1]`` int32, first fresh token of each request.
        stored: ``[num_seqs]`` int32, tokens in the store before this step.
        ring: ``[num_seqs]`` int32, tokens in the ring before this step.
        stored_after: ``[num_seqs]`` int32, tokens in the store after ``append``.
        appended: ``[num_seqs]`` int32, fresh tokens that ``append`` writes, the first ones.
        store_row: ``[num_seqs]`` int32, row index of the first store page.
        block_table: ``[num_seqs, row]`` int32, ring pages first, on the device of the pages.
        slots: None: a head's bytes of the page at a row index are in its own place of that page.
            Else ``[num_seqs, num_kv_heads, width]`` int32 beside ``block_table``, for heads that
            own unequal numbers of places: row indices are this map's, which says in the place of
            which head (``slot % num_kv_heads``) of which page (``slot // num_kv_heads``). First
            store pages that a head lacks may be anywhere: ``Reads`` leaves them out.
        buffer: memory beside ``block_table`` for the counts' copies; see ``Buffers``.

    """

    query_start: torch.Tensor
    stored: torch.Tensor
    ring: torch.Tensor
    stored_after: torch.Tensor
    appended: torch.Tensor
    store_row: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor | None = None
    buffer: torch.Tensor | None = None

    @property
    def num_seqs(self) -> int:
        """Requests in the batch."""
        return self.stored.shape[0]

    @property
    def counts(self) -> Counts:
        """The counts, on the host."""
        return Counts(
            self.query_start, self.stored, self.ring, self.stored_after, self.appended,
            self.store_row,
        )  # fmt: skip

    @cached_property
    def host(self) -> Counts:
        """The counts as arrays, which share their memory; reading one waits for no device."""
        return Counts(*(column.numpy() for column in self.counts))

    @cached_property
    def device_counts(self) -> Counts:
        """The counts beside the pages; copied once, when they are first asked for."""
        return Counts(*beside(self.counts, self.block_table.device, self.buffer))

    @classmethod
    def of(
        cls,
        plan: Plan,
        query_start: npt.NDArray[np.int32],
        computed: npt.NDArray[np.int32],
        block_table: torch.Tensor,
        buffers: Buffers | None = None,
    ) -> Batch:
        """Apply the plan to a step of requests that drop nothing.

        Args:
            plan: the policy's token arithmetic.
            query_start: ``[num_seqs + 1]`` int32.
            computed: ``[num_seqs]`` int32, tokens computed before this step.
            block_table: ``[num_seqs, row]`` int32.
            buffers: memory for the counts' copies on a device.

        """
        fresh = query_start[1:] - query_start[:-1]
        stored = plan.stored(computed)
        return cls(
            query_start=torch.from_numpy(query_start),
            stored=torch.from_numpy(stored),
            ring=torch.from_numpy(computed - stored),
            stored_after=torch.from_numpy(plan.stored(computed + fresh)),
            appended=torch.from_numpy(fresh),
            store_row=torch.full((len(computed),), plan.ring_pages, dtype=torch.int32),
            block_table=block_table,
            buffer=buffers.take(6 * len(computed) + 1) if buffers else None,
        )

    def after_append(self) -> Batch:
        """The same requests when ``append`` has run; see ``Kernel.read``."""
        ring = self.stored + self.ring + self.appended - self.stored_after
        return replace(self, stored=self.stored_after, ring=ring, buffer=None)

    def with_slots(self, slots: torch.Tensor) -> Batch:
        """The same under a slot map; counts that are on the device are not copied again."""
        batch = replace(self, slots=slots)
        batch.__dict__["device_counts"] = self.device_counts
        return batch

    def row(self, seq: int) -> Batch:
        """One of the requests alone."""
        slots = None if self.slots is None else self.slots[seq : seq + 1]
        batch = Batch(*self.counts.row(seq), self.block_table[seq : seq + 1], slots)
        batch.__dict__["device_counts"] = self.device_counts.row(seq)  # is there already
        return batch

    def one(
        self, seq: int, *, held: int, stored: int, store_row: int, fresh: range | None = None
    ) -> Batch:
        """A batch of one of the requests in a state of its own, for ``read`` and ``write``.

        Args:
            seq: index of the request.
            held: tokens it holds.
            stored: how many of them are in the store; the others are in the ring.
            store_row: row index of its first store page.
            fresh: tokens of this step that count as fresh; none by default.

        """
        span = fresh or range(0)
        return Batch(
            query_start=torch.tensor([span.start, span.stop], dtype=torch.int32),
            stored=torch.tensor([stored], dtype=torch.int32),
            ring=torch.tensor([held - stored], dtype=torch.int32),
            stored_after=torch.tensor([stored], dtype=torch.int32),
            appended=torch.zeros(1, dtype=torch.int32),
            store_row=torch.tensor([store_row], dtype=torch.int32),
            block_table=self.block_table[seq : seq + 1],
            slots=None if self.slots is None else self.slots[seq : seq + 1],
        )


@dataclass(frozen=True)
class Mass:
    """A request to ``attend`` to count the probability mass that tokens get.

    Attributes:
        first_query: ``[num_seqs]`` int32 on the host, fresh queries from this one on are counted.
        first_token: ``[num_seqs]`` int32 on the host, store pages that end before it are left out.
        place: ``[num_seqs]`` int32 on the host, where in ``out`` the tokens of each request
            begin, in the order store, ring, this step; below 0: nothing is counted.
        out: ``[num_kv_heads, places]`` float32 beside the pages, of all requests of a layer. The
            mass is added: summed over the queries and the query heads of a KV head.

    """

    first_query: torch.Tensor
    first_token: torch.Tensor
    place: torch.Tensor
    out: torch.Tensor

    @cached_property
    def device_counts(self) -> tuple[torch.Tensor, ...]:
        """``first_query``, ``first_token`` and ``place`` beside ``out``."""
        return beside((self.first_query, self.first_token, self.place), self.out.device)

    def into(self, out: torch.Tensor) -> Mass:
        """The same for another layer; its counts are on the device already."""
        mass = replace(self, out=out)
        mass.__dict__["device_counts"] = self.device_counts
        return mass


@dataclass(frozen=True)
class Reads:
    """The store pages that ``attend`` reads, in lists.

    Attributes:
        pages: ``[num_lists, num_kv_heads, width]`` int32, ascending.
        count: ``[num_lists, num_kv_heads]`` int32, how many of them; -1: all of the request.
        first: ``[num_seqs]`` int32, the first list of each request.
        block: queries that share a list; 0: all of a request's share its first one.

    """

    pages: torch.Tensor
    count: torch.Tensor
    first: torch.Tensor
    block: int = 0


@dataclass(frozen=True)
class Shape:
    """Shape of one attention layer.

    Attributes:
        num_heads: query heads; a multiple of ``num_kv_heads``.
        num_kv_heads: key/value heads.
        scale: factor of the scores, usually ``head_size ** -0.5``.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0: they stay as they are.
        sinks: ``[num_heads]`` float32, scores learned by the model which take part in the softmax
            of every query and have no key and value; None: there are none.
        key_offset: ``[num_kv_heads, head_size]`` float32, taken from every key of a head before it
            is attended to or stored, and added again to what is read; a softmax does not see it.

    """

    num_heads: int
    num_kv_heads: int
    scale: float
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    key_offset: torch.Tensor | None = None


def sampled(first: int, queries: int, samples: int) -> list[int]:
    """The fresh queries of a block that ``page_mass`` compares: the last of equal parts."""
    parts = min(samples, queries)
    return [first + (i + 1) * queries // parts - 1 for i in range(parts)]


class Kernel(Protocol):
    """Attention of one layer over compressed pages."""

    name: str
    packing: str  # of the pages it reads; see pages/codecs/packing.py

    def __init__(self, layout: PageLayout, shape: Shape) -> None: ...

    @classmethod
    def summary(cls) -> str:
        """Name and variant, for the log."""

    def attend(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        mass: Mass | None = None,
        reads: Reads | None = None,
    ) -> None:
        """Softmax over store, ring and fresh tokens, causal inside the fresh ones.

        Args:
            pages: ``[num_pages, num_kv_heads, head_bytes]`` uint8.
            batch: the step; pages hold what was computed before it.
            query: ``[num_tokens, num_heads, head_size]``.
            key: ``[num_tokens, num_kv_heads, head_size]``, the fresh keys.
            value: same shape as ``key``.
            output: same shape as ``query``, written.
            mass: probability mass to count.
            reads: store pages to read; all by default.

        """

    def page_mass(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        blocks: torch.Tensor,
        samples: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare a few queries of each block with every key they may see.

        Args:
            pages: as for ``attend``.
            batch: as for ``attend``.
            query: ``[num_tokens, num_heads, head_size]``.
            key: ``[num_tokens, num_kv_heads, head_size]``, the fresh keys.
            blocks: ``[n, 3]`` int32: request, its first fresh query in the block, queries.
            samples: queries of a block that are compared, evenly spread; see ``sampled``.

        Returns:
            mass ``[n, num_kv_heads, most store pages]`` float32, the mean share of attention of
            the sampled queries and the query heads of a KV head that each store page gets; and
            ``[n, num_kv_heads]``, that of ring, fresh tokens and learned sinks: the rest of 1.

        """

    def append(
        self, pages: torch.Tensor, batch: Batch, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write fresh tokens into the ring; absorb full groups into the store.

        Runs after ``attend`` of the same step, which reads the ring this overwrites.
        """

    def read(
        self,
        pages: torch.Tensor,
        batch: Batch,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode tokens of one request or several.

        Args:
            pages: as for ``attend``.
            batch: the first ``appended`` fresh tokens of a request are in its store and ring
                already; see ``Batch.after_append`` and ``Batch.one``.
            key: the step's fresh keys.
            value: the step's fresh values.
            index: ``[num_kv_heads, count]`` int32, numbers of tokens counted through store,
                ring and fresh ones; below 0: zeros are returned. By default all of them.
            start: ``[num_seqs + 1]`` int32 on the host, where in ``index`` the tokens of each
                request begin; needed where there are several.

        Returns:
            key and value, each ``[num_kv_heads, count, head_size]`` float32.

        """

    def write(
        self,
        pages: torch.Tensor,
        batch: Batch,
        index: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> None:
        """Encode tokens of one request or several: the reverse of ``read``.

        Args:
            pages: as for ``attend``, written.
            batch: the requests' counts after the write.
            index: ``[num_kv_heads, count]`` int32, where each token goes; below 0: nowhere. No
                other page is touched. A codec whose keys share scales over tokens takes 0, 1, 2,
                ... only, all tokens of each request, but none of first pages that a head lacks.
            key: ``[num_kv_heads, count, head_size]`` float32; may be changed.
            value: same shape as ``key``.
            start: as for ``read``.

        """
