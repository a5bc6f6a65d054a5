// Prefill over 2 and 4 bit pages in bfloat16: a tile is dequantized to bfloat16, and two products
// go into a lane at a time (`vdpbf16ps`). Its rounding, 2^-9 of a number, is far below that of the
// codes; pages that hold more keep to float32.
#pragma once

#include "tile/tile.h"
#if defined(__AVX512BF16__)

struct TileBf16 {
  alignas(64) uint16_t key[256 * TILE];    // [channel / 2][token][channel % 2]
  alignas(64) uint16_t value[TILE * 256];  // [token / 2][channel][token % 2]
  alignas(64) uint16_t query[MAX_ROWS * 256], weight[MAX_ROWS * TILE];
};

KV_INLINE __m128i bf16_round8(f8 x) { return (__m128i)_mm256_cvtneps_pbh(x); }
// out[2 i] = a[i], out[2 i + 1] = b[i]
KV_INLINE void bf16_store_pairs(uint16_t* out, f8 a, f8 b) {
  const __m128i x = bf16_round8(a), y = bf16_round8(b);
  _mm_store_si128((__m128i*)out, _mm_unpacklo_epi16(x, y));
  _mm_store_si128((__m128i*)out + 1, _mm_unpackhi_epi16(x, y));
}

static void bf16_rows(const float* from, int n, uint16_t* out) {  // n is a multiple of 16
  for (int i = 0; i < n; i += 16) _mm256_store_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(Wide::load(from + i)));
}

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

static void bf16_tile_from_codes(const Layout& l, const uint8_t* run, int first, int count, TileBf16* tile) {
  const int d = l.head_size;
  keys_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) { bf16_store_pairs(tile->key + c * TILE + 2 * t, x, y); });
  values_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) { bf16_store_pairs(tile->value + t * d + 2 * c, x, y); });
}

// a tile that lies before every query; tile->query is filled
static void bf16_attend_tile(TileBf16* tile, int count, int rows, int d, Softmax* s, float* score) {
  const int padded = (count + FW - 1) / FW * FW;
  matmul<Bfloat16, false>(rows, padded, d / 2, tile->query, d, tile->key, TILE, score, TILE);
  for (int r = 0; r < rows; r++) {
    softmax_row(s, r, d, score + r * TILE, count);
    bf16_rows(score + r * TILE, padded, tile->weight + r * TILE);
  }
  matmul<Bfloat16, true>(rows, d, (count + 1) / 2, tile->weight, TILE, tile->value, d, s->out, d);
}
#endif
