// Integer dot products over packed codes: of a rounded query with keys, of rounded weights with
// values. With AVX-512 VNNI one instruction multiplies and adds four bytes (`vpdpbusd`); AVX2 has
// `madd` for int16, and `maddubs`, whose 16-bit sums must not overflow.
#pragma once

#include "simd.h"

enum { MAX_GROUPS = 16 };  // of channels of a head

typedef __m256i i8v;
// Keeps a running sum in its register: GCC otherwise regroups the integer additions of an
// unrolled loop into a tree, and spills its leaves.
#define KV_KEEP(x) __asm__("" : "+x"(x))
KV_INLINE i8v iv_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
KV_INLINE i8v iv_broadcast4(const void* p) { int32_t x; memcpy(&x, p, 4); return _mm256_set1_epi32(x); }

// vector `v` (0..3) of a block of packed codes; see codecs/packing.py
template <int BITS>
KV_INLINE i8v iv_codes(const uint8_t* block, int v) {
  if (BITS == 3) {
    const i8v low = _mm256_and_si256(_mm256_srli_epi16(iv_load(block), v * 2), _mm256_set1_epi8(3));
    const i8v high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(block + 32)));
    const i8v bit = _mm256_set_m128i(_mm_set1_epi8(char(16 << v)), _mm_set1_epi8(char(1 << v)));
    const i8v set = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);
    return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(4)));
  }
  enum { PER_BYTE = 8 / BITS };
  const i8v x = iv_load(block + v / PER_BYTE * 32);
  return _mm256_and_si256(_mm256_srli_epi16(x, v % PER_BYTE * BITS), _mm256_set1_epi8((1 << BITS) - 1));
}

// the same, counted from 2^(BITS - 1)
template <int BITS>
KV_INLINE i8v iv_signed_codes(const uint8_t* block, int v) {
  if (BITS != 2) return _mm256_sub_epi8(iv_codes<BITS>(block, v), _mm256_set1_epi8(1 << (BITS - 1)));
  // Two codes of four bits are looked up at once, two vectors after one shift.
  const __m128i even = _mm_setr_epi8(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1);
  const __m128i odd = _mm_setr_epi8(-2, -2, -2, -2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1);
  const i8v x = _mm256_and_si256(_mm256_srli_epi16(iv_load(block), v / 2 * 4), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(v % 2 ? odd : even), x);
}

// One query head, rounded, against one group of keys (KIVI) or all of a page (FlexGen): to eight
// bits for 2-bit keys, to sixteen for others.
struct RoundedQuery {
  alignas(32) int8_t q8[256];  // 2-bit keys; with VNNI the upper bytes of sixteen bits, rounded
#if defined(__AVX512VNNI__)
  alignas(32) int8_t low8[256];  // what is left, -128..127
#else
  alignas(32) int16_t q16[256];  // channels of a block of four in order 0 2 1 3
#endif
  float unit;                    // value of one step
  float offset;                  // KIVI: sum of q_c m_c; for 2-bit keys less the rounded channels' mid codes
  float lost[MAX_GROUPS], sum[MAX_GROUPS];  // FlexGen, per group: those mid codes; sum of q_c
};

#if defined(__AVX512VNNI__)
// sum += four unsigned bytes of x times four signed ones of y, per lane. Not the intrinsic: GCC
// copies its first operand before every use, and spills a loop with many sums.
KV_INLINE void iv_dot(i8v& sum, i8v x, i8v y) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); }

template <int BITS>
KV_INLINE float round_range() { return BITS > 2 ? 32512.f : 127.f; }  // 127 x 256

template <int BITS>
KV_INLINE void store_rounded(i8v packed, int c, RoundedQuery* out) {
  if (BITS > 2) {
    const i8v high = _mm256_srai_epi16(_mm256_add_epi16(packed, _mm256_set1_epi16(128)), 8);
    _mm_store_si128((__m128i*)(out->q8 + c), _mm256_cvtepi16_epi8(high));
    _mm_store_si128((__m128i*)(out->low8 + c), _mm256_cvtepi16_epi8(packed));
  } else {
    _mm_store_si128((__m128i*)(out->q8 + c), _mm256_cvtepi16_epi8(packed));
  }
}

// The order in which `round16` takes sixteen channels: as they are.
template <int BITS>
KV_INLINE void order_row(const float* x, int n, float* out) {
  for (int c = 0; c < n; c += 16) Wide::store(out + c, Wide::load(x + c));
}
template <int BITS>
KV_INLINE void order_halves(const uint16_t* x, int n, float* out) {
  for (int c = 0; c < n; c += 16) Wide::store(out + c, Wide::load_f16(x + c));
}

// rounds channels [c, c + 16) of x times by(c); returns the integers' sums, pair by pair
template <int BITS, class By>
KV_INLINE i8v round16(const float* x, By by, int c, RoundedQuery* out) {
  const __m512i r = _mm512_cvtps_epi32(Wide::load(x + c) * by(c));
  store_rounded<BITS>(_mm512_cvtsepi32_epi16(r), c, out);
  return _mm256_add_epi32(_mm512_castsi512_si256(r), _mm512_extracti64x4_epi64(r, 1));
}

// weights of 32 tokens times `inverse` -> 8 bit unsigned
KV_INLINE void round_weights(const float* w, float inverse, uint8_t* out) {
  for (int i = 0; i < 32; i += 16) {
    const __m512i r = _mm512_cvtps_epi32(Wide::load(w + i) * Wide::set(inverse));
    _mm_store_si128((__m128i*)(out + i), _mm512_cvtusepi32_epi8(r));
  }
}

// int32 dot products of channels [from, to) with NV x 8 tokens, vectors v .. v + NV of the span
template <int BITS, int GC, int NV>
KV_INLINE void dot_codes(const uint8_t* span, int v, int from, int to, const RoundedQuery* rq, i8v dot[GC][NV]) {
  i8v high[GC][NV];
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) dot[g][o] = high[g][o] = _mm256_setzero_si256();
  for (int c = from; c < to; c += 4) {
    i8v x[NV];
    for (int o = 0; o < NV; o++) x[o] = iv_codes<BITS>(span + c * BITS * 4, v + o);
    for (int g = 0; g < GC; g++) {
      const i8v q = iv_broadcast4(rq[g].q8 + c);
      for (int o = 0; o < NV; o++) iv_dot(high[g][o], x[o], q);
      if (BITS == 2) continue;
      const i8v low = iv_broadcast4(rq[g].low8 + c);
      for (int o = 0; o < NV; o++) iv_dot(dot[g][o], x[o], low);
    }
  }
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++)
      dot[g][o] = BITS == 2 ? high[g][o] : _mm256_add_epi32(dot[g][o], _mm256_slli_epi32(high[g][o], 8));
}

// int32 sums over 32 tokens, from the s-th span on, of 8 bit weights times codes counted from
// their middle, for 8 OC channels
template <int BITS, int GC, int OC>
KV_INLINE void mix_span(const uint8_t* codes, int64_t octet_bytes, int s, const uint8_t* const w8[GC], i8v dot[GC][OC]) {
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < OC; o++) dot[g][o] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int v = 0; v < 8; v++) {
    i8v w[GC];
    for (int g = 0; g < GC; g++) w[g] = iv_broadcast4(w8[g] + s * 32 + 4 * v);
    for (int o = 0; o < OC; o++) {
      const uint8_t* block = codes + o * octet_bytes + (s * 2 + v / 4) * BITS * 16;
      const i8v x = iv_signed_codes<BITS>(block, v % 4);
      for (int g = 0; g < GC; g++) iv_dot(dot[g][o], w[g], x);
    }
  }
}

#else
template <int BITS>
KV_INLINE float round_range() { return BITS > 2 ? 32767.f : 127.f; }

// The order in which `round16` takes sixteen channels, so that what is packed comes out as the codes
// lie: the middle quarters change places, and for sixteen bits the middle ones of every four channels.
template <int BITS>
KV_INLINE void order_row(const float* x, int n, float* out) {
  for (int c = 0; c < n; c += 16) {
    const f8 a = f8_load(x + c), b = f8_load(x + c + 8);
    const f8 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    f8_store(out + c, BITS > 2 ? _mm256_permute_ps(low, _MM_SHUFFLE(3, 1, 2, 0)) : low);
    f8_store(out + c + 8, BITS > 2 ? _mm256_permute_ps(high, _MM_SHUFFLE(3, 1, 2, 0)) : high);
  }
}
template <int BITS>
KV_INLINE void order_halves(const uint16_t* x, int n, float* out) {
  const i8v middle = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int c = 0; c < n; c += 16) {
    i8v halves = _mm256_permute4x64_epi64(iv_load(x + c), _MM_SHUFFLE(3, 1, 2, 0));
    if (BITS > 2) halves = _mm256_shuffle_epi8(halves, middle);
    f8_store(out + c, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
    f8_store(out + c + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
  }
}

// rounds channels [c, c + 16) of x times by(c), by(c + 8); returns the integers' sums, pair by pair
template <int BITS, class By>
KV_INLINE i8v round16(const float* x, By by, int c, RoundedQuery* out) {
  const i8v a = _mm256_cvtps_epi32(f8_load(x + c) * by(c)), b = _mm256_cvtps_epi32(f8_load(x + c + 8) * by(c + 8));
  const i8v packed = _mm256_packs_epi32(a, b);
  if (BITS > 2) {
    _mm256_store_si256((__m256i*)(out->q16 + c), packed);
  } else {
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
    _mm_store_si128((__m128i*)(out->q8 + c), bytes);
  }
  return _mm256_add_epi32(a, b);
}

// weights of 32 tokens times `inverse` -> 8 bit unsigned
KV_INLINE void round_weights(const float* w, float inverse, uint8_t* out) {
  __m256i r[4];
  for (int i = 0; i < 4; i++) r[i] = _mm256_cvtps_epi32(f8_load(w + 8 * i) * f8_set(inverse));
  const i8v a = _mm256_packs_epi32(r[0], r[1]), b = _mm256_packs_epi32(r[2], r[3]);
  const i8v packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_store_si256((__m256i*)out, packed);
}

// int32 dot products of channels [from, to) with NV x 8 tokens, vectors v .. v + NV of the span
template <int GC, int NV>
KV_INLINE void dot_4bit(const uint8_t* span, int v, int from, int to, const RoundedQuery* rq, i8v dot[GC][NV]) {
  const i8v mask = _mm256_set1_epi16(15);
  for (int c = from; c < to; c += 4) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      i8v q[GC];
      for (int g = 0; g < GC; g++) q[g] = iv_broadcast4(rq[g].q16 + c + 2 * odd);
      for (int o = 0; o < NV; o++) {
        i8v x = _mm256_srli_epi16(iv_load(span + c * 16 + (v + o) / 2 * 32), odd * 8 + o % 2 * 4);
        if (!(odd && o % 2)) x = _mm256_and_si256(x, mask);
        for (int g = 0; g < GC; g++) {
          dot[g][o] = _mm256_add_epi32(dot[g][o], _mm256_madd_epi16(x, q[g]));
          KV_KEEP(dot[g][o]);
        }
      }
    }
  }
}

template <int GC, int NV>
KV_INLINE void dot_3bit(const uint8_t* span, int v, int from, int to, const RoundedQuery* rq, i8v dot[GC][NV]) {
  const i8v mask = _mm256_set1_epi16(255);
  for (int c = from; c < to; c += 4) {
    i8v x[NV];
    for (int o = 0; o < NV; o++) x[o] = iv_codes<3>(span + c * 12, v + o);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++)
      for (int o = 0; o < NV; o++) {
        const i8v half = odd ? _mm256_srli_epi16(x[o], 8) : _mm256_and_si256(x[o], mask);
        for (int g = 0; g < GC; g++) {
          const i8v q = iv_broadcast4(rq[g].q16 + c + 2 * odd);
          dot[g][o] = _mm256_add_epi32(dot[g][o], _mm256_madd_epi16(half, q));
          KV_KEEP(dot[g][o]);
        }
      }
  }
}

template <int GC, int NV>
KV_INLINE void dot_2bit(const uint8_t* span, int v, int from, int to, const RoundedQuery* rq, i8v dot[GC][NV]) {
  for (int start = from; start < to; start += 128) {  // 32 steps of at most 3 x 127 x 2 fit 16 bits
    const int end = min_int(start + 128, to);
    i8v part[GC][NV];
    for (int g = 0; g < GC; g++)
      for (int o = 0; o < NV; o++) part[g][o] = _mm256_setzero_si256();
    for (int c = start; c < end; c += 4) {
      i8v q[GC];
      for (int g = 0; g < GC; g++) q[g] = iv_broadcast4(rq[g].q8 + c);
      for (int o = 0; o < NV; o++) {
        const i8v x = iv_codes<2>(span + c * 8, v + o);
        for (int g = 0; g < GC; g++) {
          part[g][o] = _mm256_add_epi16(part[g][o], _mm256_maddubs_epi16(x, q[g]));
          KV_KEEP(part[g][o]);
        }
      }
    }
    for (int g = 0; g < GC; g++)
      for (int o = 0; o < NV; o++)
        dot[g][o] = _mm256_add_epi32(dot[g][o], _mm256_madd_epi16(part[g][o], _mm256_set1_epi16(1)));
  }
}

template <int BITS, int GC, int NV>
KV_INLINE void dot_codes(const uint8_t* span, int v, int from, int to, const RoundedQuery* rq, i8v dot[GC][NV]) {
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) dot[g][o] = _mm256_setzero_si256();
  if (BITS == 4) dot_4bit<GC, NV>(span, v, from, to, rq, dot);
  else if (BITS == 3) dot_3bit<GC, NV>(span, v, from, to, rq, dot);
  else dot_2bit<GC, NV>(span, v, from, to, rq, dot);
}

// int32 sums over 32 tokens, from the s-th span on, of 8 bit weights times codes counted from
// their middle, for 8 OC channels
template <int BITS, int GC, int OC>
KV_INLINE void mix_span(const uint8_t* codes, int64_t octet_bytes, int s, const uint8_t* const w8[GC], i8v dot[GC][OC]) {
  const i8v one = _mm256_set1_epi16(1);
  i8v part[GC][OC];
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < OC; o++) part[g][o] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int v = 0; v < 8; v++) {  // at most 8 x 2 x 255 x 8: fits 16 bits
    i8v w[GC];
    for (int g = 0; g < GC; g++) w[g] = iv_broadcast4(w8[g] + s * 32 + 4 * v);
    for (int o = 0; o < OC; o++) {
      const uint8_t* block = codes + o * octet_bytes + (s * 2 + v / 4) * BITS * 16;
      const i8v x = iv_signed_codes<BITS>(block, v % 4);
      for (int g = 0; g < GC; g++) {
        part[g][o] = _mm256_add_epi16(part[g][o], _mm256_maddubs_epi16(w[g], x));
        KV_KEEP(part[g][o]);
      }
    }
  }
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < OC; o++) dot[g][o] = _mm256_madd_epi16(part[g][o], one);
}
#endif
