// What the kernels know of a page, a batch and the tensors of one call. Filled from Python,
// where cache_policies/pages/layout.py declares the fields and cache_policies/pages/plan.py the counts.
#pragma once
#include <cstdint>

namespace kvthrift {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2, s8 = 3 };
enum class Kind : int { plain = 0, int8 = 1, affine = 2 };

struct Layout {
  Kind kind;
  Dtype store_dtype;  // of plain pages
  Dtype ring_dtype;
  int head_size, page_tokens, ring_tokens, ring_pages;
  int k_bits, v_bits, group;  // affine pages
  bool keys_per_channel;
  int rotation;  // channels that a rotation mixes; 0: rows are not rotated
  // byte offsets inside one head's run; -1 where the codec has no such field
  int64_t key, key_scale, key_min, value, value_scale, value_min;
  int64_t run_bytes;  // of one head in one page
};

struct Batch {
  int num_seqs;
  const int32_t* query_start;   // [num_seqs + 1]
  const int32_t* stored;        // [num_seqs] tokens in the store before this step
  const int32_t* ring;          // [num_seqs] tokens in the ring before this step
  const int32_t* stored_after;  // [num_seqs] tokens in the store after append
  const int32_t* appended;      // [num_seqs] fresh tokens that append writes
  const int32_t* store_row;     // [num_seqs] row index of the first store page
  const int32_t* block_table;   // [num_seqs, row_stride]
  int64_t row_stride;
  const int32_t* slots;         // [num_seqs, num_kv_heads, slot_row], or null; see Call::run
  int64_t slot_row;             // row indices of the slot map
};

// Probability mass to be added up per KV head and token; null first_query: none.
struct Mass {
  const int32_t* first_query;  // [num_seqs] fresh queries from here on are counted
  const int32_t* first_token;  // [num_seqs] pages that end before this token are left out
  const int32_t* place;        // [num_seqs] where in a row of out its tokens begin; below 0: not counted
  float* out;                  // [num_kv_heads, stride]
  int64_t stride;
};

// Store pages that are read, in lists; null count: all of them.
struct Reads {
  const int32_t* pages;  // [lists, num_kv_heads, width], ascending
  const int32_t* count;  // [lists, num_kv_heads]; -1: all pages of the sequence
  const int32_t* first;  // [num_seqs] first list of a sequence
  int64_t width;
  int block;  // queries that share a list; 0: all of a sequence share its first one
};

struct Tensor {  // [tokens, heads, head_size], heads contiguous
  char* data;
  int64_t token_stride;  // elements
};

struct Call {
  Layout layout;
  Batch batch;
  Dtype dtype;        // of query, key, value and output
  Dtype fresh_dtype;  // of key and value where attention has rotated them
  int num_heads, num_kv_heads;
  float scale;
  const float* key_offset;  // [num_kv_heads, head_size] taken from every key, or null
  float soft_cap;      // scores become soft_cap tanh(score / soft_cap); 0: they stay
  const float* sinks;  // [num_heads] learned scores without a token, or null
  Tensor query, key, value, output;
  uint8_t* pages;
  int64_t page_stride, head_stride;  // bytes
  int num_threads;
  bool rounding;  // false: all products in float32, for measuring what integers and bfloat16 add
  Mass mass;
  Reads reads;

  // queries from this one on that read the same pages as it does
  int same_reads(int query) const { return reads.block ? reads.block - query % reads.block : 1 << 30; }
  int64_t list(int seq, int head, int query) const {
    return int64_t(reads.first[seq] + (reads.block ? query / reads.block : 0)) * num_kv_heads + head;
  }
  bool reads_all(int seq, int head, int query) const {
    return !reads.count || reads.count[list(seq, head, query)] < 0;
  }
  // store pages that a query (counted from the sequence's first fresh one) reads
  int store_pages(int seq, int head, int query) const {
    const int all = (batch.stored[seq] + layout.page_tokens - 1) / layout.page_tokens;
    return reads_all(seq, head, query) ? all : reads.count[list(seq, head, query)];
  }
  // the i-th of them
  int store_page(int seq, int head, int query, int i) const {
    return reads_all(seq, head, query) ? i : reads.pages[list(seq, head, query) * reads.width + i];
  }
  bool reads_page(int seq, int head, int query, int page) const {
    if (reads_all(seq, head, query)) return true;
    const int32_t* from = reads.pages + list(seq, head, query) * reads.width;
    int low = 0, high = reads.count[list(seq, head, query)];
    while (low < high) {
      const int middle = (low + high) / 2;
      if (from[middle] < page) low = middle + 1;
      else high = middle;
    }
    return low < reads.count[list(seq, head, query)] && from[low] == page;
  }
  const uint8_t* store_run(int seq, int page, int head) const {
    return run(seq, batch.store_row[seq] + page, head);
  }

  // Where a head's bytes of the page at a row index are: the only function that knows. With a
  // slot map they are in another place of the request's row.
  const uint8_t* run(int seq, int row, int head) const {
    if (batch.slots) {
      const int slot = batch.slots[(int64_t(seq) * num_kv_heads + head) * batch.slot_row + row];
      row = slot / num_kv_heads, head = slot % num_kv_heads;
    }
    const int64_t id = batch.block_table[seq * batch.row_stride + row];
    return pages + id * page_stride + head * head_stride;
  }
  uint8_t* run(int seq, int row, int head) {
    return const_cast<uint8_t*>(static_cast<const Call*>(this)->run(seq, row, head));
  }
};

// What a few queries of each block attend to, by store pages.
struct PageMass {
  const int32_t* blocks;  // [count, 3]: sequence, first fresh query, queries
  int count, samples;
  float* mass;  // [count, num_kv_heads, width], zeros
  float* rest;  // [count, num_kv_heads], zeros: of ring and fresh tokens
  int64_t width;
};

// Tokens of several sequences, one after the other: sequence s has index[head][start[s] .. start[s + 1]),
// and its keys and values are at the same places of [num_kv_heads, count, head_size].
struct Moved {
  const int32_t* index;  // [num_kv_heads, count]; below 0: none
  const int32_t* start;  // [num_seqs + 1]
  int64_t count;
  float *key, *value;
  const int32_t* number;  // of `move`: same shape as index, which token of the source comes there
};

struct Kernels {
  bool (*attend)(const Call&);  // false: no memory
  bool (*page_mass)(const Call&, const PageMass&);
  void (*append)(Call&);
  void (*read)(const Call&, const Moved&);
  void (*write)(Call&, const Moved&);  // the batch's counts are those after the write
  bool (*move)(Call&, const Call&, const Moved&);  // after, and before; false: no memory
};

inline int64_t item_bytes(Dtype d) { return d == Dtype::f32 ? 4 : d == Dtype::s8 ? 1 : 2; }

}  // namespace kvthrift
