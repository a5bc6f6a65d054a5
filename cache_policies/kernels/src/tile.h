// Attention over float tiles: prefill, and decode of pages without a faster path.
//
// A task owns up to MAX_ROWS query rows (query tokens x query heads of one KV head). For each
// tile of up to 128 tokens the keys are brought to [channel][token] and the values to
// [token][channel] floats, in a buffer that stays in L2; then two small matrix products and
// an online softmax. Only a tile is ever dequantized, never the cache.
#pragma once

enum { MAX_ROWS = 192 };

// What a matrix product multiplies: STEP neighbours of a row of A with a vector of B, a lane of
// which holds as many. tile_bf16.h has another.
struct Float32 {
  typedef float Item;
  typedef fw Vec;
  enum { STEP = 1 };
  KV_INLINE fw load(const float* p) { return Wide::load(p); }
  KV_INLINE fw broadcast(const float* p) { return Wide::set(*p); }
  KV_INLINE fw fma(fw a, fw b, fw c) { return Wide::fma(a, b, c); }
};

// C[m][n] (+)= A[m][k STEP] B[k][n][STEP] for MR rows and NV wide vectors of columns
template <class P, int MR, int NV, bool ADD>
KV_INLINE void micro(int k, const typename P::Item* a, int lda, const typename P::Item* b, int ldb, float* c, int ldc) {
  fw acc[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) acc[i][j] = ADD ? Wide::load(c + i * ldc + j * FW) : Wide::set(0.f);
  for (int p = 0; p < k; p++) {
    typename P::Vec bv[NV];
    for (int j = 0; j < NV; j++) bv[j] = P::load(b + P::STEP * (int64_t(p) * ldb + j * FW));
    for (int i = 0; i < MR; i++) {
      const typename P::Vec av = P::broadcast(a + i * lda + P::STEP * p);
      for (int j = 0; j < NV; j++) acc[i][j] = P::fma(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) Wide::store(c + i * ldc + j * FW, acc[i][j]);
}

template <class P, int MR, bool ADD>
static void panel(int n, int k, const typename P::Item* a, int lda, const typename P::Item* b, int ldb, float* c, int ldc) {
  enum { NV = FW == 16 ? 4 : 2 };  // as many accumulators as registers hold
  int j = 0;
  for (; j + NV * FW <= n; j += NV * FW) micro<P, MR, NV, ADD>(k, a, lda, b + P::STEP * j, ldb, c + j, ldc);
  for (; j < n; j += FW) micro<P, MR, 1, ADD>(k, a, lda, b + P::STEP * j, ldb, c + j, ldc);
}

// n is a multiple of FW
template <class P, bool ADD>
static void matmul(int m, int n, int k, const typename P::Item* a, int lda, const typename P::Item* b, int ldb, float* c,
                   int ldc) {
  int i = 0;
  for (; i + 6 <= m; i += 6) panel<P, 6, ADD>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc);
  a += i * lda;
  c += i * ldc;
  switch (m - i) {
    case 5: panel<P, 5, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 4: panel<P, 4, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 3: panel<P, 3, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 2: panel<P, 2, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 1: panel<P, 1, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
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

// Decodes tokens [first, first + count) of an affine page, first a multiple of 32: calls
// put(t, c, x, y) with channels c and c + 1 of the eight tokens from first + t on.
template <class Put>
KV_INLINE void keys_from_codes(const Layout& l, const uint8_t* run, int first, int count, Put put) {
  const uint16_t *ks = (const uint16_t*)(run + l.key_scale), *km = (const uint16_t*)(run + l.key_min);
  const int d = l.head_size, span = l.keys_per_channel ? l.group : 8, share = l.keys_per_channel ? 2 : l.group;
  for (int t0 = 0; t0 < count; t0 += span)
    for (int c0 = 0; c0 < d; c0 += share) {
      f8 scale[2], low[2];
      for (int i = 0; i < 2; i++) {
        const int g = l.keys_per_channel ? (first + t0) / l.group * d + c0 + i : c0 / l.group * l.page_tokens + first + t0;
        scale[i] = l.keys_per_channel ? f8_set(f16_to_float(ks[g])) : f8_load_f16(ks + g);
        low[i] = l.keys_per_channel ? f8_set(f16_to_float(km[g])) : f8_load_f16(km + g);
      }
      for (int t = t0; t < min_int(t0 + span, count); t += 8)
        for (int c = c0; c < c0 + share; c += 2) {
          const CodeSlot slot = key_slot(first + t, c & ~3, l.k_bits, d);
          const uint8_t* codes = run + l.key + slot.byte;
          put(t, c, f8_fma(f8_load_codes(codes, slot.shift + c % 4 * 8, l.k_bits), scale[0], low[0]),
              f8_fma(f8_load_codes(codes, slot.shift + c % 4 * 8 + 8, l.k_bits), scale[1], low[1]));
        }
    }
}

// The same for values: put(t, c, x, y) with channels [c, c + 8) of tokens first + t and the next
// one, which is zero where the tokens end.
template <class Put>
KV_INLINE void values_from_codes(const Layout& l, const uint8_t* run, int first, int count, Put put) {
  const uint16_t *vs = (const uint16_t*)(run + l.value_scale), *vm = (const uint16_t*)(run + l.value_min);
  const int64_t octet = int64_t(l.page_tokens) * l.v_bits;  // bytes between eight channels and the next
  for (int t = 0; t < count; t += 2) {
    const CodeSlot slot = value_slot((first + t) & ~3, 0, l.v_bits, l.page_tokens);
    const int shift = slot.shift + (first + t) % 4 * 8;
    const bool pair = t + 1 < count;
    for (int c0 = 0; c0 < l.head_size; c0 += l.group) {
      const int g = c0 / l.group * l.page_tokens + first + t;
      const f8 scale = f8_set(f16_to_float(vs[g])), low = f8_set(f16_to_float(vm[g]));
      const f8 scale2 = pair ? f8_set(f16_to_float(vs[g + 1])) : f8_zero(), low2 = pair ? f8_set(f16_to_float(vm[g + 1])) : f8_zero();
      for (int c = c0; c < c0 + l.group; c += 8) {
        const uint8_t* codes = run + l.value + slot.byte + c / 8 * octet;
        put(t, c, f8_fma(f8_load_codes(codes, shift, l.v_bits), scale, low),
            f8_fma(f8_load_codes(codes, shift + 8, l.v_bits), scale2, low2));
      }
    }
  }
}

static void tile_keys_from_codes(const Layout& l, const uint8_t* run, int first, int count, Tile* tile) {
  keys_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) {
    f8_store(tile->key + c * TILE + t, x);
    f8_store(tile->key + (c + 1) * TILE + t, y);
  });
}

static void tile_values_from_codes(const Layout& l, const uint8_t* run, int first, int count, Tile* tile) {
  const int d = l.head_size;
  values_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) {
    f8_store(tile->value + t * d + c, x);
    if (t + 1 < count) f8_store(tile->value + (t + 1) * d + c, y);
  });
}

// Running softmax of a set of query rows; out is the unnormalized sum. Scores are in units of
// log 2: queries carry a factor log2(e), so that 2^x serves as the exponential.
struct Softmax {
  float* top;   // [rows] largest score so far
  float* sum;   // [rows]
  float* out;   // [rows, head_size]
  float cap;    // of the scores; 0: none
};

// score -> cap tanh(score / cap); up to the next multiple of FW
KV_INLINE void soft_cap_row(float* score, int count, float cap) {
  const fw inverse = Wide::set(2.f * LOG2_E / cap), two_caps = Wide::set(2.f * cap);
  for (int t = 0; t < count; t += FW) {  // tanh(x) = 1 - 2 / (e^2x + 1)
    const fw power = fw_exp2(Wide::set(0.f) - Wide::max(Wide::set(-60.f), Wide::set(0.f) - Wide::load(score + t) * inverse));
    Wide::store(score + t, Wide::set(cap) - two_caps / (power + Wide::set(1.f)));
  }
}

static void softmax_begin(Softmax* s, int rows, int d) {
  for (int r = 0; r < rows; r++) s->top[r] = -1e30f, s->sum[r] = 0.f;
  memset(s->out, 0, sizeof(float) * size_t(rows) * d);
}

// scores [count] -> probabilities under the new maximum; earlier sums are rescaled.
// score[count .. next multiple of FW) is set to 0.
KV_INLINE void softmax_row(Softmax* s, int row, int d, float* score, int count) {
  const int padded = (count + FW - 1) / FW * FW;
  if (s->cap > 0.f) soft_cap_row(score, count, s->cap);
  for (int t = count; t < padded; t++) score[t] = -1e30f;
  fw top = Wide::load(score);
  for (int t = FW; t < padded; t += FW) top = Wide::max(top, Wide::load(score + t));
  const float old = s->top[row], now = max_float(old, Wide::hmax(top));
  fw sum = Wide::set(0.f);
  for (int t = 0; t < padded; t += FW) {
    const fw p = fw_exp2(Wide::load(score + t) - Wide::set(now));
    Wide::store(score + t, p);
    sum = sum + p;
  }
  for (int t = count; t < padded; t++) score[t] = 0.f;
  if (now > old) {
    const float shrink = old > -1e29f ? exp2f(old - now) : 0.f;
    s->sum[row] *= shrink;
    s->top[row] = now;
    float* out = s->out + int64_t(row) * d;
    for (int c = 0; c < d; c += FW) Wide::store(out + c, Wide::load(out + c) * Wide::set(shrink));
  }
  s->sum[row] += Wide::sum(sum);
}

// The query of row r sees the tile's first causal_from + r / heads_per_query + 1 tokens: a
// negative number sees none, SEES_ALL is for tiles that lie before every query.
enum { SEES_ALL = 1 << 20 };
static void attend_tile(const Tile& tile, int count, const float* query, int rows, int d, Softmax* s,
                        float* score, int causal_from, int heads_per_query) {
  const int padded = (count + FW - 1) / FW * FW;
  matmul<Float32, false>(rows, padded, d, query, d, tile.key, TILE, score, TILE);
  for (int r = 0; r < rows; r++) {
    const int visible = min_int(count, causal_from + r / heads_per_query + 1);
    if (visible <= 0) {  // an earlier query sees nothing of this tile
      memset(score + r * TILE, 0, sizeof(float) * TILE);
      continue;
    }
    softmax_row(s, r, d, score + r * TILE, visible);
    for (int t = (visible + FW - 1) / FW * FW; t < count; t++) score[r * TILE + t] = 0.f;
  }
  matmul<Float32, true>(rows, d, count, score, TILE, tile.value, d, s->out, d);
}
