// What rows are turned into before they are stored. The rotation of the rotated codecs, see
// cache_policies/pages/codecs/rotation.py: pages and ring hold rotated rows; queries and fresh rows
// are rotated as they are loaded, outputs rotated back. And an offset taken from all keys of a
// head, which softmax does not see.
#pragma once

#include "array.h"
#include "rows/rows.h"

// in place, and its own inverse; nothing where the layout is not rotated
static void rotate_row(const Layout& l, float* x) {
  const int size = l.rotation;
  if (!size) return;
  const float scale = float(1.0 / sqrt(double(size)));
  for (float* end = x + l.head_size; x < end; x += size) {
    for (int half = 1; half < 8; half *= 2)
      for (int i = 0; i < size; i += 2 * half)
        for (int j = i; j < i + half; j++) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b, x[j + half] = a - b;
        }
    for (int half = 8; half < size; half *= 2)
      for (int i = 0; i < size; i += 2 * half)
        for (int j = i; j < i + half; j += 8) {
          const f8 a = f8_load(x + j), b = f8_load(x + j + half);
          f8_store(x + j, a + b);
          f8_store(x + j + half, a - b);
        }
    for (int j = 0; j < size; j += 8) f8_store(x + j, f8_load(x + j) * f8_set(scale));
  }
}

static void enter_key(const Call& c, int head, float* x) {
  const int d = c.layout.head_size;
  for (int j = 0; c.key_offset && j < d; j++) x[j] -= c.key_offset[head * d + j];
  rotate_row(c.layout, x);
}

static void leave_key(const Call& c, int head, float* x) {
  const int d = c.layout.head_size;
  rotate_row(c.layout, x);
  for (int j = 0; c.key_offset && j < d; j++) x[j] += c.key_offset[head * d + j];
}

// fresh rows of every sequence as they would be stored, into `out` [tokens, num_kv_heads, head_size]
static Tensor enter_fresh(const Call& c, const Tensor& x, bool is_key, float* out) {
  const int d = c.layout.head_size, heads = c.num_kv_heads, rows = c.batch.query_start[c.batch.num_seqs] * heads;
#pragma omp parallel for schedule(static) num_threads(c.num_threads) if (rows > 512)
  for (int i = 0; i < rows; i++) {
    load_row(tensor_row(c, x, i / heads, i % heads), c.dtype, d, out + int64_t(i) * d);
    if (is_key) enter_key(c, i % heads, out + int64_t(i) * d);
    else rotate_row(c.layout, out + int64_t(i) * d);
  }
  return {(char*)out, int64_t(heads) * d};
}
