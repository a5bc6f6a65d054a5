"""Where tokens lie: the only place that knows how the bytes of a page are found."""

import triton
import triton.language as tl


@triton.jit
def request_of(pages, table, table_stride, slots, slots_stride, seq, head, page_stride, head_stride,
               PAGE: tl.constexpr):  # fmt: skip
    """``(pages, row, slot map of the head, page stride, head stride, head)`` of a request.

    Where ``PAGE.mapped``, ``slots`` is ``Batch.slots``; else it is not read.
    """
    if PAGE.mapped:
        slots += (seq * PAGE.kv_heads + head) * slots_stride
    return pages, table + seq * table_stride, slots, page_stride, head_stride, head


@triton.jit
def run_at(request, index, PAGE: tl.constexpr):
    """Address of the bytes of the KV head at a row index, which is a scalar or a tensor."""
    if PAGE.mapped:
        slot = tl.load(request[2] + index)
        page = tl.load(request[1] + slot // PAGE.kv_heads).to(tl.int64)
        place = (slot % PAGE.kv_heads).to(tl.int64)
        return request[0] + page * request[3] + place * request[4]
    else:  # not left out: the compiler reads what follows a return
        page = tl.load(request[1] + index).to(tl.int64)
        return request[0] + page * request[3] + request[5].to(tl.int64) * request[4]


@triton.jit
def store_of(request, store_row, PAGE: tl.constexpr):
    """The tuple ``request`` for row indices counted from the first page of the store."""
    pages, row, slots, page_stride, head_stride, head = request
    if PAGE.mapped:
        slots += store_row
    else:
        row += store_row
    return pages, row, slots, page_stride, head_stride, head


@triton.jit
def chosen_of(request, store_row, chosen, count, width, number, PAGE: tl.constexpr,
              READS: tl.constexpr):  # fmt: skip
    """``store_of``, list ``number`` of chosen pages, and how many: -1 for all of the request."""
    at = number * PAGE.kv_heads + request[5]
    many = -1
    if READS:
        many = tl.load(count + at)
    return store_of(request, store_row, PAGE) + (chosen + at.to(tl.int64) * width, many)


@triton.jit
def tokens_to_read(store, stored, PAGE: tl.constexpr, READS: tl.constexpr):
    """Tokens of the store that are read: all, or those of the chosen pages."""
    tokens = stored
    if READS:
        many = store[7]
        last = tl.load(store[6] + many - 1, mask=many > 0, other=0)
        part = tl.minimum(stored - last * PAGE.tokens, PAGE.tokens)
        listed = tl.where(many > 0, (many - 1) * PAGE.tokens + part, 0)
        tokens = tl.where(many < 0, stored, listed)
    return tokens


@triton.jit
def page_number(store, slot, READS: tl.constexpr):
    """Number, in the request, of the page that is read ``slot``-th."""
    index = slot
    if READS:
        listed = slot < store[7]
        index = tl.where(listed, tl.load(store[6] + slot, mask=listed, other=0), slot)
    return index


@triton.jit
def tile_of(store, tile, limit, PAGE: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr):
    """Rows of a tile of ``BLOCK`` tokens, of which a row holds one of each stream.

    Returns:
        the tuple ``rows``: page address (a scalar where the tile lies in one page, else
        ``[rows]``), place in the page of each row's span of 32 tokens, place of the row in the
        stream, place in the page of the tile's first token; and the number of the row's token of
        stream 0.

    """
    STEP: tl.constexpr = 32 // PAGE.streams
    n = tl.arange(0, BLOCK // PAGE.streams)
    span, inner = n // STEP * 32, n % STEP
    if PAGE.tokens % BLOCK == 0:
        base = run_at(store, page_number(store, tile * BLOCK // PAGE.tokens, READS), PAGE)
        origin = tile * BLOCK % PAGE.tokens
        place = origin + span
    else:
        token = tile * BLOCK + span
        token = tl.where(token < limit, token, tile * BLOCK)
        base = run_at(store, page_number(store, token // PAGE.tokens, READS), PAGE)
        place = token % PAGE.tokens
        origin = 0  # of each page its own
    return (base, place, inner, origin), tile * BLOCK + span + inner


@triton.jit
def at_rows(base, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Page addresses to which ``[rows, columns]`` of bytes can be added."""
    if PAGE.tokens % BLOCK == 0:
        return base
    else:  # not left out: the compiler reads what follows a return
        return base[:, None]
