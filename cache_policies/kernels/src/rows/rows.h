// Reading and writing rows of keys and values in any dtype.
#pragma once

#include "simd.h"

template <class L, Dtype T>
KV_INLINE typename L::Vec load_as(const char* row, int channel) {
  if (T == Dtype::f32) return L::load((const float*)row + channel);
  if (T == Dtype::f16) return L::load_f16((const uint16_t*)row + channel);
  if (T == Dtype::bf16) return L::load_bf16((const uint16_t*)row + channel);
  return L::load_s8((const int8_t*)row + channel);
}

template <Dtype T>
KV_INLINE f8 load8_as(const char* row, int channel) { return load_as<Lanes8, T>(row, channel); }

// one channel of as many tokens as a vector holds; octets of tokens lie `octet` bytes apart
template <class L, Dtype T>
KV_INLINE typename L::Vec load_octets(const char* at, int64_t octet) {
  if (T == Dtype::f32) return L::load2((const float*)at, octet);
  if (T == Dtype::f16) return L::load2_f16((const uint16_t*)at, octet);
  if (T == Dtype::bf16) return L::load2_bf16((const uint16_t*)at, octet);
  return L::load2_s8((const int8_t*)at, octet);
}

KV_INLINE f8 load8(const char* row, Dtype dtype, int channel) {
  switch (dtype) {
    case Dtype::f32: return load8_as<Dtype::f32>(row, channel);
    case Dtype::f16: return load8_as<Dtype::f16>(row, channel);
    case Dtype::bf16: return load8_as<Dtype::bf16>(row, channel);
    default: return load8_as<Dtype::s8>(row, channel);
  }
}

static void load_row(const char* row, Dtype dtype, int n, float* out) {
  for (int c = 0; c < n; c += 8) f8_store(out + c, load8(row, dtype, c));
}

KV_INLINE void store8(char* row, Dtype dtype, int channel, f8 x) {
  if (dtype == Dtype::f32) return f8_store((float*)row + channel, x);
#if defined(__AVX2__)
  _mm_storeu_si128((__m128i*)((uint16_t*)row + channel), dtype == Dtype::bf16 ? f8_to_bf16(x) : f8_to_f16(x));
#else
  alignas(32) float lane[8];
  f8_store(lane, x);
  for (int i = 0; i < 8; i++)
    ((uint16_t*)row)[channel + i] = dtype == Dtype::bf16 ? float_to_bf16(lane[i]) : float_to_f16(lane[i]);
#endif
}

static void store_row(char* row, Dtype dtype, int n, const float* x) {  // n is a multiple of 8
  for (int c = 0; c < n; c += 8) store8(row, dtype, c, f8_load(x + c));
}

// Keys or values of a sequence as one pointer a token, with an optional scale a token (int8).
enum { TILE = 128 };
struct Rows {
  const char* row[TILE];
  const uint16_t* scale;  // float16, or null
  Dtype dtype;
  int count;
};

// `octets`: where set, keys lie as [token / 8][channel][token % 8] from there on instead of in
// rows, so that a vector of keys is one channel of eight tokens and no sum is horizontal.
struct KvRows {
  Rows key, value;
  const char* octets;
};

// Fetches the next run bit by bit while this one is computed: pages lie anywhere in memory,
// so no hardware prefetches across them.
struct Fetch {
  const uint8_t *at, *end;
  int lines;  // a step
  void spread(int steps) { lines = int((end - at + 63) / 64 / max_int(1, steps)) + 1; }
  void step() {
    if (at >= end) return;
    const uint8_t* next = at + 64 * lines;  // may lie behind the end: nothing is read there
    for (const uint8_t* p = at; p < next; p += 64) prefetch(p);
    at = next;
  }
};

// tokens [first, first + count) of a plain or int8 store page, first a multiple of 8
static void page_rows(const Call& c, const uint8_t* run, int first, int count, KvRows* out) {
  const Layout& l = c.layout;
  const Dtype dtype = l.kind == Kind::int8 ? Dtype::s8 : l.store_dtype;
  const int64_t bytes = l.head_size * item_bytes(dtype);
  out->key.dtype = out->value.dtype = dtype;
  out->key.count = out->value.count = count;
  out->key.scale = l.kind == Kind::int8 ? (const uint16_t*)(run + l.key_scale) + first : nullptr;
  out->value.scale = l.kind == Kind::int8 ? (const uint16_t*)(run + l.value_scale) + first : nullptr;
  out->octets = (const char*)run + l.key + first * bytes;
  for (int t = 0; t < count; t++) out->value.row[t] = (const char*)run + l.value + (first + t) * bytes;
}

// tokens [first, first + count) of the ring
static void ring_rows(const Call& c, int seq, int head, int first, int count, KvRows* out) {
  const Layout& l = c.layout;
  out->key.dtype = out->value.dtype = l.ring_dtype;
  out->key.count = out->value.count = count;
  out->key.scale = out->value.scale = nullptr;
  out->octets = nullptr;
  for (int t = 0; t < count; t++) {
    const int slot = first + t;
    const uint8_t* run = c.run(seq, slot / l.ring_tokens, head);
    const char* row = (const char*)run + int64_t(slot % l.ring_tokens) * 4 * l.head_size;
    out->key.row[t] = row;
    out->value.row[t] = row + 2 * l.head_size;
  }
}

static const char* row_as(const Call& c, const Tensor& x, Dtype dtype, int64_t token, int head) {
  return x.data + (token * x.token_stride + int64_t(head) * c.layout.head_size) * item_bytes(dtype);
}

static const char* tensor_row(const Call& c, const Tensor& x, int64_t token, int head) {
  return row_as(c, x, c.dtype, token, head);
}

// fresh tokens [first, first + count) of this step, counted from the sequence's first one
static void fresh_rows(const Call& c, int seq, int head, int first, int count, KvRows* out) {
  out->key.dtype = out->value.dtype = c.fresh_dtype;
  out->key.count = out->value.count = count;
  out->key.scale = out->value.scale = nullptr;
  out->octets = nullptr;
  for (int t = 0; t < count; t++) {
    const int64_t token = c.batch.query_start[seq] + first + t;
    out->key.row[t] = row_as(c, c.key, c.fresh_dtype, token, head);
    out->value.row[t] = row_as(c, c.value, c.fresh_dtype, token, head);
  }
}
