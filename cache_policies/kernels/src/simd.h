// Eight-lane floats and 32-byte integers for the instruction set this file is compiled for.
// Included by one translation unit per instruction set, inside an anonymous namespace, so
// that no function of one set can be linked into another. No std:: templates here for the
// same reason.
#pragma once

#if defined(KV_SANITIZE)  // checks in code inlined a hundred times take minutes to compile
#define KV_INLINE static inline
#else
#define KV_INLINE static inline __attribute__((always_inline))
#endif

KV_INLINE float bits_to_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
KV_INLINE uint32_t float_to_bits(float f) { uint32_t x; memcpy(&x, &f, 4); return x; }
KV_INLINE float bf16_to_float(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }
KV_INLINE uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t x = float_to_bits(f);
  if ((x & 0x7fffffff) > 0x7f800000) return uint16_t((x >> 16) | 0x40);
  return uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

#if defined(__AVX2__)
typedef __m256 f8;
KV_INLINE f8 f8_zero() { return _mm256_setzero_ps(); }
KV_INLINE f8 f8_set(float x) { return _mm256_set1_ps(x); }
KV_INLINE f8 f8_load(const float* p) { return _mm256_loadu_ps(p); }
KV_INLINE void f8_store(float* p, f8 v) { _mm256_storeu_ps(p, v); }
KV_INLINE f8 f8_fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }
KV_INLINE f8 f8_max(f8 a, f8 b) { return _mm256_max_ps(a, b); }
KV_INLINE f8 f8_abs(f8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
KV_INLINE f8 f8_load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
KV_INLINE f8 f8_load_bf16(const uint16_t* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
KV_INLINE f8 f8_load_s8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
// eight codes: bits [shift, shift + bits) of eight 32-bit lanes
KV_INLINE f8 f8_load_codes(const uint8_t* p, int shift, int bits) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)p);
  const __m256i x = _mm256_srl_epi32(v, _mm_cvtsi32_si128(shift));
  return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32((1 << bits) - 1)));
}
// eight codes: bits [shift, shift + bits) of four bytes at p and four at q
KV_INLINE f8 f8_load_two_codes(const uint8_t* p, const uint8_t* q, int shift, int bits) {
  const __m128i both = _mm_unpacklo_epi32(_mm_loadu_si32(p), _mm_loadu_si32(q));
  const __m256i x = _mm256_srl_epi32(_mm256_cvtepu8_epi32(both), _mm_cvtsi32_si128(shift));
  return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32((1 << bits) - 1)));
}
// 4 times bit `shift` (lanes 0..3) or `shift` + 4 (lanes 4..7) of one of four words
KV_INLINE f8 f8_load_high(const uint8_t* p, int shift) {
  const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  const __m256i by = _mm256_add_epi32(_mm256_set1_epi32(shift), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  const __m256i bit = _mm256_and_si256(_mm256_srlv_epi32(v, by), _mm256_set1_epi32(1));
  return _mm256_cvtepi32_ps(_mm256_slli_epi32(bit, 2));
}
KV_INLINE float f8_sum(f8 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
KV_INLINE float f8_hmax(f8 v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}
KV_INLINE f8 f8_exponent(f8 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
KV_INLINE f8 f8_round(f8 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KV_INLINE void f8_transpose(f8 r[8]) {
  f8 a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    b[4 * i + 0] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}
// sums (maxima) of eight vectors, as the lanes of one; shuffles, since hadd is slow on AMD
#define KV_REDUCE8(OP)                                                                     \
  f8 a[4], b[2];                                                                           \
  for (int i = 0; i < 4; i++)                                                              \
    a[i] = OP(_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1])); \
  for (int i = 0; i < 2; i++)                                                              \
    b[i] = OP(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee)); \
  return OP(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31))
KV_INLINE f8 f8_sum8(const f8 r[8]) { KV_REDUCE8(_mm256_add_ps); }
KV_INLINE f8 f8_max8(const f8 r[8]) { KV_REDUCE8(_mm256_max_ps); }
KV_INLINE f8 f8_min(f8 a, f8 b) { return _mm256_min_ps(a, b); }
KV_INLINE f8 f8_clamp_f16(f8 x) { return f8_max(f8_set(-65504.f), f8_min(f8_set(65504.f), x)); }  // NaN stays
KV_INLINE __m128i f8_to_f16(f8 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
// 1 / x, 0 for 0
KV_INLINE f8 f8_inverse(f8 x) {
  return _mm256_and_ps(_mm256_div_ps(f8_set(1.f), x), _mm256_cmp_ps(x, f8_zero(), _CMP_GT_OQ));
}
KV_INLINE __m128i f8_to_bf16(f8 v) {  // as float_to_bf16
  const __m256i x = _mm256_castps_si256(v), top = _mm256_srli_epi32(x, 16), one = _mm256_set1_epi32(1);
  const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(top, one));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, half), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
KV_INLINE __m128i f8_to_s8(f8 x) {  // in the lower eight bytes; x is rounded and within int8
  const __m256i r = _mm256_cvtps_epi32(x);
  const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  return _mm_packs_epi16(w, w);
}
KV_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
KV_INLINE float f16_to_float(uint16_t x) { return _cvtsh_ss(x); }
KV_INLINE uint16_t float_to_f16(float f) { return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }

#else  // portable: GCC vectors, lowered to what the base instruction set has
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8x __attribute__((vector_size(32)));
KV_INLINE f8 f8_set(float x) { return f8{x, x, x, x, x, x, x, x}; }
KV_INLINE f8 f8_zero() { return f8_set(0.f); }
KV_INLINE f8 f8_load(const float* p) { f8 v; memcpy(&v, p, 32); return v; }
KV_INLINE void f8_store(float* p, f8 v) { memcpy(p, &v, 32); }
KV_INLINE f8 f8_fma(f8 a, f8 b, f8 c) { return a * b + c; }
KV_INLINE f8 f8_max(f8 a, f8 b) { return a > b ? a : b; }
KV_INLINE f8 f8_abs(f8 a) { return f8_max(a, -a); }
KV_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) return bits_to_float(sign | float_to_bits(float(mantissa) * 5.9604644775390625e-8f));
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
KV_INLINE uint16_t float_to_f16(float f) {  // round to nearest even
  const uint32_t x = float_to_bits(f), sign = (x >> 16) & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal: let the float adder do the rounding
    return uint16_t(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}
KV_INLINE f8 f8_load_f16(const uint16_t* p) { f8 v; for (int i = 0; i < 8; i++) v[i] = f16_to_float(p[i]); return v; }
KV_INLINE f8 f8_load_bf16(const uint16_t* p) { f8 v; for (int i = 0; i < 8; i++) v[i] = bf16_to_float(p[i]); return v; }
KV_INLINE f8 f8_load_s8(const int8_t* p) { f8 v; for (int i = 0; i < 8; i++) v[i] = float(p[i]); return v; }
KV_INLINE f8 f8_load_codes(const uint8_t* p, int shift, int bits) {
  i8x v;
  memcpy(&v, p, 32);
  return __builtin_convertvector((v >> shift) & ((1 << bits) - 1), f8);
}
KV_INLINE f8 f8_load_high(const uint8_t* p, int shift) {
  f8 v;
  for (int i = 0; i < 8; i++) {
    uint32_t word;
    memcpy(&word, p + i % 4 * 4, 4);
    v[i] = float((word >> (shift + i / 4 * 4) & 1) * 4);
  }
  return v;
}
KV_INLINE float f8_sum(f8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
KV_INLINE float f8_hmax(f8 v) { float m = v[0]; for (int i = 1; i < 8; i++) m = v[i] > m ? v[i] : m; return m; }
KV_INLINE f8 f8_exponent(f8 x) {
  i8x bits;
  memcpy(&bits, &x, 32);
  bits <<= 23;
  memcpy(&x, &bits, 32);
  return x;
}
KV_INLINE void f8_transpose(f8 r[8]) {
  for (int i = 0; i < 8; i++)
    for (int j = i + 1; j < 8; j++) { const float t = r[i][j]; r[i][j] = r[j][i]; r[j][i] = t; }
}
KV_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
KV_INLINE f8 f8_sum8(const f8 r[8]) { f8 v; for (int i = 0; i < 8; i++) v[i] = f8_sum(r[i]); return v; }
#endif

struct Lanes8 {
  typedef f8 Vec;
  enum { N = 8 };
  KV_INLINE f8 set(float x) { return f8_set(x); }
  KV_INLINE f8 load(const float* p) { return f8_load(p); }
  KV_INLINE void store(float* p, f8 v) { f8_store(p, v); }
  KV_INLINE f8 fma(f8 a, f8 b, f8 c) { return f8_fma(a, b, c); }
  KV_INLINE f8 max(f8 a, f8 b) { return f8_max(a, b); }
  // the lowest nine bits, as the sign and exponent of a float
  KV_INLINE f8 exponent(f8 a) { return f8_exponent(a); }
  KV_INLINE float sum(f8 a) { return f8_sum(a); }
  KV_INLINE float hmax(f8 a) { return f8_hmax(a); }
  KV_INLINE f8 load_f16(const uint16_t* p) { return f8_load_f16(p); }
  KV_INLINE f8 load_bf16(const uint16_t* p) { return f8_load_bf16(p); }
  KV_INLINE f8 load_s8(const int8_t* p) { return f8_load_s8(p); }
  // sum, and largest, of the halves of a wider vector
  KV_INLINE f8 fold_sum(f8 a) { return a; }
  KV_INLINE f8 fold_max(f8 a) { return a; }
  KV_INLINE f8 abs(f8 a) { return f8_abs(a); }
  // eight items at p; wider vectors take eight more `next` bytes on
  KV_INLINE f8 load2(const float* p, int64_t) { return f8_load(p); }
  KV_INLINE f8 load2_f16(const uint16_t* p, int64_t) { return f8_load_f16(p); }
  KV_INLINE f8 load2_bf16(const uint16_t* p, int64_t) { return f8_load_bf16(p); }
  KV_INLINE f8 load2_s8(const int8_t* p, int64_t) { return f8_load_s8(p); }
};

#if defined(__AVX512F__)
struct Lanes16 {
  typedef __m512 Vec;
  enum { N = 16 };
  KV_INLINE Vec set(float x) { return _mm512_set1_ps(x); }
  KV_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  KV_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  KV_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  KV_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  KV_INLINE Vec exponent(Vec a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
  KV_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  KV_INLINE float hmax(Vec v) { return _mm512_reduce_max_ps(v); }
  KV_INLINE f8 fold_sum(Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  KV_INLINE f8 fold_max(Vec v) { return _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  KV_INLINE Vec abs(Vec v) { return _mm512_abs_ps(v); }
  KV_INLINE Vec load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  KV_INLINE Vec load_bf16(const uint16_t* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  KV_INLINE Vec load_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  KV_INLINE Vec load2(const float* p, int64_t next) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(f8_load(p)), f8_load((const float*)((const char*)p + next)), 1);
  }
  KV_INLINE Vec load2_f16(const uint16_t* p, int64_t next) { return _mm512_cvtph_ps(two128(p, next)); }
  KV_INLINE Vec load2_bf16(const uint16_t* p, int64_t next) { return from_bf16(two128(p, next)); }
  KV_INLINE Vec load2_s8(const int8_t* p, int64_t next) {
    const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)p), _mm_loadl_epi64((const __m128i*)(p + next)));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(both));
  }
  KV_INLINE __m256i two128(const uint16_t* p, int64_t next) {
    const __m128i* second = (const __m128i*)((const char*)p + next);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)), _mm_loadu_si128(second), 1);
  }
  KV_INLINE Vec from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
};
typedef Lanes16 Wide;
#else
typedef Lanes8 Wide;
#endif
typedef Wide::Vec fw;
enum { FW = Wide::N };
static const float LOG2_E = 1.44269504088896341f;

// 2^x, relative error below 3e-7 on [-126, 127]; smaller arguments give about 1e-38. The polynomial is
// the best of its degree on [-0.5, 0.5] with 2^0 = 1.
KV_INLINE fw fw_exp2(fw x) {
  x = Wide::max(x, Wide::set(-126.f));
  // So large a float has no room for a fraction: its lowest bits are 127 and the nearest whole number.
  const fw near = Wide::set(12582912.f + 127.f), whole = x + near, t = x - (whole - near);
  fw p = Wide::set(1.32647271e-3f);
  p = Wide::fma(p, t, Wide::set(9.67151264e-3f));
  p = Wide::fma(p, t, Wide::set(5.55073374e-2f));
  p = Wide::fma(p, t, Wide::set(2.40222421e-1f));
  p = Wide::fma(p, t, Wide::set(6.93146978e-1f));
  p = Wide::fma(p, t, Wide::set(1.f));
  return p * Wide::exponent(whole);
}

KV_INLINE int min_int(int a, int b) { return a < b ? a : b; }
KV_INLINE int64_t min_int64(int64_t a, int64_t b) { return a < b ? a : b; }
KV_INLINE int max_int(int a, int b) { return a > b ? a : b; }
KV_INLINE float max_float(float a, float b) { return a > b ? a : b; }
KV_INLINE float clamp_f16(float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; }
