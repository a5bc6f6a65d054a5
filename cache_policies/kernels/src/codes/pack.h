// Encoding into packed codes eight lanes at a time; encode.h does the same code by code, and both
// give the same bytes.
#pragma once

#include "codes/slots.h"
#include "simd.h"

#if defined(__AVX2__)
// The codes of x under a minimum and the inverse of a scale.
KV_INLINE __m256i pack_codes(f8 x, f8 minimum, f8 inverse, int levels) {
  const f8 code = f8_round(_mm256_mul_ps(_mm256_sub_ps(x, minimum), inverse));
  return _mm256_cvtps_epi32(f8_min(f8_max(code, f8_zero()), f8_set(float(levels))));
}

// Replaces the bits of `mask` in 32 bytes.
KV_INLINE void pack_bits(uint8_t* bytes, __m256i codes, __m256i mask) {
  const __m256i old = _mm256_loadu_si256((const __m256i*)bytes);
  _mm256_storeu_si256((__m256i*)bytes, _mm256_or_si256(_mm256_andnot_si256(mask, old), codes));
}

// KIVI's keys: eight channels from c on of a group of tokens; x is [group, head_size].
KV_INLINE void pack_key_channels(const Layout& l, uint8_t* run, int token, int c, const float* x) {
  const int d = l.head_size, levels = (1 << l.k_bits) - 1;
  f8 low = f8_load(x + c), high = low;
  for (int t = 1; t < l.group; t++) {
    const f8 v = f8_load(x + t * d + c);
    low = f8_min(v, low), high = f8_max(v, high);
  }
  const __m128i scale16 = f8_to_f16(f8_clamp_f16(_mm256_div_ps(_mm256_sub_ps(high, low), f8_set(float(levels)))));
  const __m128i min16 = f8_to_f16(f8_clamp_f16(low));
  const int64_t at = int64_t(token / l.group) * d + c;
  _mm_storeu_si128((__m128i*)((uint16_t*)(run + l.key_scale) + at), scale16);
  _mm_storeu_si128((__m128i*)((uint16_t*)(run + l.key_min) + at), min16);
  const f8 minimum = _mm256_cvtph_ps(min16), inverse = f8_inverse(_mm256_cvtph_ps(scale16));
  for (int t = 0; t < l.group; t += 8) {
    __m256i r[8];
    for (int i = 0; i < 8; i++) r[i] = pack_codes(f8_load(x + (t + i) * d + c), minimum, inverse, levels);
    // bytes [token][channel % 4]; the lower halves are of channels c .. c + 3
    const __m256i first = _mm256_packus_epi16(_mm256_packs_epi32(r[0], r[1]), _mm256_packs_epi32(r[2], r[3]));
    const __m256i last = _mm256_packus_epi16(_mm256_packs_epi32(r[4], r[5]), _mm256_packs_epi32(r[6], r[7]));
    const CodeSlot slot = key_slot(token + t, c, l.k_bits, d), next = key_slot(token + t, c + 4, l.k_bits, d);
    const __m128i shift = _mm_cvtsi32_si128(slot.shift);
    const __m256i mask = _mm256_set1_epi8(char(levels << slot.shift));
    pack_bits(run + l.key + slot.byte, _mm256_sll_epi16(_mm256_permute2x128_si256(first, last, 0x20), shift), mask);
    pack_bits(run + l.key + next.byte, _mm256_sll_epi16(_mm256_permute2x128_si256(first, last, 0x31), shift), mask);
  }
}

// smallest and largest of n channels, a multiple of eight
KV_INLINE void pack_range(const float* x, int n, float* low, float* high) {
  f8 least = f8_load(x), most = least;
  for (int c = 8; c < n; c += 8) least = f8_min(f8_load(x + c), least), most = f8_max(f8_load(x + c), most);
  *low = -f8_hmax(_mm256_xor_ps(least, f8_set(-0.f)));
  *high = f8_hmax(most);
}

// A group of channels of values of n tokens, all in one lane of four; a[i] of token i.
KV_INLINE void pack_values(const Layout& l, uint8_t* run, int token, int n, int from, const float* x, const float* minimum,
                           const float* inverse) {
  const int levels = (1 << l.v_bits) - 1;
  const CodeSlot first = value_slot(token & ~3, from, l.v_bits, l.page_tokens);
  const int64_t octet = int64_t(l.page_tokens) * l.v_bits;  // bytes between eight channels and the next
  int32_t bits = 0;
  for (int i = 0; i < n; i++) bits |= int32_t(uint32_t(levels) << ((token + i) % 4 * 8 + first.shift));
  for (int c = 0; c < l.group; c += 8) {
    __m256i all = _mm256_setzero_si256();
    for (int i = 0; i < n; i++) {
      const __m256i one = pack_codes(f8_load(x + i * l.head_size + c), f8_set(minimum[i]), f8_set(inverse[i]), levels);
      all = _mm256_or_si256(all, _mm256_sll_epi32(one, _mm_cvtsi32_si128((token + i) % 4 * 8 + first.shift)));
    }
    pack_bits(run + l.value + first.byte + c / 8 * octet, all, _mm256_set1_epi32(bits));
  }
}

// A group of channels of one key, from channel `from` on (FlexGen).
KV_INLINE void pack_key(const Layout& l, uint8_t* run, int token, int from, const float* x, float minimum, float inverse) {
  const int levels = (1 << l.k_bits) - 1;
  for (int c = 0; c < l.group; c += 8) {
    const __m256i r = pack_codes(f8_load(x + c), f8_set(minimum), f8_set(inverse), levels);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(r, r), r);
    const uint32_t four[2] = {uint32_t(_mm256_cvtsi256_si32(bytes)), uint32_t(_mm256_extract_epi32(bytes, 4))};
    for (int i = 0; i < 2; i++) {
      const CodeSlot slot = key_slot(token, from + c + 4 * i, l.k_bits, l.head_size);
      uint32_t old;
      memcpy(&old, run + l.key + slot.byte, 4);
      old = (old & ~((0x01010101u * uint32_t(levels)) << slot.shift)) | four[i] << slot.shift;
      memcpy(run + l.key + slot.byte, &old, 4);
    }
  }
}
#endif
