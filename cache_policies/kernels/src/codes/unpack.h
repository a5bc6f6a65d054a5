// Packed codes back to floats, eight at a time.
#pragma once

#include "codes/slots.h"
#include "simd.h"

// the codes of byte `column` (0..3) of eight lanes of a vector; slot: of its first byte
KV_INLINE f8 lanes_of_codes(const uint8_t* codes, CodeSlot slot, int column, int bits) {
  if (bits != 3) return f8_load_codes(codes + slot.byte, slot.shift + 8 * column, bits);
  return f8_load_codes(codes + slot.byte, slot.shift + 8 * column, 2) +
         f8_load_high(codes + slot.high_byte, slot.high_shift + 8 * column);
}

// Decodes tokens [first, first + count) of an affine page, first a multiple of 32: calls
// put(t, c, x, y) with channels c and c + 1 of the eight tokens from first + t on.
template <class Put>
KV_INLINE void keys_from_codes(const Layout& l, const uint8_t* run, int first, int count, Put put) {
  const uint16_t *ks = (const uint16_t*)(run + l.key_scale), *km = (const uint16_t*)(run + l.key_min);
  const int d = l.head_size, span = l.keys_per_channel ? l.group : 8, share = l.keys_per_channel ? 2 : l.group;
  for (int t0 = 0; t0 < count; t0 += span)
    for (int c0 = 0; c0 < d; c0 += share) {
      f8 scale[2], low[2];
      for (int i = 0; i < 2; i++) {
        const int g = l.keys_per_channel ? (first + t0) / l.group * d + c0 + i : c0 / l.group * l.page_tokens + first + t0;
        scale[i] = l.keys_per_channel ? f8_set(f16_to_float(ks[g])) : f8_load_f16(ks + g);
        low[i] = l.keys_per_channel ? f8_set(f16_to_float(km[g])) : f8_load_f16(km + g);
      }
      for (int t = t0; t < min_int(t0 + span, count); t += 8)
        for (int c = c0; c < c0 + share; c += 2) {
          const CodeSlot slot = key_slot(first + t, c & ~3, l.k_bits, d);
          put(t, c, f8_fma(lanes_of_codes(run + l.key, slot, c % 4, l.k_bits), scale[0], low[0]),
              f8_fma(lanes_of_codes(run + l.key, slot, c % 4 + 1, l.k_bits), scale[1], low[1]));
        }
    }
}

// The same for values: put(t, c, x, y) with channels [c, c + 8) of tokens first + t and the next
// one, which is zero where the tokens end.
template <class Put>
KV_INLINE void values_from_codes(const Layout& l, const uint8_t* run, int first, int count, Put put) {
  const uint16_t *vs = (const uint16_t*)(run + l.value_scale), *vm = (const uint16_t*)(run + l.value_min);
  const int64_t octet = int64_t(l.page_tokens) * l.v_bits;  // bytes between eight channels and the next
  for (int t = 0; t < count; t += 2) {
    const CodeSlot slot = value_slot((first + t) & ~3, 0, l.v_bits, l.page_tokens);
    const int column = (first + t) % 4;
    const bool pair = t + 1 < count;
    for (int c0 = 0; c0 < l.head_size; c0 += l.group) {
      const int g = c0 / l.group * l.page_tokens + first + t;
      const f8 scale = f8_set(f16_to_float(vs[g])), low = f8_set(f16_to_float(vm[g]));
      const f8 scale2 = pair ? f8_set(f16_to_float(vs[g + 1])) : f8_zero(), low2 = pair ? f8_set(f16_to_float(vm[g + 1])) : f8_zero();
      for (int c = c0; c < c0 + l.group; c += 8) {
        const uint8_t* codes = run + l.value + c / 8 * octet;
        put(t, c, f8_fma(lanes_of_codes(codes, slot, column, l.v_bits), scale, low),
            f8_fma(lanes_of_codes(codes, slot, column + 1, l.v_bits), scale2, low2));
      }
    }
  }
}
