// Encoding tokens into packed 2, 4 and 8 bit codes with a scale and a minimum per group.
#pragma once

#include "codes/slots.h"
#include "simd.h"

KV_INLINE void put_code(uint8_t* codes, CodeSlot slot, int bits, int code) {
  uint8_t* byte = codes + slot.byte;
  *byte = uint8_t((*byte & ~(((1 << bits) - 1) << slot.shift)) | (code << slot.shift));
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

// groups of channels of one token: values, and FlexGen's keys
static void encode_token(const Layout& l, uint8_t* run, int64_t codes, int64_t scales, int64_t mins,
                         int bits, bool is_key, int token, const float* x) {
  const int levels = (1 << bits) - 1;
  for (int g = 0; g < l.head_size / l.group; g++) {
    float low = x[g * l.group], high = low;
    for (int c = g * l.group; c < (g + 1) * l.group; c++) {
      low = x[c] < low ? x[c] : low;
      high = x[c] > high ? x[c] : high;
    }
    const Affine a = fit(low, high, levels);
    ((uint16_t*)(run + scales))[g * l.page_tokens + token] = a.scale_bits;
    ((uint16_t*)(run + mins))[g * l.page_tokens + token] = a.min_bits;
    for (int c = g * l.group; c < (g + 1) * l.group; c++) {
      const CodeSlot slot = is_key ? key_slot(token, c, bits, l.head_size)
                                   : value_slot(token, c, bits, l.page_tokens);
      put_code(run + codes, slot, bits, encode(a, x[c], levels));
    }
  }
}

// KIVI's keys: one group of tokens, channel by channel; x is [group, head_size]
static void encode_key_group(const Layout& l, uint8_t* run, int token, const float* x) {
  const int levels = (1 << l.k_bits) - 1, d = l.head_size;
  const int64_t row = int64_t(token / l.group) * d;
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
