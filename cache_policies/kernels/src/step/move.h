// Reading held tokens as floats and writing them back: what evicting methods do between steps.
// Tokens are numbered through store, ring and fresh ones.
#pragma once

#include "step/append.h"

// codes of eight channels of a key, from channel c on
KV_INLINE f8 key_codes(const Layout& l, const uint8_t* run, int slot, int c) {
#if defined(__AVX2__)
  if (l.k_bits != 3) {
    const CodeSlot k = key_slot(slot, c, l.k_bits, l.head_size);  // bytes of four channels, then the next block's
    return f8_load_two_codes(run + l.key + k.byte, run + l.key + k.byte + l.k_bits * 16, k.shift, l.k_bits);
  }
#endif
  alignas(32) float code[8];
  for (int i = 0; i < 8; i++)
    code[i] = float(get_code(run + l.key, key_slot(slot, c + i, l.k_bits, l.head_size), l.k_bits));
  return f8_load(code);
}

// codes of eight channels of a value, from channel c on
KV_INLINE f8 value_codes(const Layout& l, const uint8_t* run, int slot, int c) {
  if (l.v_bits != 3) {
    const CodeSlot v = value_slot(slot & ~3, c, l.v_bits, l.page_tokens);  // a lane of four tokens
    return f8_load_codes(run + l.value + v.byte, slot % 4 * 8 + v.shift, l.v_bits);
  }
  alignas(32) float code[8];
  for (int i = 0; i < 8; i++)
    code[i] = float(get_code(run + l.value, value_slot(slot, c + i, 3, l.page_tokens), 3));
  return f8_load(code);
}

static void read_codes(const Layout& l, const uint8_t* run, int slot, float* key, float* value) {
  const int d = l.head_size, n = l.page_tokens;
  const uint16_t *ks = (const uint16_t*)(run + l.key_scale), *km = (const uint16_t*)(run + l.key_min);
  const uint16_t *vs = (const uint16_t*)(run + l.value_scale), *vm = (const uint16_t*)(run + l.value_min);
  for (int c = 0; c < d; c += 8) {
    const int by_token = c / l.group * n + slot, by_channel = slot / l.group * d + c;
    const bool channels = l.keys_per_channel;
    const f8 scale = channels ? f8_load_f16(ks + by_channel) : f8_set(f16_to_float(ks[by_token]));
    const f8 low = channels ? f8_load_f16(km + by_channel) : f8_set(f16_to_float(km[by_token]));
    f8_store(key + c, f8_fma(key_codes(l, run, slot, c), scale, low));
    const f8 code = value_codes(l, run, slot, c);
    f8_store(value + c, f8_fma(code, f8_set(f16_to_float(vs[by_token])), f8_set(f16_to_float(vm[by_token]))));
  }
}

static void scale_row(float* row, int d, uint16_t scale) {
  const f8 by = f8_set(f16_to_float(scale));
  for (int c = 0; c < d; c += 8) f8_store(row + c, f8_load(row + c) * by);
}

static void read_stored(const Call& c, int seq, int head, int token, float* key, float* value) {
  const Layout& l = c.layout;
  const int d = l.head_size, slot = token % l.page_tokens;
  const uint8_t* run = c.store_run(seq, token / l.page_tokens, head);
  if (l.kind == Kind::affine) return read_codes(l, run, slot, key, value);
  KvRows rows;
  page_rows(c, run, slot & ~7, 8, &rows);
  const int64_t item = item_bytes(rows.key.dtype);
  char strided[256 * 4];
  for (int j = 0; j < d; j++) memcpy(strided + j * item, rows.octets + (j * 8 + slot % 8) * item, size_t(item));
  load_row(strided, rows.key.dtype, d, key);
  load_row(rows.value.row[slot % 8], rows.value.dtype, d, value);
  if (!rows.key.scale) return;
  scale_row(key, d, rows.key.scale[slot % 8]);
  scale_row(value, d, rows.value.scale[slot % 8]);
}

// eight tokens of a plain or int8 page, from an octet's first on
static void read_octet(const Call& c, int seq, int head, int token, float* key, float* value) {
  const int d = c.layout.head_size, slot = token % c.layout.page_tokens;
  KvRows rows;
  page_rows(c, c.store_run(seq, token / c.layout.page_tokens, head), slot, 8, &rows);
  const int64_t bytes = 8 * item_bytes(rows.key.dtype);
  for (int j = 0; j < d; j += 8) {
    f8 block[8];
    for (int i = 0; i < 8; i++) block[i] = load8(rows.octets + (j + i) * bytes, rows.key.dtype, 0);
    f8_transpose(block);
    for (int i = 0; i < 8; i++) f8_store(key + i * d + j, block[i]);
  }
  for (int i = 0; i < 8; i++) {
    load_row(rows.value.row[i], rows.value.dtype, d, value + i * d);
    if (rows.key.scale) scale_row(key + i * d, d, rows.key.scale[i]);
    if (rows.value.scale) scale_row(value + i * d, d, rows.value.scale[i]);
    leave_key(c, head, key + i * d);
  }
}

// how many of `index` follow each other from the first on, at most `most`
KV_INLINE int in_order(const int32_t* index, int most) {
  int n = 1;
  while (n < most && index[n] == index[0] + n) n++;
  return n;
}

static void read_token(const Call& c, int seq, int head, int token, float* key, float* value) {
  const int stored = c.batch.stored[seq], ring = c.batch.ring[seq];
  if (token < 0) {
    memset(key, 0, sizeof(float) * size_t(c.layout.head_size));
    memset(value, 0, sizeof(float) * size_t(c.layout.head_size));
    return;
  }
  if (token < stored) {
    read_stored(c, seq, head, token, key, value);
  } else {  // the first `appended` fresh tokens are in store and ring already
    const int pending = token - stored;
    load_pending(c, seq, head, pending < ring ? pending : pending + c.batch.appended[seq], 1, ring, key, value);
  }
  leave_key(c, head, key);
  rotate_row(c.layout, value);
}

enum { MOVED_TOGETHER = 64 };  // tokens of a task
static void read_tokens(const Call& c, const Moved& m) {
  const int64_t d = c.layout.head_size, parts = (m.count + MOVED_TOGETHER - 1) / MOVED_TOGETHER;
#pragma omp parallel for schedule(static) num_threads(c.num_threads) if (parts > 1)
  for (int64_t p = 0; p < parts * c.num_kv_heads; p++) {
    const int head = int(p / parts);
    const int64_t from = p % parts * MOVED_TOGETHER, end = min_int64(m.count, from + MOVED_TOGETHER);
    int seq = 0;
    for (int64_t i = from, n; i < end; i += n) {
      while (i >= m.start[seq + 1]) seq++;
      const int64_t at = head * m.count + i;
      const int token = m.index[at], most = int(min_int64(end, m.start[seq + 1]) - i);
      const bool octet = c.layout.kind != Kind::affine && token >= 0 && token % 8 == 0 && most >= 8 &&
                         token + 8 <= c.batch.stored[seq] && in_order(m.index + at, 8) == 8;
      n = octet ? 8 : 1;
      if (octet) read_octet(c, seq, head, token, m.key + at * d, m.value + at * d);
      else read_token(c, seq, head, token, m.key + at * d, m.value + at * d);
    }
  }
}

// Keys quantized per channel are written in whole groups: the index is then 0, 1, 2, ..., or
// none for whole pages at its beginning.
static void write_head(Call& c, int seq, int head, const int32_t* index, int count, float* key, float* value) {
  const int d = c.layout.head_size, stored = c.batch.stored[seq];
  int i = 0;
  if (c.layout.kind == Kind::affine && c.layout.keys_per_channel) {
    int first = 0;
    i = min_int(count, stored);
    while (first < i && index[first] < 0) first += c.layout.page_tokens;
    first = min_int(first, i);
    for (int t = first; t < i; t++) enter_key(c, head, key + int64_t(t) * d);
    write_store(c, seq, head, first, i - first, key + int64_t(first) * d, value + int64_t(first) * d);
  }
  for (int n; i < count; i += n) {
    float *k = key + int64_t(i) * d, *v = value + int64_t(i) * d;
    n = 1;
    if (index[i] < 0) continue;
    const bool store = index[i] < stored;
    if (store) n = in_order(index + i, min_int(count - i, stored - index[i]));
    for (int j = 0; j < n; j++) {
      enter_key(c, head, k + int64_t(j) * d);
      rotate_row(c.layout, v + int64_t(j) * d);
    }
    if (store) write_store(c, seq, head, index[i], n, k, v);
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
