// Cuts of pages whose tokens share scales: kept tokens go to places 0, 1, 2, ... A group that stays
// whole is copied as it is stored, so that no cut rounds it again; others are decoded, encoded anew.
#pragma once

#include "step/move.h"

// tokens that share bytes of a page: codes are packed 32 together, a scale is that of a group
KV_INLINE int unit_tokens(const Layout& l) { return max_int(32, l.group); }

KV_INLINE void copy_rows(uint8_t* to, const uint8_t* from, int rows, int64_t stride, int64_t bytes) {
  for (int i = 0; i < rows; i++) memmove(to + i * stride, from + i * stride, size_t(bytes));
}

// a unit of a page, from `slot` on, to `place` of another page or the same
static void copy_unit(const Layout& l, uint8_t* to, int place, const uint8_t* from, int slot) {
  if (to == from && place == slot) return;
  const int unit = unit_tokens(l), d = l.head_size, n = l.page_tokens;
  const int64_t key = int64_t(d) * l.k_bits / 8, scales = int64_t(d) * 2 / l.group, octet = int64_t(n) * l.v_bits;
  copy_rows(to + l.key + place * key, from + l.key + slot * key, 1, 0, unit * key);
  const int64_t into = place * scales, at = slot * scales;  // of keys, a row of channels for each group
  copy_rows(to + l.key_scale + into, from + l.key_scale + at, 1, 0, unit * scales);
  copy_rows(to + l.key_min + into, from + l.key_min + at, 1, 0, unit * scales);
  copy_rows(to + l.value + place * l.v_bits, from + l.value + slot * l.v_bits, d / 8, octet, unit * l.v_bits);
  copy_rows(to + l.value_scale + place * 2, from + l.value_scale + slot * 2, d / l.group, n * 2, unit * 2);
  copy_rows(to + l.value_min + place * 2, from + l.value_min + slot * 2, d / l.group, n * 2, unit * 2);
}

// whether the next tokens are a whole unit of the source's store
KV_INLINE bool is_unit(const Call& source, int seq, const int32_t* number, int unit) {
  return *number % unit == 0 && *number + unit <= source.batch.stored[seq] && in_order(number, unit) == unit;
}

static void read_numbers(const Call& source, int seq, int head, const int32_t* number, int count, float* key, float* value) {
  const int d = source.layout.head_size;
  for (int i = 0; i < count; i++) read_token(source, seq, head, number[i], key + i * d, value + i * d);
}

// false: no memory
static bool move_head(Call& c, const Call& source, int seq, int head, const int32_t* index, const int32_t* number, int count) {
  const Layout& l = c.layout;
  const int d = l.head_size, stored = min_int(count, c.batch.stored[seq]), rest = count - stored, unit = unit_tokens(l);
  Array<float> key(int64_t(rest) * d), value(int64_t(rest) * d);
  if (!key.ok() || !value.ok()) return false;
  // First, since the ring is written over; what follows never reads what it has written, for no
  // token moves backwards.
  read_numbers(source, seq, head, number + stored, rest, key.data, value.data);
  float k[128 * 256], v[128 * 256];  // of a unit
  int first = 0;
  while (first < stored && index[first] < 0) first += l.page_tokens;  // pages that the head lacks
  for (int t = first; t < stored; t += unit) {
    if (is_unit(source, seq, number + t, unit)) {
      const int slot = number[t] % l.page_tokens;
      uint8_t* run = c.run(seq, c.batch.store_row[seq] + t / l.page_tokens, head);
      copy_unit(l, run, t % l.page_tokens, source.store_run(seq, number[t] / l.page_tokens, head), slot);
      continue;
    }
    read_numbers(source, seq, head, number + t, unit, k, v);
    for (int i = 0; i < unit; i++) enter_key(c, head, k + i * d);
    write_store(c, seq, head, t, unit, k, v);
  }
  for (int i = 0; i < rest; i++) {
    enter_key(c, head, key.data + i * d);
    write_ring(c, seq, head, index[stored + i] - c.batch.stored[seq], key.data + i * d, value.data + i * d);
  }
  return true;
}

static bool move_tokens(Call& c, const Call& source, const Moved& m) {
  const int tasks = c.batch.num_seqs * c.num_kv_heads;
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.num_threads) if (tasks > 1) reduction(|| : failed)
  for (int i = 0; i < tasks; i++) {
    const int seq = i / c.num_kv_heads, head = i % c.num_kv_heads, from = m.start[seq], count = m.start[seq + 1] - from;
    const int64_t at = head * m.count + from;
    if (count && !move_head(c, source, seq, head, m.index + at, m.number + at, count)) failed = true;
  }
  return !failed;
}
