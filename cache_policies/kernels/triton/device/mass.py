"""Probability mass of tokens: the softmax again, token by token, with its sum known."""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.attend import capped, for_store, store_scores
from cache_policies.kernels.triton.device.codes import first_words, keys
from cache_policies.kernels.triton.device.launched import launched
from cache_policies.kernels.triton.device.place import (
    chosen_of,
    page_number,
    request_of,
    tile_of,
    tokens_to_read,
)
from cache_policies.kernels.triton.device.recent import fresh_at, recent, ring_at


@triton.jit
def load_queries(query, query_stride, lse, start, head, rows, end, PAGE: tl.constexpr):
    """Queries ``[M, width]`` of rows (query, query head), the logarithm of their sums, tokens."""
    GROUP: tl.constexpr = PAGE.heads // PAGE.kv_heads
    token, columns = rows // GROUP, tl.arange(0, PAGE.width)
    head_row = head * GROUP + rows % GROUP
    real = (rows < end)[:, None] & (columns < PAGE.head_size)[None, :]
    row = (start + token).to(tl.int64)
    at = row[:, None] * query_stride + (head_row[:, None] * PAGE.head_size + columns[None, :])
    q = tl.load(query + at, mask=real, other=0.0)
    total = tl.load(lse + row * PAGE.heads + head_row, mask=rows < end, other=float("inf"))
    return q, total, token


@triton.jit
def add(out, at, x, valid):
    """Add to tokens that no other program adds to."""
    tl.store(out + at, tl.load(out + at, mask=valid, other=0.0) + x, mask=valid)


@launched
def mass(
    query, key, lse, query_start, stored_count, ring_count, store_row, first_query, first_token,
    place, out, pages, table, slots, chosen, count, lists, flags, scale, mass_stride, width,
    list_queries, flag_pages, table_stride, slots_stride, query_stride, key_stride,
    page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, RECENT: tl.constexpr,
    READS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Tile ``program_id(0)`` of the tokens of one request and head: store, ring, fresh tiles."""
    GROUP: tl.constexpr = PAGE.heads // PAGE.kv_heads
    tile, seq, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = tl.load(place + seq)
    if offset >= 0:  # counted at all
        start, first = tl.load(query_start + seq), tl.load(first_query + seq)
        fresh = tl.load(query_start + seq + 1) - start
        stored, ring = tl.load(stored_count + seq), tl.load(ring_count + seq)
        request = request_of(pages, table, table_stride, slots, slots_stride, seq.to(tl.int64),
                             head, page_stride, head_stride, PAGE)  # fmt: skip
        number = tl.load(lists + seq)
        store = chosen_of(
            request, tl.load(store_row + seq), chosen, count, width, number, PAGE, READS
        )
        flags += (number * PAGE.kv_heads + head).to(tl.int64) * flag_pages
        limit = tokens_to_read(store, stored, PAGE, READS)
        since = tl.minimum(tl.load(first_token + seq) // PAGE.tokens * PAGE.tokens, stored)
        out += offset + head.to(tl.int64) * mass_stride
        end = fresh * GROUP
        store_tiles, ring_tiles = tl.cdiv(limit, BLOCK), tl.cdiv(ring, RECENT)
        if tile < store_tiles:
            count_store(query, query_stride, lse, start, head, first * GROUP, end, store, tile,
                        limit, since, out, scale, flags, list_queries, flag_pages,
                        PAGE, M, BLOCK, READS, FLAGS)  # fmt: skip
        elif tile < store_tiles + ring_tiles:
            j = (tile - store_tiles) * RECENT + tl.arange(0, RECENT)
            k, _ = ring_at(request, j, ring, PAGE)
            k, _ = recent(k, k, j < ring, PAGE)
            count_recent(query, query_stride, lse, start, head, first * GROUP, end, k, j - ring,
                         j < ring, out + stored + j, scale, PAGE, M)  # fmt: skip
        else:
            j = (tile - store_tiles - ring_tiles) * RECENT + tl.arange(0, RECENT)
            k, _ = fresh_at(key, key, key_stride, key_stride, start, head, j, PAGE)
            k, _ = recent(k, k, j < fresh, PAGE)
            begin = tl.maximum(first, tl.min(j, 0)) * GROUP  # earlier queries do not see the tile
            count_recent(query, query_stride, lse, start, head, begin, end, k, j, j < fresh,
                         out + stored + ring + j, scale, PAGE, M)  # fmt: skip


@triton.jit
def count_store(
    query, query_stride, lse, start, head, begin, end, store, tile, limit, since, out, scale,
    flags, list_queries, flag_pages,
    PAGE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Mass of one tile of the store, stream by stream.

    Where FLAGS, ``flags`` of the request's first list, ``flag_pages`` bytes of each KV head of
    each list, say which pages the lists of ``list_queries`` queries have.
    """
    STREAMS: tl.constexpr = PAGE.streams
    STEP: tl.constexpr = 32 // STREAMS
    block, listed = tile_of(store, tile, limit, PAGE, BLOCK, READS)
    index = page_number(store, tl.where(listed < limit, listed, 0) // PAGE.tokens, READS)
    words = first_words(block, PAGE.key_at, PAGE.key_bits, PAGE, BLOCK)
    for s in tl.static_range(STREAMS):
        valid = listed + s * STEP < limit
        k = keys(block, words, valid, s, PAGE, BLOCK, True)
        total = tl.zeros([BLOCK // PAGE.streams], tl.float32)
        for rows in range(begin, end, M):
            q, sums, token = load_queries(
                query, query_stride, lse, start, head, rows + tl.arange(0, M), end, PAGE
            )
            x = store_scores(for_store(q, PAGE), k, block, valid, scale, PAGE, True)
            if FLAGS:
                line = (token // list_queries * PAGE.kv_heads).to(tl.int64) * flag_pages
                there = (rows + tl.arange(0, M) < end)[:, None] & valid[None, :]
                read = tl.load(flags + line[:, None] + index[None, :], mask=there, other=0)
                x = tl.where(read != 0, x, float("-inf"))
            total += tl.sum(tl.exp2(x - sums[:, None]), 0)
        at = index * PAGE.tokens + block[1] + block[2] + s * STEP
        add(out, at, total, valid & (at >= since))


@triton.jit
def count_recent(
    query, query_stride, lse, start, head, begin, end, k, position, valid, out, scale,
    PAGE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Mass of recent tokens, seen by queries from ``position`` on."""
    total = tl.zeros(position.shape, tl.float32)
    for rows in range(begin, end, M):
        q, sums, token = load_queries(
            query, query_stride, lse, start, head, rows + tl.arange(0, M), end, PAGE
        )
        x = tl.dot(q.to(PAGE.recent), tl.trans(k), input_precision=PAGE.precision) * scale
        x = capped(x, PAGE)
        seen = position[None, :] <= token[:, None]
        total += tl.sum(tl.where(seen, tl.exp2(x - sums[:, None]), 0.0), 0)
    add(out, tl.zeros(position.shape, tl.int32), total, valid)
