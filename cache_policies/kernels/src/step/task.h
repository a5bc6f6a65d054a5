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
  TileBf16 bf16;
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

// Whether products of float tiles run in bfloat16, as sums of two numbers: they do with AMX.
static bool splits_floats(const Call& c) { return PARTS == 2 && c.rounding; }

// Keys as many bits as a model's or a page's 16 are one bfloat16 number for a model in bfloat16.
static int parts_of_rows(const Call& c, const KvRows& rows) {
  return c.dtype == Dtype::bf16 && item_bytes(rows.key.dtype) == 2 ? 1 : 2;
}

// x->score of the query rows in x->query (and with AMX x->bf16) with `count` keys in x->tile (x->bf16)
static void score_tile(const Call& c, int count, int rows, Scratch* x) {
  const int d = c.layout.head_size;
  if (splits_floats(c)) return bf16_scores(x->bf16, count, 0, rows, d, x->score);
  matmul<Float32, false>(rows, (count + FW - 1) / FW * FW, d, x->query, d, x->tile.key, KEY_ROW, x->score, TILE);
}
