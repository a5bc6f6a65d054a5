// Attention over float tiles: prefill, and decode of pages without a faster path.
//
// A task owns up to MAX_ROWS query rows (query tokens x query heads of one KV head). For each
// tile of up to 128 tokens the keys are brought to [channel][token] and the values to
// [token][channel] floats, in a buffer that stays in L2; then two small matrix products and
// an online softmax. Only a tile is ever dequantized, never the cache.
#pragma once

enum { MAX_ROWS = 192 };

// C[m][n] (+)= A[m][k] B[k][n] for MR rows and NV wide vectors of columns
template <int MR, int NV, bool ADD>
KV_INLINE void micro(int k, const float* a, int lda, const float* b, int ldb, float* c, int ldc) {
  fw acc[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) acc[i][j] = ADD ? fw_load(c + i * ldc + j * FW) : fw_set(0.f);
  for (int p = 0; p < k; p++) {
    fw bv[NV];
    for (int j = 0; j < NV; j++) bv[j] = fw_load(b + int64_t(p) * ldb + j * FW);
    for (int i = 0; i < MR; i++) {
      const fw av = fw_set(a[i * lda + p]);
      for (int j = 0; j < NV; j++) acc[i][j] = fw_fma(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) fw_store(c + i * ldc + j * FW, acc[i][j]);
}

template <int MR, bool ADD>
static void panel(int n, int k, const float* a, int lda, const float* b, int ldb, float* c, int ldc) {
  int j = 0;
  for (; j + 2 * FW <= n; j += 2 * FW) micro<MR, 2, ADD>(k, a, lda, b + j, ldb, c + j, ldc);
  for (; j < n; j += FW) micro<MR, 1, ADD>(k, a, lda, b + j, ldb, c + j, ldc);
}

// n is a multiple of FW
template <bool ADD>
static void matmul(int m, int n, int k, const float* a, int lda, const float* b, int ldb, float* c,
                   int ldc) {
  int i = 0;
  for (; i + 6 <= m; i += 6) panel<6, ADD>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc);
  a += i * lda;
  c += i * ldc;
  switch (m - i) {
    case 5: panel<5, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 4: panel<4, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 3: panel<3, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 2: panel<2, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 1: panel<1, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    default: break;
  }
}

struct Tile {
  alignas(64) float key[256 * TILE];    // [channel][token]
  alignas(64) float value[TILE * 256];  // [token][channel]
};

static void tile_keys_from_rows(const KvRows& rows, int d, Tile* tile) {
  const int count = rows.key.count;
  if (rows.octets) {
    const int64_t bytes = 8 * item_bytes(rows.key.dtype);
    for (int t = 0; t < count; t += 8)
      for (int c = 0; c < d; c++)
        f8_store(tile->key + c * TILE + t, load8(rows.octets + (t / 8 * d + c) * bytes, rows.key.dtype, 0));
  }
  for (int t = 0; t < count && !rows.octets; t += 8)
    for (int c = 0; c < d; c += 8) {
      f8 block[8];
      for (int i = 0; i < 8; i++)
        block[i] = t + i < count ? load8(rows.key.row[t + i], rows.key.dtype, c) : f8_zero();
      f8_transpose(block);
      for (int i = 0; i < 8; i++) f8_store(tile->key + (c + i) * TILE + t, block[i]);
    }
  for (int t = 0; t < count && rows.key.scale; t++) {
    const float scale = f16_to_float(rows.key.scale[t]);
    for (int c = 0; c < d; c++) tile->key[c * TILE + t] *= scale;
  }
}

static void tile_values_from_rows(const KvRows& rows, int d, Tile* tile) {
  for (int t = 0; t < rows.value.count; t++) {
    float* out = tile->value + t * d;
    load_row(rows.value.row[t], rows.value.dtype, d, out);
    if (!rows.value.scale) continue;
    const float scale = f16_to_float(rows.value.scale[t]);
    for (int c = 0; c < d; c++) out[c] *= scale;
  }
}

// tokens [first, first + count) of an affine page, first a multiple of 32
static void tile_keys_from_codes(const Layout& l, const uint8_t* run, int first, int count, Tile* tile) {
  const int d = l.head_size, n = l.page_tokens;
  const uint16_t *ks = (const uint16_t*)(run + l.key_scale), *km = (const uint16_t*)(run + l.key_min);
  for (int t = 0; t < count; t += 8) {
    const int token = first + t;
    for (int c = 0; c < d; c++) {
      const CodeSlot slot = key_slot(token, c & ~3, l.k_bits, d);
      const f8 code = f8_load_codes(run + l.key + slot.byte, slot.shift + c % 4 * 8, l.k_bits);
      f8 scale, low;
      if (l.keys_per_channel) {
        scale = f8_set(f16_to_float(ks[token / l.group * d + c]));
        low = f8_set(f16_to_float(km[token / l.group * d + c]));
      } else {
        scale = f8_load_f16(ks + c / l.group * n + token);
        low = f8_load_f16(km + c / l.group * n + token);
      }
      f8_store(tile->key + c * TILE + t, f8_fma(code, scale, low));
    }
  }
}

static void tile_values_from_codes(const Layout& l, const uint8_t* run, int first, int count, Tile* tile) {
  const int d = l.head_size, vf = 8 / l.v_bits, n = l.page_tokens;
  const uint16_t *vs = (const uint16_t*)(run + l.value_scale), *vm = (const uint16_t*)(run + l.value_min);
  for (int t = 0; t < count; t++) {
    const int token = first + t;
    const CodeSlot slot = value_slot(token & ~3, 0, l.v_bits, n);
    const int64_t step = int64_t(n / 16) * (4 / vf) * 32;
    for (int c = 0; c < d; c += 8) {
      const uint8_t* codes = run + l.value + slot.byte + c / 8 * step;
      const f8 code = f8_load_codes(codes, slot.shift + token % 4 * 8, l.v_bits);
      const int g = c / l.group * n + token;
      f8_store(tile->value + t * d + c,
               f8_fma(code, f8_set(f16_to_float(vs[g])), f8_set(f16_to_float(vm[g]))));
    }
  }
}

// Running softmax of a set of query rows; out is the unnormalized sum. Scores are in units of
// log 2: queries carry a factor log2(e), so that 2^x serves as the exponential.
struct Softmax {
  float* top;   // [rows] largest score so far
  float* sum;   // [rows]
  float* out;   // [rows, head_size]
};

static void softmax_begin(Softmax* s, int rows, int d) {
  for (int r = 0; r < rows; r++) s->top[r] = -1e30f, s->sum[r] = 0.f;
  memset(s->out, 0, sizeof(float) * size_t(rows) * d);
}

// scores [count] -> probabilities under the new maximum; earlier sums are rescaled.
// score[count .. next multiple of 8) is set to 0.
KV_INLINE void softmax_row(Softmax* s, int row, int d, float* score, int count) {
  const int padded = (count + 7) & ~7;
  for (int t = count; t < padded; t++) score[t] = -1e30f;
  f8 top = f8_load(score);
  for (int t = 8; t < padded; t += 8) top = f8_max(top, f8_load(score + t));
  const float old = s->top[row], now = max_float(old, f8_hmax(top));
  f8 sum = f8_zero();
  for (int t = 0; t < padded; t += 8) {
    const f8 p = f8_exp2(f8_load(score + t) - f8_set(now));
    f8_store(score + t, p);
    sum = sum + p;
  }
  for (int t = count; t < padded; t++) score[t] = 0.f;
  if (now > old) {
    const float shrink = old > -1e29f ? exp2f(old - now) : 0.f;
    s->sum[row] *= shrink;
    s->top[row] = now;
    float* out = s->out + int64_t(row) * d;
    for (int c = 0; c < d; c += 8) f8_store(out + c, f8_load(out + c) * f8_set(shrink));
  }
  s->sum[row] += f8_sum(sum);
}

// The query of row r sees the tile's first causal_from + r / heads_per_query + 1 tokens: a
// negative number sees none, SEES_ALL is for tiles that lie before every query.
enum { SEES_ALL = 1 << 20 };
static void attend_tile(const Tile& tile, int count, const float* query, int rows, int d, Softmax* s,
                        float* score, int causal_from, int heads_per_query) {
  const int padded = (count + FW - 1) / FW * FW;
  matmul<false>(rows, padded, d, query, d, tile.key, TILE, score, TILE);
  for (int r = 0; r < rows; r++) {
    const int visible = min_int(count, causal_from + r / heads_per_query + 1);
    if (visible <= 0) {  // an earlier query sees nothing of this tile
      memset(score + r * TILE, 0, sizeof(float) * TILE);
      continue;
    }
    softmax_row(s, r, d, score + r * TILE, visible);
    for (int t = (visible + 7) & ~7; t < count; t++) score[r * TILE + t] = 0.f;
  }
  matmul<true>(rows, d, count, score, TILE, tile.value, d, s->out, d);
}
