// Products of tiles in bfloat16, accumulated in float32: two to a lane (`vdpbf16ps`), or by the
// matrix registers of AMX (amx.h).
//
// Pages of 2, 3 and 4 bits are dequantized to bfloat16, whose rounding, 2^-9 of a number, is far below
// that of the codes. Pages that hold more keep to float32 without AMX. With it, a float is the sum of
// two bfloat16 numbers and a product the sum of three: an error of 2^-16.
#pragma once

#include "tile/tile.h"
#if defined(__AVX512BF16__)

#if defined(__AMX_BF16__)
enum { PARTS = 2, ROWS_AT_ONCE = 32 };
#else
enum { PARTS = 1, ROWS_AT_ONCE = MAX_ROWS };
#endif

// Rows are 64 bytes longer than what they hold, as in tile.h. A row of keys is two channels.
enum { WEIGHT_ROW = TILE + 32 };
KV_INLINE int value_row(int d) { return d + 16; }
KV_INLINE int query_row(int d) { return ((d + 31) & ~31) + 32; }

// A number is the sum of its parts.
struct TileBf16 {
  alignas(64) uint16_t key[PARTS][256 * KEY_ROW];            // [channel / 2][token][channel % 2]
  alignas(64) uint16_t value[PARTS][TILE * (256 + 16)];      // [token / 2][channel][token % 2]
  alignas(64) uint16_t query[PARTS][MAX_ROWS * (256 + 32)];  // [row][channel]
  alignas(64) uint16_t weight[PARTS][ROWS_AT_ONCE * WEIGHT_ROW];  // [row][token]
  int parts, query_parts;  // parts: of keys, values and weights
};

// What a product runs over is padded with zeros to the 32 items of a matrix register's row.
KV_INLINE int padded32(int n) { return (n + 31) & ~31; }

KV_INLINE __m128i bf16_round8(f8 x) { return (__m128i)_mm256_cvtneps_pbh(x); }
// out[2 i] = a[i], out[2 i + 1] = b[i]
KV_INLINE void bf16_store_pairs(uint16_t* out, f8 a, f8 b) {
  const __m128i x = bf16_round8(a), y = bf16_round8(b);
  _mm_store_si128((__m128i*)out, _mm_unpacklo_epi16(x, y));
  _mm_store_si128((__m128i*)out + 1, _mm_unpackhi_epi16(x, y));
}

// the upper halves of a and b, one after the other or in turns
template <bool TURNS>
KV_INLINE void store_upper(uint16_t* out, __m512i a, __m512i b) {
  if (TURNS) {
    const __m512i mask = _mm512_set1_epi32(int(0xffff0000));
    _mm512_store_si512(out, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, mask)));
  } else {
    _mm256_store_si256((__m256i*)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16)));
    _mm256_store_si256((__m256i*)(out + 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)));
  }
}
KV_INLINE __m512i half_up(fw x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }
KV_INLINE fw rest_of(fw x) {  // what rounding to bfloat16 takes away; exact
  return x - _mm512_castsi512_ps(_mm512_and_si512(half_up(x), _mm512_set1_epi32(int(0xffff0000))));
}

// 16 floats of a and of b to bfloat16. The first part is the nearest number, for pages of codes are
// multiplied by the queries' first part alone; the second one what is left.
template <bool TURNS>
KV_INLINE void store_parts(fw a, fw b, int parts, uint16_t* first, uint16_t* second) {
  store_upper<TURNS>(first, half_up(a), half_up(b));
  if (parts == 2) store_upper<TURNS>(second, half_up(rest_of(a)), half_up(rest_of(b)));
}

// [rows][columns] floats, a multiple of 16 columns, to rows that end with zeros
static void rows_to_bf16(const float* from, int stride, int rows, int columns, int parts, uint16_t* first, uint16_t* second,
                         int to_stride) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c += 32) {
      const float* at = from + int64_t(r) * stride + c;
      const fw next = c + 16 < columns ? Wide::load(at + 16) : Wide::set(0.f);
      store_parts<false>(Wide::load(at), next, parts, first + r * to_stride + c, second + r * to_stride + c);
    }
}

static void queries_to_bf16(const float* query, int rows, int d, TileBf16* tile) {
  rows_to_bf16(query, d, rows, d, PARTS, tile->query[0], tile->query[PARTS - 1], query_row(d));
}

// two rows of n floats, a multiple of 16, in turns; odd may be null: zeros
KV_INLINE void pairs_to_bf16(const float* even, const float* odd, int n, int parts, uint16_t* first, uint16_t* second) {
  for (int i = 0; i < n; i += 16)
    store_parts<true>(Wide::load(even + i), odd ? Wide::load(odd + i) : Wide::set(0.f), parts, first + 2 * i, second + 2 * i);
}

static void pad_keys(int d, TileBf16* tile) {
  for (int part = 0; part < tile->parts; part++)
    memset(tile->key[part] + d * KEY_ROW, 0, sizeof(uint16_t) * size_t(padded32(d) - d) * KEY_ROW);
}
static void pad_values(int d, int count, TileBf16* tile) {
  const int rows = (count + 1) & ~1;
  for (int part = 0; part < tile->parts; part++)
    memset(tile->value[part] + rows * value_row(d), 0, sizeof(uint16_t) * size_t(padded32(count) - rows) * value_row(d));
}

static void keys_to_bf16(const Tile& from, int d, int count, int parts, TileBf16* tile) {
  tile->parts = parts, tile->query_parts = PARTS;
  for (int c = 0; c < d; c += 2)
    pairs_to_bf16(from.key + c * KEY_ROW, from.key + (c + 1) * KEY_ROW, (count + 15) & ~15, parts, tile->key[0] + c * KEY_ROW,
                  tile->key[PARTS - 1] + c * KEY_ROW);
  pad_keys(d, tile);
}

static void values_to_bf16(const Tile& from, int d, int count, TileBf16* tile) {
  for (int t = 0; t < count; t += 2)
    pairs_to_bf16(from.value + t * d, t + 1 < count ? from.value + (t + 1) * d : nullptr, d, tile->parts,
                  tile->value[0] + t * value_row(d), tile->value[PARTS - 1] + t * value_row(d));
  pad_values(d, count, tile);
}

static void bf16_tile_from_codes(const Layout& l, const uint8_t* run, int first, int count, TileBf16* tile) {
  const int d = l.head_size;
  tile->parts = tile->query_parts = 1;
  keys_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) { bf16_store_pairs(tile->key[0] + c * KEY_ROW + 2 * t, x, y); });
  values_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) { bf16_store_pairs(tile->value[0] + t * value_row(d) + 2 * c, x, y); });
  pad_keys(d, tile);
  pad_values(d, count, tile);
}

#if defined(__AMX_BF16__)
#include "tile/amx.h"
#else
struct MatrixRegisters {
  MatrixRegisters() {}
};

struct Bfloat16 {
  typedef uint16_t Item;
  typedef __m512bh Vec;
  enum { STEP = 2 };
  KV_INLINE Vec load(const uint16_t* p) { return (__m512bh)_mm512_load_si512(p); }
  KV_INLINE Vec broadcast(const uint16_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  KV_INLINE fw fma(Vec a, Vec b, fw c) { return _mm512_dpbf16_ps(c, a, b); }
};

// score [rows][TILE] of the query rows from `first` on
static void bf16_scores(const TileBf16& tile, int count, int first, int rows, int d, float* score) {
  const uint16_t* query = tile.query[0] + first * query_row(d);
  matmul<Bfloat16, false>(rows, (count + 15) & ~15, d / 2, query, query_row(d), tile.key[0], KEY_ROW, score, TILE);
}
// adds to out [rows][d]
static void bf16_mix(const TileBf16& tile, int count, int rows, int d, float* out) {
  matmul<Bfloat16, true>(rows, d, (count + 1) / 2, tile.weight[0], WEIGHT_ROW, tile.value[0], value_row(d), out, d);
}
#endif

// tile->query is filled
static void bf16_attend_tile(TileBf16* tile, int count, int rows, int d, Softmax* s, float* score, int causal_from,
                             int heads_per_query) {
  for (int first = 0; first < rows; first += ROWS_AT_ONCE) {
    const int n = min_int(ROWS_AT_ONCE, rows - first);
    bf16_scores(*tile, count, first, n, d, score);
    weigh_rows(count, first, n, d, s, score, causal_from, heads_per_query);
    rows_to_bf16(score, TILE, n, padded32(count), tile->parts, tile->weight[0], tile->weight[PARTS - 1], WEIGHT_ROW);
    bf16_mix(*tile, count, n, d, s->out + int64_t(first) * d);
  }
}
#else
enum { PARTS = 0 };
struct TileBf16 {};
struct MatrixRegisters {
  MatrixRegisters() {}
};
static void queries_to_bf16(const float*, int, int, TileBf16*) {}
static void keys_to_bf16(const Tile&, int, int, int, TileBf16*) {}
static void values_to_bf16(const Tile&, int, int, TileBf16*) {}
static void bf16_tile_from_codes(const Layout&, const uint8_t*, int, int, TileBf16*) {}
static void bf16_scores(const TileBf16&, int, int, int, int, float*) {}
static void bf16_attend_tile(TileBf16*, int, int, int, Softmax*, float*, int, int) {}
#endif
