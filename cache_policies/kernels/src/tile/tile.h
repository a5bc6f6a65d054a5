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

// Rows at a distance that is a power of two share few sets of the first cache: 64 bytes more between
// them, and a column of keys has room in it.
enum { KEY_ROW = TILE + 16 };

struct Tile {
  alignas(64) float key[256 * KEY_ROW];  // [channel][token]
  alignas(64) float value[TILE * 256];   // [token][channel]
};

static void tile_keys_from_octets(const KvRows& rows, int d, Tile* tile) {
  const Rows& key = rows.key;
  const int64_t bytes = 8 * item_bytes(key.dtype);
  for (int t = 0; t < key.count; t += 8) {
    const f8 scale = key.scale ? f8_load_f16(key.scale + t) : f8_set(1.f);
    for (int c = 0; c < d; c++)
      f8_store(tile->key + c * KEY_ROW + t, load8(rows.octets + (t / 8 * d + c) * bytes, key.dtype, 0) * scale);
  }
}

static void tile_keys_from_rows(const KvRows& rows, int d, Tile* tile) {
  const Rows& key = rows.key;
  if (rows.octets) return tile_keys_from_octets(rows, d, tile);
  for (int t = 0; t < key.count; t += 8)
    for (int c = 0; c < d; c += 8) {
      f8 block[8];
      for (int i = 0; i < 8; i++) block[i] = t + i < key.count ? load8(key.row[t + i], key.dtype, c) : f8_zero();
      f8_transpose(block);
      for (int i = 0; i < 8; i++) f8_store(tile->key + (c + i) * KEY_ROW + t, block[i]);
    }
}

static void tile_values_from_rows(const KvRows& rows, int d, Tile* tile) {
  const Rows& value = rows.value;
  for (int t = 0; t < value.count; t++) {
    float* out = tile->value + t * d;
    load_row(value.row[t], value.dtype, d, out);
    if (!value.scale) continue;
    const f8 scale = f8_set(f16_to_float(value.scale[t]));
    for (int c = 0; c < d; c += 8) f8_store(out + c, f8_load(out + c) * scale);
  }
}

static void tile_keys_from_codes(const Layout& l, const uint8_t* run, int first, int count, Tile* tile) {
  keys_from_codes(l, run, first, count, [=](int t, int c, f8 x, f8 y) {
    f8_store(tile->key + c * KEY_ROW + t, x);
    f8_store(tile->key + (c + 1) * KEY_ROW + t, y);
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
  const int padded = (count + 31) & ~31, whole = causal_from >= count ? rows & ~3 : 0;
  for (int r = 0; r < whole; r += 4) softmax_rows<4>(s, first + r, d, score + r * TILE, TILE, count);
  for (int r = 0; r < whole; r++)
    for (int t = (count + FW - 1) / FW * FW; t < padded; t++) score[r * TILE + t] = 0.f;
  score += whole * TILE;
  for (int r = first + whole; r < first + rows; r++, score += TILE) {
    const int visible = min_int(count, causal_from + r / heads_per_query + 1);
    if (visible > 0) softmax_row(s, r, d, score, visible);
    for (int t = visible > 0 ? (visible + FW - 1) / FW * FW : 0; t < padded; t++) score[t] = 0.f;
  }
}

static void attend_tile(const Tile& tile, int count, const float* query, int rows, int d, Softmax* s,
                        float* score, int causal_from, int heads_per_query) {
  const int padded = (count + FW - 1) / FW * FW;
  matmul<Float32, false>(rows, padded, d, query, d, tile.key, KEY_ROW, score, TILE);
  weigh_rows(count, 0, rows, d, s, score, causal_from, heads_per_query);
  matmul<Float32, true>(rows, d, count, score, TILE, tile.value, d, s->out, d);
}
