// Prefill over 2 and 4 bit pages in bfloat16: a tile is dequantized to bfloat16, and two products
// go into a lane at a time (`vdpbf16ps`). Its rounding, 2^-9 of a number, is far below that of the
// codes; pages that hold more keep to float32.
#pragma once
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

// C[m][n] (+)= A[m][2 k] B[k][n][2] for MR rows and NV vectors of columns
template <int MR, int NV, bool ADD>
KV_INLINE void bf16_micro(int k, const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc) {
  fw acc[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) acc[i][j] = ADD ? Wide::load(c + i * ldc + j * FW) : Wide::set(0.f);
  for (int p = 0; p < k; p++) {
    __m512bh bv[NV];
    for (int j = 0; j < NV; j++) bv[j] = (__m512bh)_mm512_load_si512(b + 2 * (int64_t(p) * ldb + j * FW));
    for (int i = 0; i < MR; i++) {
      int32_t pair;
      memcpy(&pair, a + int64_t(i) * lda + 2 * p, 4);
      const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < NV; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) Wide::store(c + i * ldc + j * FW, acc[i][j]);
}

template <int MR, bool ADD>
static void bf16_panel(int n, int k, const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc) {
  int j = 0;
  for (; j + 4 * FW <= n; j += 4 * FW) bf16_micro<MR, 4, ADD>(k, a, lda, b + 2 * j, ldb, c + j, ldc);
  for (; j < n; j += FW) bf16_micro<MR, 1, ADD>(k, a, lda, b + 2 * j, ldb, c + j, ldc);
}

template <bool ADD>
static void bf16_matmul(int m, int n, int k, const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc) {
  int i = 0;
  for (; i + 6 <= m; i += 6) bf16_panel<6, ADD>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc);
  for (; i + 2 <= m; i += 2) bf16_panel<2, ADD>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc);
  if (i < m) bf16_panel<1, ADD>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc);
}

static void bf16_tile_from_codes(const Layout& l, const uint8_t* run, int first, int count, TileBf16* tile) {
  const int d = l.head_size;
  keys_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) { bf16_store_pairs(tile->key + c * TILE + 2 * t, x, y); });
  values_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) { bf16_store_pairs(tile->value + t * d + 2 * c, x, y); });
}

// a tile that lies before every query; tile->query is filled
static void bf16_attend_tile(TileBf16* tile, int count, int rows, int d, Softmax* s, float* score) {
  const int padded = (count + FW - 1) / FW * FW;
  bf16_matmul<false>(rows, padded, d / 2, tile->query, d, tile->key, TILE, score, TILE);
  for (int r = 0; r < rows; r++) {
    softmax_row(s, r, d, score + r * TILE, count);
    bf16_rows(score + r * TILE, padded, tile->weight + r * TILE);
  }
  bf16_matmul<true>(rows, d, (count + 1) / 2, tile->weight, TILE, tile->value, d, s->out, d);
}
#endif
