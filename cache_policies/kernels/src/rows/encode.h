// Encoding tokens into rows: plain pages and int8 ones.
#pragma once

#include "rows/rows.h"

// where channel 0 of a key lies, in elements; its channels are 8 apart (see KvRows::octets)
KV_INLINE int64_t octet_start(int token, int d) { return int64_t(token / 8) * d * 8 + token % 8; }

// step: elements between two channels
static void encode_int8(int8_t* out, int step, uint16_t* scales, int token, int d, const float* x) {
  float top = 0.f;
  for (int c = 0; c < d; c++) top = max_float(top, fabsf(x[c]));
  const uint16_t bits = float_to_f16(clamp_f16(top / 127.f));
  const float scale = f16_to_float(bits), inverse = scale > 0.f ? 1.f / scale : 0.f;
  scales[token] = bits;
  for (int c = 0; c < d; c++) {
    const float code = rintf(x[c] * inverse);
    out[c * step] = int8_t(code > 127.f ? 127.f : code < -127.f ? -127.f : code);
  }
}

static void store_clamped(char* row, Dtype dtype, int n, float* x) {
  if (dtype == Dtype::f16)
    for (int c = 0; c < n; c++) x[c] = clamp_f16(x[c]);
  store_row(row, dtype, n, x);
}

// key and value of one token of an int8 page
static void encode_int8_token(const Layout& l, uint8_t* run, int slot, const float* key, const float* value) {
  const int d = l.head_size;
  encode_int8((int8_t*)run + l.key + octet_start(slot, d), 8, (uint16_t*)(run + l.key_scale), slot, d, key);
  encode_int8((int8_t*)run + l.value + int64_t(slot) * d, 1, (uint16_t*)(run + l.value_scale), slot, d, value);
}

// the same of a plain page; both may be changed
static void encode_plain_token(const Layout& l, uint8_t* run, int slot, float* key, float* value) {
  const int d = l.head_size;
  const int64_t item = item_bytes(l.store_dtype);
  char row[256 * 4];
  store_clamped(row, l.store_dtype, d, key);
  char* octet = (char*)run + l.key + octet_start(slot, d) * item;
  for (int j = 0; j < d; j++) memcpy(octet + 8 * j * item, row + j * item, size_t(item));
  store_clamped((char*)run + l.value + slot * d * item, l.store_dtype, d, value);
}

#if defined(__AVX2__)
KV_INLINE f8 int8_codes(f8 x, f8 inverse) {
  return f8_max(f8_set(-127.f), f8_min(f8_set(127.f), f8_round(_mm256_mul_ps(x, inverse))));
}

// scales of eight rows [8, d] into `scales`; returns their inverses
KV_INLINE f8 int8_scales(const float* x, int d, uint16_t* scales) {
  f8 top[8];
  for (int i = 0; i < 8; i++) {
    top[i] = f8_zero();
    for (int c = 0; c < d; c += 8) top[i] = f8_max(top[i], f8_abs(f8_load(x + i * d + c)));
  }
  const __m128i bits = f8_to_f16(f8_clamp_f16(_mm256_div_ps(f8_max8(top), f8_set(127.f))));
  _mm_storeu_si128((__m128i*)scales, bits);
  return f8_inverse(_mm256_cvtph_ps(bits));
}

// eight tokens from an octet's first on
static void encode_int8_octet(const Layout& l, uint8_t* run, int slot, const float* key, const float* value) {
  const int d = l.head_size;
  const f8 of_keys = int8_scales(key, d, (uint16_t*)(run + l.key_scale) + slot);
  alignas(32) float of_value[8];
  f8_store(of_value, int8_scales(value, d, (uint16_t*)(run + l.value_scale) + slot));
  uint8_t *keys = run + l.key + int64_t(slot) * d, *values = run + l.value + int64_t(slot) * d;
  for (int c = 0; c < d; c += 8) {
    f8 block[8];
    for (int i = 0; i < 8; i++) block[i] = f8_load(key + i * d + c);
    f8_transpose(block);
    for (int i = 0; i < 8; i++) {
      _mm_storel_epi64((__m128i*)(keys + (c + i) * 8), f8_to_s8(int8_codes(block[i], of_keys)));
      const f8 x = int8_codes(f8_load(value + i * d + c), f8_set(of_value[i]));
      _mm_storel_epi64((__m128i*)(values + i * d + c), f8_to_s8(x));
    }
  }
}

static void encode_plain_octet(const Layout& l, uint8_t* run, int slot, float* key, float* value) {
  const int d = l.head_size;
  const int64_t item = item_bytes(l.store_dtype);
  char* keys = (char*)run + l.key + int64_t(slot) * d * item;
  for (int c = 0; c < d; c += 8) {
    f8 block[8];
    for (int i = 0; i < 8; i++) block[i] = f8_load(key + i * d + c);
    f8_transpose(block);
    for (int i = 0; i < 8; i++) {
      const f8 x = l.store_dtype == Dtype::f16 ? f8_clamp_f16(block[i]) : block[i];
      store8(keys, l.store_dtype, (c + i) * 8, x);
    }
  }
  for (int i = 0; i < 8; i++)
    store_clamped((char*)run + l.value + (slot + i) * d * item, l.store_dtype, d, value + i * d);
}
#else
static void encode_int8_octet(const Layout& l, uint8_t* run, int slot, const float* key, const float* value) {
  for (int i = 0; i < 8; i++) encode_int8_token(l, run, slot + i, key + i * l.head_size, value + i * l.head_size);
}
static void encode_plain_octet(const Layout& l, uint8_t* run, int slot, float* key, float* value) {
  for (int i = 0; i < 8; i++) encode_plain_token(l, run, slot + i, key + i * l.head_size, value + i * l.head_size);
}
#endif
