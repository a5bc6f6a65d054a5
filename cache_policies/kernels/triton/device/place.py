"""Where tokens lie: the only place that knows how the bytes of a page are found."""

import triton
import triton.language as tl


@triton.jit
def page_base(store, index):
    """Address of the bytes of one KV head in page ``index`` of the request's store.

    ``index`` is a scalar or a tensor; a map of page slots of each head would be read here.
    """
    page = tl.load(store[1] + index).to(tl.int64)
    return store[0] + page * store[4] + store[5]


@triton.jit
def store_of(
    pages, table, table_stride, store_row, chosen, count, width, seq, head,
    page_stride, head_stride, PAGE: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """``(pages, row, chosen, number of chosen pages, page stride, head offset)`` of a request."""
    row = table + seq.to(tl.int64) * table_stride + tl.load(store_row + seq)
    at = seq * PAGE.kv_heads + head
    many = -1
    if READS:
        many = tl.load(count + at)
    offset = head.to(tl.int64) * head_stride
    return pages, row, chosen + at.to(tl.int64) * width, many, page_stride, offset


@triton.jit
def tokens_to_read(store, stored, PAGE: tl.constexpr, READS: tl.constexpr):
    """Tokens of the store that are read: all, or those of the chosen pages."""
    tokens = stored
    if READS:
        many = store[3]
        last = tl.load(store[2] + many - 1, mask=many > 0, other=0)
        part = tl.minimum(stored - last * PAGE.tokens, PAGE.tokens)
        listed = tl.where(many > 0, (many - 1) * PAGE.tokens + part, 0)
        tokens = tl.where(many < 0, stored, listed)
    return tokens


@triton.jit
def page_number(store, slot, READS: tl.constexpr):
    """Number, in the request, of the page that is read ``slot``-th."""
    index = slot
    if READS:
        listed = slot < store[3]
        index = tl.where(listed, tl.load(store[2] + slot, mask=listed, other=0), slot)
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
        base = page_base(store, page_number(store, tile * BLOCK // PAGE.tokens, READS))
        origin = tile * BLOCK % PAGE.tokens
        place = origin + span
    else:
        token = tile * BLOCK + span
        token = tl.where(token < limit, token, tile * BLOCK)
        base = page_base(store, page_number(store, token // PAGE.tokens, READS))
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
