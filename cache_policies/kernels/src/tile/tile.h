// Attention over float tiles: prefill, and decode of pages without a faster path.
//
// A task owns up to MAX_ROWS query rows (query tokens x query heads of one KV head). For each
// tile of up to 128 tokens the keys are brought to [channel][token] and the values to
// [token][channel] floats, in a buffer that stays in L2; then two small matrix products and
// an online softmax. Only a tile is ever dequantized, never the cache.
#pragma once

#include "codes/unpack.h"
#include "rows/rows.h"
#include "tile/matmul.h"
#include "tile/softmax.h"

enum { MAX_ROWS = 192 };

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

// Scores [rows][TILE] of the query rows from `first` on become weights. The query of row r sees the
// tile's first causal_from + r / heads_per_query + 1 tokens: a negative number sees none, SEES_ALL is
// for tiles that lie before every query. Weights of others are zero up to the next multiple of 32.
enum { SEES_ALL = 1 << 20 };
static void weigh_rows(int count, int first, int rows, int d, Softmax* s, float* score, int causal_from, int heads_per_query) {
  const int padded = (count + 31) & ~31;
  for (int r = first; r < first + rows; r++, score += TILE) {
    const int visible = min_int(count, causal_from + r / heads_per_query + 1);
    if (visible > 0) softmax_row(s, r, d, score, visible);
    for (int t = visible > 0 ? (visible + FW - 1) / FW * FW : 0; t < padded; t++) score[t] = 0.f;
  }
}

static void attend_tile(const Tile& tile, int count, const float* query, int rows, int d, Softmax* s,
                        float* score, int causal_from, int heads_per_query) {
  const int padded = (count + FW - 1) / FW * FW;
  matmul<Float32, false>(rows, padded, d, query, d, tile.key, TILE, score, TILE);
  weigh_rows(count, 0, rows, d, s, score, causal_from, heads_per_query);
  matmul<Float32, true>(rows, d, count, score, TILE, tile.value, d, s->out, d);
}
