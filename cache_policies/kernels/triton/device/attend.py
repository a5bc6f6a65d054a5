"""One softmax over store, ring and fresh tokens, in one program or split over several."""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.codes import first_words, keys, per_token, values
from cache_policies.kernels.triton.device.launched import launched
from cache_policies.kernels.triton.device.place import (
    chosen_of,
    request_of,
    tile_of,
    tokens_to_read,
)
from cache_policies.kernels.triton.device.recent import fresh_at, recent, ring_at
from cache_policies.kernels.triton.device.types import narrow

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1.0e38)  # a finite start of a maximum: -inf minus itself is no number


@triton.jit
def for_store(q, PAGE: tl.constexpr):
    """Queries in the type of the store's dot products."""
    if PAGE.dot == tl.float16:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0)
    return q.to(PAGE.dot)


@triton.jit
def capped(x, PAGE: tl.constexpr):
    """Scores in base 2 under the layer's soft cap: ``cap * tanh(x / cap)``."""
    if PAGE.cap > 0:
        # an exponential that overflows gives the cap itself
        x = PAGE.cap - 2 * PAGE.cap / (1 + tl.exp2(x * (2 * LOG2_E / PAGE.cap)))
    return x


@triton.jit
def store_scores(q, k, rows, valid, scale, PAGE: tl.constexpr, MASK: tl.constexpr):
    """Scores in base 2 ``[queries, rows]`` of the keys ``k`` of a stream of a tile."""
    x = tl.dot(q, tl.trans(k), input_precision=PAGE.precision) * scale
    if PAGE.kind == "int8":
        x *= per_token(rows[0], rows[1] + rows[2], valid, PAGE.key_scale, MASK).to(tl.float32)[
            None, :
        ]
    x = capped(x, PAGE)
    if MASK:
        x = tl.where(valid[None, :], x, float("-inf"))
    return x


@triton.jit
def store_tile(q, m, l, acc, store, tile, limit, scale, PAGE: tl.constexpr, BLOCK: tl.constexpr,
               READS: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """Add a tile of the store: scores of all streams, then one step of the softmax."""
    STREAMS: tl.constexpr = PAGE.streams
    STEP: tl.constexpr = 32 // STREAMS
    rows, token = tile_of(store, tile, limit, PAGE, BLOCK, READS)
    words = first_words(rows, PAGE.key_at, PAGE.key_bits, PAGE, BLOCK)
    scores = ()
    highest = tl.full([q.shape[0], BLOCK // STREAMS], LEAST, tl.float32)
    for s in tl.static_range(STREAMS):
        valid = token + s * STEP < limit
        k = keys(rows, words, valid, s, PAGE, BLOCK, MASK)
        x = store_scores(q, k, rows, valid, scale, PAGE, MASK)
        highest = tl.maximum(highest, x)
        scores = scores + (x,)
    top = tl.maximum(m, tl.max(highest, 1))
    alpha = tl.exp2(m - top)
    acc *= alpha[:, None]
    weight = tl.zeros([q.shape[0], BLOCK // STREAMS], tl.float32)
    words = first_words(rows, PAGE.value_at, PAGE.value_bits, PAGE, BLOCK)
    for s in tl.static_range(STREAMS):
        p = tl.exp2(scores[s] - top[:, None])
        weight += p
        valid = token + s * STEP < limit
        v = values(rows, words, valid, s, PAGE, BLOCK, MASK)
        acc = tl.dot(p.to(PAGE.dot), v, acc, input_precision=PAGE.precision)
    l = l * alpha + tl.sum(weight, 1)
    return top, l, acc


@triton.jit
def recent_tile(q, m, l, acc, k, v, seen, scale, PAGE: tl.constexpr):
    """Add a tile of ring or fresh tokens; ``seen`` is ``[queries, tokens]``."""
    x = capped(tl.dot(q, tl.trans(k), input_precision=PAGE.precision) * scale, PAGE)
    x = tl.where(seen, x, float("-inf"))
    top = tl.maximum(m, tl.max(x, 1))
    alpha = tl.exp2(m - top)
    p = tl.exp2(x - top[:, None])
    acc = tl.dot(p.to(PAGE.recent), v, acc * alpha[:, None], input_precision=PAGE.precision)
    return top, l * alpha + tl.sum(p, 1), acc


@triton.jit
def softmax_start(sinks, sunk, PAGE: tl.constexpr):
    """Maximum and sum of each row before its first token; a sink is a score without a value."""
    m, l = tl.full(sunk.shape, LEAST, tl.float32), tl.zeros(sunk.shape, tl.float32)
    if PAGE.sinks:
        sink = tl.load(sinks, mask=sunk, other=0.0).to(tl.float32)
        m = tl.where(sunk, tl.maximum(sink * LOG2_E, LEAST), m)
        l = tl.where(sunk, 1.0, l)
    return m, l


@triton.jit
def over_store(q, m, l, acc, store, low, end, limit, scale, PAGE: tl.constexpr,
               BLOCK: tl.constexpr, READS: tl.constexpr):  # fmt: skip
    """Add tiles ``low .. end`` of the store; of the last one a part may be held."""
    whole = tl.minimum(limit // BLOCK, end)
    for tile in range(low, whole):
        m, l, acc = store_tile(q, m, l, acc, store, tile, limit, scale, PAGE, BLOCK, READS, False)
    for tile in range(tl.maximum(low, whole), end):
        m, l, acc = store_tile(q, m, l, acc, store, tile, limit, scale, PAGE, BLOCK, READS, True)
    return m, l, acc


@triton.jit
def over_ring(q, m, l, acc, request, count, scale, PAGE: tl.constexpr, RECENT: tl.constexpr):
    """Add the ring, which every query sees."""
    for begin in range(0, count, RECENT):
        j = begin + tl.arange(0, RECENT)
        k, v = ring_at(request, j, count, PAGE)
        k, v = recent(k, v, j < count, PAGE)
        m, l, acc = recent_tile(q, m, l, acc, k, v, (j < count)[None, :], scale, PAGE)
    return m, l, acc


@triton.jit
def over_fresh(q, m, l, acc, key, value, key_stride, value_stride, start, head, token, count,
               scale, PAGE: tl.constexpr, RECENT: tl.constexpr):  # fmt: skip
    """Add the first ``count`` fresh tokens; query ``token`` sees those up to itself."""
    for begin in range(0, count, RECENT):
        j = begin + tl.arange(0, RECENT)
        k, v = fresh_at(key, value, key_stride, value_stride, start, head, j, PAGE)
        k, v = recent(k, v, j < count, PAGE)
        seen = (j[None, :] <= token[:, None]) & (j < count)[None, :]
        m, l, acc = recent_tile(q, m, l, acc, k, v, seen, scale, PAGE)
    return m, l, acc


@triton.jit
def block_of(task, query_start, AGAIN: tl.constexpr):
    """Of a block of queries ``(request, its first fresh token, number of these, first row)``.

    Loaded ``AGAIN`` after the loops, so that no registers hold meanwhile what follows from it.
    """
    seq, first = tl.load(task, volatile=AGAIN), tl.load(task + 1, volatile=AGAIN)
    start = tl.load(query_start + seq, volatile=AGAIN)
    return seq, start, tl.load(query_start + seq + 1, volatile=AGAIN) - start, first


@triton.jit
def rows_of(first, head, fresh, M: tl.constexpr, PAGE: tl.constexpr):
    """Of rows from ``first`` on, each a query of one query head.

    Returns:
        the queries, their heads, which there are; of each channel its offset from the first of
        the query, and whether there is one.

    """
    GROUP: tl.constexpr = PAGE.heads // PAGE.kv_heads
    rows, columns = first + tl.arange(0, M), tl.arange(0, PAGE.width)[None, :]
    query, head_row, live = rows // GROUP, head * GROUP + rows % GROUP, rows < fresh * GROUP
    at = head_row[:, None] * PAGE.head_size + columns
    return query, head_row, live, at, live[:, None] & (columns < PAGE.head_size)


@launched
def attend(
    query, key, value, output, part_sum, part_lse, lse, sinks, tasks, query_start, stored_count,
    ring_count, store_row, pages, table, slots, chosen, count, lists, scale, splits, width,
    list_queries, table_stride,
    slots_stride, query_stride, key_stride, value_stride, output_stride,
    page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, RECENT: tl.constexpr,
    SPLIT: tl.constexpr, READS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """One block of queries and one KV head; where SPLIT, part ``program_id(2)`` of the store.

    The last part is that of the recent tokens. A row of a block is a query of one query head.
    """
    task, head, part = tasks + 3 * tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, start, fresh, first = block_of(task, query_start, False)
    GROUP: tl.constexpr = PAGE.heads // PAGE.kv_heads
    token, head_row, live, at, real = rows_of(first, head, fresh, M, PAGE)
    line = (start + token).to(tl.int64)
    raw = tl.load(query + line[:, None] * query_stride + at, mask=real, other=0.0)

    request = request_of(pages, table, table_stride, slots, slots_stride, seq.to(tl.int64), head,
                         page_stride, head_stride, PAGE)  # fmt: skip
    number = seq
    if READS:  # the list of the block's queries, or of all the request's
        number = tl.load(lists + seq)
        if list_queries > 0:
            number += first // GROUP // list_queries
    store = chosen_of(request, tl.load(store_row + seq), chosen, count, width, number, PAGE, READS)
    limit = tokens_to_read(store, tl.load(stored_count + seq), PAGE, READS)
    ring = tl.load(ring_count + seq)
    last = tl.minimum(fresh, (first + M - 1) // GROUP + 1)  # no query of the block sees further
    low, end = 0, tl.cdiv(limit, BLOCK)
    if SPLIT:
        each = tl.cdiv(end, splits)
        low = tl.where(part == splits, 0, part * each)
        end = tl.where(part == splits, 0, tl.minimum(low + each, end))
        ring, last = tl.where(part == splits, ring, 0), tl.where(part == splits, last, 0)
    # Sinks take part in one part of a split sum, that of the recent tokens, or in the only one.
    sunk = token < tl.where(part == splits, fresh, 0)
    m, l = softmax_start(sinks + head_row, sunk, PAGE)
    COLUMNS: tl.constexpr = PAGE.width  # Triton 3.7 takes no attribute in a shape
    acc = tl.zeros([M, COLUMNS], tl.float32)
    # The store comes last: its loop takes all registers, and what only the others need is gone.
    q = raw.to(PAGE.recent)
    m, l, acc = over_ring(q, m, l, acc, request, ring, scale, PAGE, RECENT)
    m, l, acc = over_fresh(q, m, l, acc, key, value, key_stride, value_stride, start, head, token,
                           last, scale, PAGE, RECENT)  # fmt: skip
    m, l, acc = over_store(
        for_store(raw, PAGE), m, l, acc, store, low, end, limit, scale, PAGE, BLOCK, READS
    )

    safe = tl.where(l > 0, l, 1.0)
    result, total = acc / safe[:, None], tl.where(l > 0, m + tl.log2(safe), float("-inf"))
    seq, start, fresh, first = block_of(task, query_start, True)
    token, head_row, live, at, real = rows_of(first, head, fresh, M, PAGE)
    if SPLIT:
        line = (tl.load(task + 2) + token).to(tl.int64) * PAGE.heads + head_row
        line = line * (splits + 1) + part
        columns = tl.arange(0, PAGE.width)[None, :]
        tl.store(part_sum + line[:, None] * PAGE.head_size + columns, result, mask=real)
        tl.store(part_lse + line, total, mask=live)
    else:
        line = (start + token).to(tl.int64)
        result = narrow(result, output.dtype.element_ty)
        tl.store(output + line[:, None] * output_stride + at, result, mask=real)
        if LSE:
            tl.store(lse + line * PAGE.heads + head_row, total, mask=live)


@launched
def combine(part_sum, part_lse, output, lse, lines, parts, output_stride, PAGE: tl.constexpr,
            WIDTH: tl.constexpr, LSE: tl.constexpr):  # fmt: skip
    """Join the parts of one query and head, ``WIDTH`` at a time.

    ``lines`` are the queries' numbers in the step.
    """
    token = tl.load(lines + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    line = tl.program_id(0).to(tl.int64) * PAGE.heads + head
    columns = tl.arange(0, PAGE.width)
    m, l = tl.full((), LEAST, tl.float32), tl.full((), 0.0, tl.float32)
    COLUMNS: tl.constexpr = PAGE.width
    acc = tl.zeros([COLUMNS], tl.float32)
    for begin in range(0, parts, WIDTH):
        part = begin + tl.arange(0, WIDTH)
        each = tl.load(part_lse + line * parts + part, mask=part < parts, other=float("-inf"))
        top = tl.maximum(m, tl.max(each, 0))
        alpha, weight = tl.exp2(m - top), tl.exp2(each - top)
        at = (line * parts + part)[:, None] * PAGE.head_size + columns[None, :]
        real = (part < parts)[:, None] & (columns < PAGE.head_size)[None, :]
        x = tl.load(part_sum + at, mask=real, other=0.0)
        acc = acc * alpha + tl.sum(x * weight[:, None], 0)
        m, l = top, l * alpha + tl.sum(weight, 0)
    at = token * output_stride + head * PAGE.head_size + columns
    result = narrow(acc / l, output.dtype.element_ty)
    tl.store(output + at, result, mask=columns < PAGE.head_size)
    if LSE:
        tl.store(lse + token * PAGE.heads + head, m + tl.log2(l))
