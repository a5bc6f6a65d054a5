"""Keys and values of a tile of store pages, decoded: ``[rows, width]`` in ``PAGE.dot``.

A row is a token of the stream ``S``: codes lie in bit fields of 16-bit words
(``pages/codecs/packing.py``, planes), and the tokens of one bit field are a stream; of 2 bits, and
of 3 whose low two lie so, those of two. Where keys and values differ, the fewer bits decide.
"""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.place import at_rows


@triton.jit
def field(words, shift, BITS: tl.constexpr):
    """A bit field of each half of words of two channels."""
    return (words >> shift) & (((1 << BITS) - 1) * 0x10001)


@triton.jit
def to_numbers(pairs):
    """Codes as float16, of pairs of channels ``[n, d]`` -> ``[n, 2 d]``.

    0x6400 | code is the float16 1024 + code; the subtraction is exact.
    """
    n: tl.constexpr = pairs.shape[0]
    d: tl.constexpr = pairs.shape[1]
    x = pairs | 0x64006400
    # NVIDIA's assembler makes one instruction of two subtractions, the first in its upper half.
    high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True) - 1024.0
    low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True) - 1024.0
    return tl.reshape(tl.join(low, high), (n, 2 * d))


@triton.jit
def kept_apart(x, HIDE: tl.constexpr):
    """``x``; how it was made is hidden from Triton 3.7, and this goes when that does.

    That version orders the channels or tokens of matrix operands in fours where halves of words
    were joined. Then nothing is loaded from shared memory as matrices: 1 to 1.2 instructions a code
    more. As this is no pure operation, what follows may not be computed, or loaded, only once.
    """
    if HIDE:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16,
                                      is_pure=False, pack=2)  # fmt: skip
    return x


@triton.jit
def repeat_rows(x, TIMES: tl.constexpr):
    """``[n, d]`` -> ``[n * TIMES, d]``."""
    n: tl.constexpr = x.shape[0]
    d: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, None, :], (n, TIMES, d)), (n * TIMES, d))


@triton.jit
def repeat_columns(x, TIMES: tl.constexpr):
    """``[n, d]`` -> ``[n, d * TIMES]``."""
    n: tl.constexpr = x.shape[0]
    d: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], (n, d, TIMES)), (n, d * TIMES))


@triton.jit
def load_columns(pointer, PAGE: tl.constexpr):
    """Load ``[rows, width]``; channels beyond the head size are 0."""
    if PAGE.width == PAGE.head_size:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=(tl.arange(0, PAGE.width) < PAGE.head_size)[None, :], other=0)


@triton.jit
def load_words(base, row, FIELD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of words, those of two channels together."""
    column = tl.arange(0, PAGE.width // 2)[None, :]
    at = row[:, None] * (PAGE.head_size // 2) + column
    pointer = (at_rows(base, BLOCK, PAGE) + FIELD).to(tl.pointer_type(tl.uint32)) + at
    if PAGE.width == PAGE.head_size:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=column < PAGE.head_size // 2, other=0)


@triton.jit
def shared_words(rows, FIRST: tl.constexpr, ROWS: tl.constexpr, FIELD: tl.constexpr,
                 BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``ROWS`` words of every span from ``FIRST`` on, loaded once, for all tokens of a stream."""
    COUNT: tl.constexpr = BLOCK // 32
    TIMES: tl.constexpr = 32 // PAGE.streams // ROWS
    base, place, _, origin = rows
    n = tl.arange(0, COUNT * ROWS)
    if PAGE.tokens % BLOCK == 0:
        place = origin + n // ROWS * 32
    else:
        place = repeat_rows(tl.min(tl.reshape(place, (COUNT, TIMES * ROWS)), 1)[:, None], ROWS)
        base = tl.max(tl.reshape(base.to(tl.int64), (COUNT, TIMES * ROWS)), 1)[:, None]
        base = tl.reshape(repeat_rows(base, ROWS), (COUNT * ROWS,)).to(tl.pointer_type(tl.uint8))
        place = tl.reshape(place, (COUNT * ROWS,))
    row = place // 32 * (2 * BITS) + (FIRST + n % ROWS)
    words = load_words(base, row, FIELD, PAGE, BLOCK)
    d: tl.constexpr = words.shape[1]
    words = tl.broadcast_to(tl.reshape(words, (COUNT, 1, ROWS, d)), (COUNT, TIMES, ROWS, d))
    return tl.reshape(words, (COUNT * TIMES * ROWS, d))


@triton.jit
def words_of(rows, FIELD: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, PAGE: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """Words that hold the codes of stream ``S``, and for 3 bits those of their high ones."""
    base, place, inner, _ = rows
    ROWS: tl.constexpr = words_rows(BITS)
    STEP: tl.constexpr = 32 // PAGE.streams
    if STEP <= ROWS:  # the stream is in one bit field
        row = place // 32 * (2 * BITS) + (S * STEP % ROWS + inner)
        words = load_words(base, row, FIELD, PAGE, BLOCK)
    else:
        words = shared_words(rows, 0, ROWS, FIELD, BITS, PAGE, BLOCK)
    high = words
    if BITS == 3:
        high = shared_words(rows, 4, 2, FIELD, BITS, PAGE, BLOCK)
    return words, high


@triton.constexpr_function
def words_rows(bits):
    """Rows of words that have a span's low bits: one a bit of their fields, twice."""
    return 2 * (2 if bits == 3 else bits)


@triton.jit
def codes(words, rows, BITS: tl.constexpr, S: tl.constexpr, PAGE: tl.constexpr):
    """Codes of stream ``S``, of ``words_of`` it, as float16 numbers."""
    STEP: tl.constexpr = 32 // PAGE.streams
    FIRST: tl.constexpr = S * STEP  # of the stream's tokens in a span of 32
    ROWS: tl.constexpr = words_rows(BITS)
    FIELDS: tl.constexpr = ROWS // 2  # bits of a bit field
    token = FIRST + rows[2]
    if STEP <= ROWS:
        x = field(words[0], FIRST // ROWS * FIELDS, FIELDS)
    else:
        x = field(words[0], (token // ROWS * FIELDS)[:, None], FIELDS)
    if BITS == 3:
        x |= field(words[1], (token // 4 + token % 4 // 2 * 8)[:, None], 1) << 2
    return to_numbers(x)


@triton.jit
def by_channel(rows, FIELD: tl.constexpr, S: tl.constexpr, PAGE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Scales that groups of tokens share, one row of channels a group, repeated."""
    base, place, _, origin = rows
    STEP: tl.constexpr = 32 // PAGE.streams
    GROUP: tl.constexpr = max(PAGE.group, 32)
    COUNT: tl.constexpr = BLOCK // GROUP
    if PAGE.tokens % BLOCK == 0:
        first = origin + tl.arange(0, COUNT) * GROUP
    else:
        TIMES: tl.constexpr = GROUP // 32 * STEP
        first = tl.min(tl.reshape(place, (COUNT, TIMES)), 1)
        base = tl.max(tl.reshape(base.to(tl.int64), (COUNT, TIMES)), 1)
        base = base.to(tl.pointer_type(tl.uint8))
    # Groups of 32 tokens or more are those of all streams, which share what is loaded.
    SKIP: tl.constexpr = S * STEP // PAGE.group * (2 * PAGE.head_size)
    at = (first // PAGE.group)[:, None] * PAGE.head_size + tl.arange(0, PAGE.width)[None, :]
    x = load_columns(
        (at_rows(base, BLOCK, PAGE) + (FIELD + SKIP)).to(tl.pointer_type(tl.float16)) + at, PAGE
    )
    return repeat_rows(x, GROUP // 32 * STEP)


@triton.jit
def by_token(rows, valid, FIELD: tl.constexpr, S: tl.constexpr, PAGE: tl.constexpr,
             BLOCK: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """Scales of the tokens' groups of channels, each repeated."""
    base, place, inner, _ = rows
    FIRST: tl.constexpr = FIELD + S * (32 // PAGE.streams) * 2  # streams share the rest
    COUNT: tl.constexpr = PAGE.width // PAGE.group  # a lone group may be no power of two
    group = tl.arange(0, COUNT)[None, :]
    at = group * PAGE.tokens + (place + inner)[:, None]
    pointer = (at_rows(base, BLOCK, PAGE) + FIRST).to(tl.pointer_type(tl.float16)) + at
    real = group < PAGE.head_size // PAGE.group
    if MASK:  # what was never written may be NaN, and 0 * NaN is NaN
        x = tl.load(pointer, mask=real & valid[:, None], other=0.0)
    elif PAGE.width == PAGE.head_size:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=real, other=0.0)
    return repeat_columns(x, PAGE.width // COUNT)


@triton.jit
def per_token(base, token, valid, FIELD: tl.constexpr, MASK: tl.constexpr):
    """int8's scale of each token, ``[rows]``."""
    pointer = (base + FIELD).to(tl.pointer_type(tl.float16)) + token
    if MASK:
        return tl.load(pointer, mask=valid, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def first_words(rows, FIELD: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Words of a tile's keys or values, which most streams share; nothing without codes."""
    words = (rows[1], rows[1])
    if PAGE.kind == "codes":
        words = words_of(rows, FIELD, BITS, 0, PAGE, BLOCK)
    return words


@triton.jit
def keys(rows, words, valid, S: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
         MASK: tl.constexpr):  # fmt: skip
    """Keys of stream ``S``; those of int8 still without their scale."""
    base, place, inner, _ = rows
    token = place + (S * (32 // PAGE.streams) + inner)
    if PAGE.kind == "codes":
        if S * (32 // PAGE.streams) % words_rows(PAGE.key_bits) != 0:
            words = words_of(rows, PAGE.key_at, PAGE.key_bits, S, PAGE, BLOCK)
        x = kept_apart(codes(words, rows, PAGE.key_bits, S, PAGE), PAGE.hides == "both")
        if PAGE.by_channel:
            scale = by_channel(rows, PAGE.key_scale, S, PAGE, BLOCK)
            low = by_channel(rows, PAGE.key_min, S, PAGE, BLOCK)
        else:
            scale = by_token(rows, valid, PAGE.key_scale, S, PAGE, BLOCK, MASK)
            low = by_token(rows, valid, PAGE.key_min, S, PAGE, BLOCK, MASK)
        return x * scale + low
    else:  # octets: [token / 8, channel, token % 8]
        column = tl.arange(0, PAGE.width)[None, :] * 8
        at = (token // 8 * (8 * PAGE.head_size) + token % 8)[:, None] + column
        pointer = (at_rows(base, BLOCK, PAGE) + PAGE.key_at).to(tl.pointer_type(PAGE.stored))
        return load_columns(pointer + at, PAGE).to(PAGE.dot)


@triton.jit
def values(rows, words, valid, S: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
           MASK: tl.constexpr):  # fmt: skip
    """Values of stream ``S``, with ``first_words`` of the tile; finite where ``valid`` is false."""
    base, place, inner, _ = rows
    token = place + (S * (32 // PAGE.streams) + inner)
    if PAGE.kind == "codes":
        if S * (32 // PAGE.streams) % words_rows(PAGE.value_bits) != 0:
            words = words_of(rows, PAGE.value_at, PAGE.value_bits, S, PAGE, BLOCK)
        x = kept_apart(codes(words, rows, PAGE.value_bits, S, PAGE), PAGE.hides != "")
        scale = by_token(rows, valid, PAGE.value_scale, S, PAGE, BLOCK, MASK)
        low = by_token(rows, valid, PAGE.value_min, S, PAGE, BLOCK, MASK)
        return x * scale + low
    else:
        column = tl.arange(0, PAGE.width)[None, :]
        pointer = (at_rows(base, BLOCK, PAGE) + PAGE.value_at).to(tl.pointer_type(PAGE.stored))
        pointer += token[:, None] * PAGE.head_size + column
        if MASK:
            real = valid[:, None] & (column < PAGE.head_size)
            x = tl.load(pointer, mask=real, other=0).to(PAGE.dot)
        else:
            x = load_columns(pointer, PAGE).to(PAGE.dot)
        if PAGE.kind == "int8":
            x *= per_token(base, token, valid, PAGE.value_scale, MASK)[:, None]
        return x
