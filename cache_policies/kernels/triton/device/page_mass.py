"""Shares of attention of a few queries of each block: sums over all keys, then token by token.

``blocks`` holds request and number of queries of each block, ``query`` these queries of all
blocks, ``SAMPLES`` rows a block.
"""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.attend import (
    capped,
    for_store,
    rows_of,
    softmax_start,
    store_scores,
)
from cache_policies.kernels.triton.device.codes import first_words, keys
from cache_policies.kernels.triton.device.launched import launched
from cache_policies.kernels.triton.device.mass import count_store
from cache_policies.kernels.triton.device.place import chosen_of, request_of, tile_of
from cache_policies.kernels.triton.device.recent import fresh_at, recent, ring_at


@triton.jit
def add_scores(m, l, x):
    """One step of a softmax without values."""
    top = tl.maximum(m, tl.max(x, 1))
    return top, l * tl.exp2(m - top) + tl.sum(tl.exp2(x - top[:, None]), 1)


@triton.jit
def add_recent(m, l, q, k, seen, scale, PAGE: tl.constexpr):
    """Scores of ring or fresh tokens; ``seen`` is ``[queries, tokens]``."""
    x = capped(tl.dot(q, tl.trans(k), input_precision=PAGE.precision) * scale, PAGE)
    return add_scores(m, l, tl.where(seen, x, float("-inf")))


@launched
def sums(
    query, key, position, lse, sinks, blocks, query_start, stored_count, ring_count, store_row,
    pages, table, slots, scale, table_stride, slots_stride, query_stride, key_stride,
    page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, SAMPLES: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    RECENT: tl.constexpr,
):  # fmt: skip
    """Logarithms of the sums of ``M`` rows of a block; ``position`` is that among fresh tokens."""
    STREAMS: tl.constexpr = PAGE.streams
    block, head = tl.program_id(0), tl.program_id(1)
    seq, queries = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    token, head_row, live, at, real = rows_of(tl.program_id(2) * M, head, queries, M, PAGE)
    line = (block * SAMPLES + token).to(tl.int64)
    raw = tl.load(query + line[:, None] * query_stride + at, mask=real, other=0.0)
    last = tl.load(position + line, mask=live, other=-1)
    m, l = softmax_start(sinks + head_row, live, PAGE)
    request = request_of(pages, table, table_stride, slots, slots_stride, seq.to(tl.int64), head,
                         page_stride, head_stride, PAGE)  # fmt: skip
    q, start = raw.to(PAGE.recent), tl.load(query_start + seq)
    ring = tl.load(ring_count + seq)
    for begin in range(0, ring, RECENT):
        j = begin + tl.arange(0, RECENT)
        k, _ = ring_at(request, j, ring, PAGE)
        k, _ = recent(k, k, j < ring, PAGE)
        m, l = add_recent(m, l, q, k, (j < ring)[None, :], scale, PAGE)
    fresh = tl.max(last, 0) + 1
    for begin in range(0, fresh, RECENT):
        j = begin + tl.arange(0, RECENT)
        k, _ = fresh_at(key, key, key_stride, key_stride, start, head, j, PAGE)
        k, _ = recent(k, k, j < fresh, PAGE)
        m, l = add_recent(m, l, q, k, j[None, :] <= last[:, None], scale, PAGE)
    store = chosen_of(request, tl.load(store_row + seq), table, table, 0, seq, PAGE, False)
    stored = tl.load(stored_count + seq)
    for tile in range(tl.cdiv(stored, BLOCK)):
        rows, number = tile_of(store, tile, stored, PAGE, BLOCK, False)
        words = first_words(rows, PAGE.key_at, PAGE.key_bits, PAGE, BLOCK)
        for s in tl.static_range(STREAMS):
            valid = number + s * (32 // STREAMS) < stored
            k = keys(rows, words, valid, s, PAGE, BLOCK, True)
            x = store_scores(for_store(raw, PAGE), k, rows, valid, scale, PAGE, True)
            m, l = add_scores(m, l, x)
    total = m + tl.log2(tl.where(live, l, 1.0))
    tl.store(lse + line * PAGE.heads + head_row, total, mask=live)


@launched
def shares(
    query, lse, blocks, stored_count, store_row, out, pages, table, slots, scale, table_stride,
    slots_stride, query_stride, out_stride, page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, SAMPLES: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add what the queries of a block give each token of a tile of the store."""
    tile, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, queries = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    stored = tl.load(stored_count + seq)
    if tile * BLOCK < stored:
        request = request_of(pages, table, table_stride, slots, slots_stride, seq.to(tl.int64),
                             head, page_stride, head_stride, PAGE)  # fmt: skip
        store = chosen_of(request, tl.load(store_row + seq), table, table, 0, seq, PAGE, False)
        out += (block * PAGE.kv_heads + head).to(tl.int64) * out_stride
        end = queries * (PAGE.heads // PAGE.kv_heads)
        count_store(query, query_stride, lse, block * SAMPLES, head, 0, end, store, tile, stored, 0,
                    out, scale, table, 1, 0, PAGE, M, BLOCK, False, False)  # fmt: skip
