// Writing fresh tokens into the ring, and absorbing full groups of them into the store.
#pragma once

#include "codes/encode.h"
#include "rows/encode.h"
#include "rows/rotate.h"

// packed codes of tokens [slot, slot + n) of a page, all in one octet
static void encode_codes(const Layout& l, uint8_t* run, int slot, int n, const float* key, const float* value) {
  const int d = l.head_size;
  if (l.keys_per_channel && slot % l.group == 0) encode_key_group(l, run, slot, key);  // of the whole group
  for (int t = 0; t < n && !l.keys_per_channel; t++) encode_key(l, run, slot + t, key + t * d);
  for (int t = 0; t < n;) {
    const int lane = min_int(n - t, 4 - (slot + t) % 4);
    encode_values(l, run, slot + t, lane, value + t * d);
    t += lane;
  }
}

// keys and values of `count` tokens, [count, head_size] float, into the store at `first`
static void write_store(Call& c, int seq, int head, int first, int count, float* key, float* value) {
  const Layout& l = c.layout;
  for (int t = 0, n; t < count; t += n) {
    const int position = first + t, slot = position % l.page_tokens;
    n = min_int(count - t, 8 - slot % 8);
    uint8_t* run = c.run(seq, c.batch.store_row[seq] + position / l.page_tokens, head);
    float *k = key + int64_t(t) * l.head_size, *v = value + int64_t(t) * l.head_size;
    if (l.kind == Kind::affine) {
      encode_codes(l, run, slot, n, k, v);
    } else if (n == 8) {
      if (l.kind == Kind::int8) encode_int8_octet(l, run, slot, k, v);
      else encode_plain_octet(l, run, slot, k, v);
    } else {
      for (int i = 0; i < n; i++, k += l.head_size, v += l.head_size) {
        if (l.kind == Kind::int8) encode_int8_token(l, run, slot + i, k, v);
        else encode_plain_token(l, run, slot + i, k, v);
      }
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
    if (i < in_ring) continue;  // is as it was written
    enter_key(c, head, key + int64_t(t) * d);
    rotate_row(c.layout, value + int64_t(t) * d);
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
