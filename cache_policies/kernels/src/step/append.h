// Writing fresh tokens into the ring, and absorbing full groups of them into the store.
#pragma once

#include "codes/encode.h"
#include "rows/encode.h"

// keys and values of `count` tokens, [count, head_size] float, into the store at `first`
static void write_store(Call& c, int seq, int head, int first, int count, float* key, float* value) {
  const Layout& l = c.layout;
  const int d = l.head_size;
  for (int t = 0; t < count; t++) {
    const int position = first + t, slot = position % l.page_tokens;
    uint8_t* run = c.run(seq, c.batch.store_row[seq] + position / l.page_tokens, head);
    float *k = key + int64_t(t) * d, *v = value + int64_t(t) * d;
    if (l.kind == Kind::affine) {
      if (!l.keys_per_channel)
        encode_token(l, run, l.key, l.key_scale, l.key_min, l.k_bits, true, slot, k);
      else if (slot % l.group == 0)
        encode_key_group(l, run, slot, k);
      encode_token(l, run, l.value, l.value_scale, l.value_min, l.v_bits, false, slot, v);
    } else if (l.kind == Kind::int8) {
      encode_int8((int8_t*)run + l.key + octet_start(slot, d), 8, (uint16_t*)(run + l.key_scale), slot, d, k);
      encode_int8((int8_t*)run + l.value + int64_t(slot) * d, 1, (uint16_t*)(run + l.value_scale), slot, d, v);
    } else {
      const int64_t item = item_bytes(l.store_dtype);
      char row[256 * 4];
      store_clamped(row, l.store_dtype, d, k);
      char* octet = (char*)run + l.key + octet_start(slot, d) * item;
      for (int j = 0; j < d; j++) memcpy(octet + 8 * j * item, row + j * item, size_t(item));
      store_clamped((char*)run + l.value + slot * d * item, l.store_dtype, d, v);
    }
  }
}

static void write_ring(Call& c, int seq, int head, int slot, float* key, float* value) {
  const Layout& l = c.layout;
  uint8_t* run = c.run(seq, slot / l.ring_tokens, head);
  char* row = (char*)run + int64_t(slot % l.ring_tokens) * 4 * l.head_size;
  store_clamped(row, l.ring_dtype, l.head_size, key);
  store_clamped(row + 2 * l.head_size, l.ring_dtype, l.head_size, value);
}

static void load_pending(const Call& c, int seq, int head, int first, int count, int in_ring,
                         float* key, float* value) {
  // pending tokens are those of the ring followed by the fresh ones
  const int d = c.layout.head_size;
  KvRows rows;
  for (int t = 0; t < count; t++) {
    const int i = first + t;
    if (i < in_ring) ring_rows(c, seq, head, i, 1, &rows);
    else fresh_rows(c, seq, head, i - in_ring, 1, &rows);
    load_row(rows.key.row[0], rows.key.dtype, d, key + int64_t(t) * d);
    load_row(rows.value.row[0], rows.value.dtype, d, value + int64_t(t) * d);
  }
}

static void append_head(Call& c, int seq, int head) {
  enum { STEP = 128 };  // every group divides it
  const Batch& b = c.batch;
  const int fresh = b.appended[seq], in_ring = b.ring[seq], absorbed = b.stored_after[seq] - b.stored[seq];
  float key[STEP * 256], value[STEP * 256];
  for (int i = 0; i < absorbed; i += STEP) {
    const int count = min_int(STEP, absorbed - i);
    load_pending(c, seq, head, i, count, in_ring, key, value);
    write_store(c, seq, head, b.stored[seq] + i, count, key, value);
  }
  // What is left moves to the front of the ring; without absorption only fresh tokens move.
  for (int i = absorbed ? absorbed : in_ring; i < in_ring + fresh; i++) {
    load_pending(c, seq, head, i, 1, in_ring, key, value);
    write_ring(c, seq, head, i - absorbed, key, value);
  }
}

static void append(Call& c) {
  const int tasks = c.batch.num_seqs * c.num_kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.num_threads) if (tasks > 1)
  for (int i = 0; i < tasks; i++) append_head(c, i / c.num_kv_heads, i % c.num_kv_heads);
}
