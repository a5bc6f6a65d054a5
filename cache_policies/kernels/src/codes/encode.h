// Encoding tokens into packed codes with a scale and a minimum per group.
#pragma once

#include "codes/pack.h"
#include "codes/slots.h"
#include "simd.h"

KV_INLINE void put_bits(uint8_t* byte, int shift, int bits, int code) {
  *byte = uint8_t((*byte & ~(((1 << bits) - 1) << shift)) | (code << shift));
}
KV_INLINE void put_code(uint8_t* codes, CodeSlot slot, int bits, int code) {
  if (bits != 3) return put_bits(codes + slot.byte, slot.shift, bits, code);
  put_bits(codes + slot.byte, slot.shift, 2, code & 3);
  put_bits(codes + slot.high_byte, slot.high_shift, 1, code >> 2);
}

struct Affine {  // the stored, rounded scale and minimum of a group
  uint16_t scale_bits, min_bits;
  float minimum, inverse;
};

KV_INLINE Affine fit(float low, float high, int levels) {
  Affine a;
  a.scale_bits = float_to_f16(clamp_f16((high - low) / float(levels)));
  a.min_bits = float_to_f16(clamp_f16(low));
  const float scale = f16_to_float(a.scale_bits);
  a.minimum = f16_to_float(a.min_bits);
  a.inverse = scale > 0.f ? 1.f / scale : 0.f;
  return a;
}

KV_INLINE int encode(const Affine& a, float x, int levels) {
  const float code = rintf((x - a.minimum) * a.inverse);
  return code > 0.f ? (code < float(levels) ? int(code) : levels) : 0;
}

// one token's group of channels, code by code
static void encode_group(const Layout& l, uint8_t* codes, int bits, bool is_key, int token, int from, const float* x,
                         const Affine& a) {
  for (int c = 0; c < l.group; c++) {
    const CodeSlot slot = is_key ? key_slot(token, from + c, bits, l.head_size)
                                 : value_slot(token, from + c, bits, l.page_tokens);
    put_code(codes, slot, bits, encode(a, x[c], (1 << bits) - 1));
  }
}

KV_INLINE Affine fit_group(const float* x, int n, int levels) {
  float low = x[0], high = low;
#if defined(__AVX2__)
  pack_range(x, n, &low, &high);
#else
  for (int c = 0; c < n; c++) {
    low = x[c] < low ? x[c] : low;
    high = x[c] > high ? x[c] : high;
  }
#endif
  return fit(low, high, levels);
}

// Whether codes of so many bits are packed eight at a time.
KV_INLINE bool packs(int bits) {
#if defined(__AVX2__)
  return bits == 2 || bits == 4 || bits == 8;
#else
  return bits < 0;
#endif
}

// values of n tokens in one lane of four, in groups of channels; x is [n, head_size]
static void encode_values(const Layout& l, uint8_t* run, int token, int n, const float* x) {
  uint16_t *scale = (uint16_t*)(run + l.value_scale) + token, *minimum = (uint16_t*)(run + l.value_min) + token;
  for (int from = 0; from < l.head_size; from += l.group) {
    Affine a[4];
    float low[4], inverse[4];
    for (int i = 0; i < n; i++) {
      a[i] = fit_group(x + i * l.head_size + from, l.group, (1 << l.v_bits) - 1);
      scale[i] = a[i].scale_bits, minimum[i] = a[i].min_bits;
      low[i] = a[i].minimum, inverse[i] = a[i].inverse;
    }
    scale += l.page_tokens, minimum += l.page_tokens;
#if defined(__AVX2__)
    if (packs(l.v_bits)) {
      pack_values(l, run, token, n, from, x + from, low, inverse);
      continue;
    }
#endif
    for (int i = 0; i < n; i++) encode_group(l, run + l.value, l.v_bits, false, token + i, from, x + i * l.head_size + from, a[i]);
  }
}

// FlexGen's keys: one token in groups of channels
static void encode_key(const Layout& l, uint8_t* run, int token, const float* x) {
  for (int from = 0; from < l.head_size; from += l.group) {
    const Affine a = fit_group(x + from, l.group, (1 << l.k_bits) - 1);
    const int64_t at = int64_t(from / l.group) * l.page_tokens + token;
    ((uint16_t*)(run + l.key_scale))[at] = a.scale_bits;
    ((uint16_t*)(run + l.key_min))[at] = a.min_bits;
#if defined(__AVX2__)
    if (packs(l.k_bits)) {
      pack_key(l, run, token, from, x + from, a.minimum, a.inverse);
      continue;
    }
#endif
    encode_group(l, run + l.key, l.k_bits, true, token, from, x + from, a);
  }
}

// KIVI's keys: one group of tokens, channel by channel; x is [group, head_size]
static void encode_key_group(const Layout& l, uint8_t* run, int token, const float* x) {
  const int levels = (1 << l.k_bits) - 1, d = l.head_size;
  const int64_t row = int64_t(token / l.group) * d;
#if defined(__AVX2__)
  if (packs(l.k_bits)) {
    for (int c = 0; c < d; c += 8) pack_key_channels(l, run, token, c, x);
    return;
  }
#endif
  for (int c = 0; c < d; c++) {
    float low = x[c], high = low;
    for (int t = 1; t < l.group; t++) {
      const float v = x[t * d + c];
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    const Affine a = fit(low, high, levels);
    ((uint16_t*)(run + l.key_scale))[row + c] = a.scale_bits;
    ((uint16_t*)(run + l.key_min))[row + c] = a.min_bits;
    for (int t = 0; t < l.group; t++) {
      put_code(run + l.key, key_slot(token + t, c, l.k_bits, d), l.k_bits,
               encode(a, x[t * d + c], levels));
    }
  }
}
