// What the kernels know of a page, a batch and the tensors of one call. Filled from Python,
// where cache_policies/page.py declares the fields and cache_policies/plan.py the counts.
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
  // byte offsets inside one head's run; -1 where the codec has no such field
  int64_t key, key_scale, key_min, value, value_scale, value_min;
  int64_t run_bytes;  // of one head in one page
};

struct Batch {
  int num_seqs;
  const int32_t* query_start;   // [num_seqs + 1]
  const int32_t* stored;        // [num_seqs] tokens in the store before this step
  const int32_t* ring;          // [num_seqs] tokens in the ring before this step
  const int32_t* stored_after;  // [num_seqs] tokens in the store after this step
  const int32_t* block_table;   // [num_seqs, row_stride]
  int64_t row_stride;
};

struct Tensor {  // [tokens, heads, head_size], heads contiguous
  char* data;
  int64_t token_stride;  // elements
};

struct Call {
  Layout layout;
  Batch batch;
  Dtype dtype;  // of query, key, value and output
  int num_heads, num_kv_heads;
  float scale;
  Tensor query, key, value, output;
  uint8_t* pages;
  int64_t page_stride, head_stride;  // bytes
  int num_threads;
  bool integer_dot;  // false: dequantize, for measuring what integer arithmetic adds

  const uint8_t* run(int seq, int row, int head) const {
    const int64_t id = batch.block_table[seq * batch.row_stride + row];
    return pages + id * page_stride + head * head_stride;
  }
  uint8_t* run(int seq, int row, int head) {
    return const_cast<uint8_t*>(static_cast<const Call*>(this)->run(seq, row, head));
  }
};

struct Kernels {
  void (*attend)(const Call&);
  void (*append)(Call&);
};

inline int64_t item_bytes(Dtype d) { return d == Dtype::f32 ? 4 : d == Dtype::s8 ? 1 : 2; }

// Byte and bit of a packed code; the layout is documented in codecs/packing.py.
struct CodeSlot {
  int64_t byte;
  int shift;
};
inline CodeSlot key_slot(int token, int channel, int bits, int head_size) {
  const int per_byte = 8 / bits, vec = token % 32 / 8;
  const int64_t block = int64_t(token / 32) * (head_size / 4) + channel / 4;
  return {(block * (bits / 2) + vec / per_byte) * 32 + token % 8 * 4 + channel % 4,
          vec % per_byte * bits};
}
inline CodeSlot value_slot(int token, int channel, int bits, int page_tokens) {
  const int per_byte = 8 / bits, vec = token % 16 / 4;
  const int64_t block = int64_t(channel / 8) * (page_tokens / 16) + token / 16;
  return {(block * (bits / 2) + vec / per_byte) * 32 + channel % 8 * 4 + token % 4,
          vec % per_byte * bits};
}

}  // namespace kvthrift
