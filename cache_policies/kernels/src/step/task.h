// What the tasks of attention and of its mass share: their queries, scratch memory, and the
// denominators that one leaves for the other.
#pragma once

#include "array.h"
#include "rows/rotate.h"
#include "tile/bf16.h"
#include "tile/tile.h"

struct Task {
  int seq, head;            // KV head
  int query_from, queries;  // fresh query tokens, counted from the sequence's first
  int page_from, page_to;   // among the store pages that are read
  bool last;                // reads ring and fresh tokens too
  int64_t partial;          // first row in the partial buffer, or -1: writes the output itself
};

struct Scratch {
  Tile tile;
#if defined(__AVX512BF16__)
  TileBf16 bf16;
#endif
  alignas(64) float query[MAX_ROWS * 256], out[MAX_ROWS * 256], score[MAX_ROWS * TILE];
  float top[MAX_ROWS], sum[MAX_ROWS];
};

// One for the life of each OpenMP thread: mapping it anew every step would cost page faults.
// Null where there is no memory for it.
static Scratch* thread_scratch() {
  struct Owner {
    Scratch* data = nullptr;
    ~Owner() { free(data); }
  };
  static thread_local Owner owner;
  if (!owner.data) owner.data = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  return owner.data;
}

KV_INLINE int heads_per_query(const Call& c) { return c.num_heads / c.num_kv_heads; }

static void load_queries(const Call& c, const Task& t, float* out) {
  const int d = c.layout.head_size, group = heads_per_query(c);
  for (int i = 0; i < t.queries; i++)
    for (int g = 0; g < group; g++) {
      float* row = out + int64_t(i * group + g) * d;
      const int64_t token = c.batch.query_start[t.seq] + t.query_from + i;
      load_row(tensor_row(c, c.query, token, t.head * group + g), c.dtype, d, row);
      rotate_row(c.layout, row);
      for (int j = 0; j < d; j++) row[j] *= c.scale * LOG2_E;
    }
}

// log2 of the softmax denominators of the queries whose mass is asked for
struct Denominators {
  float* log2;            // [queries of all sequences, num_heads]
  const int64_t* offset;  // [num_seqs] first query of a sequence
};
