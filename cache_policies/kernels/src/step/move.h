// Reading held tokens as floats and writing them back: what evicting methods do between steps.
// Tokens are numbered through store, ring and fresh ones.
#pragma once

#include "step/append.h"

static void read_stored(const Call& c, int seq, int head, int token, float* key, float* value) {
  const Layout& l = c.layout;
  const int d = l.head_size, n = l.page_tokens, slot = token % n;
  const uint8_t* run = c.store_run(seq, token / n, head);
  if (l.kind == Kind::affine) {
    const uint16_t *ks = (const uint16_t*)(run + l.key_scale), *km = (const uint16_t*)(run + l.key_min);
    const uint16_t *vs = (const uint16_t*)(run + l.value_scale), *vm = (const uint16_t*)(run + l.value_min);
    for (int j = 0; j < d; j++) {
      const CodeSlot k = key_slot(slot, j, l.k_bits, d), v = value_slot(slot, j, l.v_bits, n);
      const int by_token = j / l.group * n + slot;
      const int g = l.keys_per_channel ? slot / l.group * d + j : by_token;
      const int key_code = run[l.key + k.byte] >> k.shift & ((1 << l.k_bits) - 1);
      const int value_code = run[l.value + v.byte] >> v.shift & ((1 << l.v_bits) - 1);
      key[j] = float(key_code) * f16_to_float(ks[g]) + f16_to_float(km[g]);
      value[j] = float(value_code) * f16_to_float(vs[by_token]) + f16_to_float(vm[by_token]);
    }
    return;
  }
  KvRows rows;
  page_rows(c, run, slot & ~7, 8, &rows);
  const int64_t item = item_bytes(rows.key.dtype);
  char strided[256 * 4];
  for (int j = 0; j < d; j++) memcpy(strided + j * item, rows.octets + (j * 8 + slot % 8) * item, size_t(item));
  load_row(strided, rows.key.dtype, d, key);
  load_row(rows.value.row[slot % 8], rows.value.dtype, d, value);
  if (!rows.key.scale) return;
  const float k = f16_to_float(rows.key.scale[slot % 8]), v = f16_to_float(rows.value.scale[slot % 8]);
  for (int j = 0; j < d; j++) key[j] *= k, value[j] *= v;
}

static void read_token(const Call& c, int seq, int head, int token, float* key, float* value) {
  const int stored = c.batch.stored[seq], ring = c.batch.ring[seq];
  if (token < 0) {
    memset(key, 0, sizeof(float) * size_t(c.layout.head_size));
    memset(value, 0, sizeof(float) * size_t(c.layout.head_size));
  } else if (token < stored) {
    read_stored(c, seq, head, token, key, value);
  } else {  // the first `appended` fresh tokens are in store and ring already
    const int pending = token - stored;
    load_pending(c, seq, head, pending < ring ? pending : pending + c.batch.appended[seq], 1, ring, key, value);
  }
}

enum { MOVED_TOGETHER = 64 };  // tokens of a task
static void read_tokens(const Call& c, const Moved& m) {
  const int64_t d = c.layout.head_size, parts = (m.count + MOVED_TOGETHER - 1) / MOVED_TOGETHER;
#pragma omp parallel for schedule(static) num_threads(c.num_threads) if (parts > 1)
  for (int64_t p = 0; p < parts * c.num_kv_heads; p++) {
    const int head = int(p / parts);
    const int64_t from = p % parts * MOVED_TOGETHER, end = min_int64(m.count, from + MOVED_TOGETHER);
    int seq = 0;
    for (int64_t i = from; i < end; i++) {
      while (i >= m.start[seq + 1]) seq++;
      const int64_t at = head * m.count + i;
      read_token(c, seq, head, m.index[at], m.key + at * d, m.value + at * d);
    }
  }
}

// Keys quantized per channel are written in whole groups: the index is then 0, 1, 2, ...
static void write_head(Call& c, int seq, int head, const int32_t* index, int count, float* key, float* value) {
  const int d = c.layout.head_size, stored = c.batch.stored[seq];
  int i = 0;
  if (c.layout.kind == Kind::affine && c.layout.keys_per_channel) {
    i = min_int(count, stored);
    write_store(c, seq, head, 0, i, key, value);
  }
  for (; i < count; i++) {
    float *k = key + int64_t(i) * d, *v = value + int64_t(i) * d;
    if (index[i] < 0) continue;
    if (index[i] < stored) write_store(c, seq, head, index[i], 1, k, v);
    else write_ring(c, seq, head, index[i] - stored, k, v);
  }
}

static void write_tokens(Call& c, const Moved& m) {
  const int64_t d = c.layout.head_size;
  const int tasks = c.batch.num_seqs * c.num_kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.num_threads) if (tasks > 1)
  for (int i = 0; i < tasks; i++) {
    const int seq = i / c.num_kv_heads, head = i % c.num_kv_heads, count = m.start[seq + 1] - m.start[seq];
    const int64_t at = head * m.count + m.start[seq];
    write_head(c, seq, head, m.index + at, count, m.key + at * d, m.value + at * d);
  }
}
