// Vectors of floats as wide as the instruction set this file is compiled for, in GCC's and
// Clang's vector extension. Included by one translation unit per instruction set, inside an
// anonymous namespace, so that no function of one set can be linked into another.
#pragma once

#if defined(KV_SANITIZE)
#define SCAN_INLINE static inline
#else
#define SCAN_INLINE static inline __attribute__((always_inline))
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t WordVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2)));

SCAN_INLINE Vec all(float x) { return x - Vec{}; }

template <typename To, typename From>
SCAN_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

SCAN_INLINE float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(float(mantissa) * 0x1p-24f));
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | mantissa << 13);
  return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

SCAN_INLINE uint16_t to_half(float f) {  // round to nearest even
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t x = bits<uint32_t>(f), sign = (x >> 16) & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (a < 0x38800000)  // subnormal: the float adder rounds
    return uint16_t(sign | (bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
#endif
}

SCAN_INLINE uint16_t to_bfloat(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t x = bits<uint32_t>(f);
  if ((x & 0x7fffffff) > 0x7f800000) return uint16_t((x >> 16) | 0x40);
  return uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

// one item of a tensor
SCAN_INLINE float get(const char* p, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return ((const float*)p)[i];
  const uint16_t x = ((const uint16_t*)p)[i];
  return dtype == Dtype::f16 ? from_half(x) : bits<float>(uint32_t(x) << 16);
}

SCAN_INLINE void put(char* p, int64_t i, Dtype dtype, float x) {
  if (dtype == Dtype::f32) ((float*)p)[i] = x;
  else ((uint16_t*)p)[i] = dtype == Dtype::f16 ? to_half(x) : to_bfloat(x);
}

// LANES items from item i on, of which the first n exist; the others are zero
SCAN_INLINE Vec load(const char* p, int64_t i, Dtype dtype, int n) {
  Vec v = {};
  if (n < LANES) {
    for (int j = 0; j < n; j++) v[j] = get(p, i + j, dtype);
  } else if (dtype == Dtype::f32) {
    memcpy(&v, (const float*)p + i, sizeof v);
  } else {
    HalfVec h;
    memcpy(&h, (const uint16_t*)p + i, sizeof h);
    if (dtype == Dtype::bf16) return bits<Vec>(__builtin_convertvector(h, WordVec) << 16);
#if defined(__AVX512F__)
    return bits<Vec>(_mm512_cvtph_ps(bits<__m256i>(h)));
#elif defined(__F16C__)
    return bits<Vec>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
    for (int j = 0; j < LANES; j++) v[j] = from_half(h[j]);
#endif
  }
  return v;
}

SCAN_INLINE void store(char* p, int64_t i, Dtype dtype, int n, Vec v) {
  if (n < LANES) {
    for (int j = 0; j < n; j++) put(p, i + j, dtype, v[j]);
  } else if (dtype == Dtype::f32) {
    memcpy((float*)p + i, &v, sizeof v);
  } else {
    HalfVec h;
    if (dtype == Dtype::bf16) {
      const WordVec x = bits<WordVec>(v), even = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
      h = __builtin_convertvector(v != v ? (WordVec)((x >> 16) | 0x40) : even, HalfVec);
    } else {
#if defined(__AVX512F__)
      h = bits<HalfVec>(_mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
      h = bits<HalfVec>(_mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
      for (int j = 0; j < LANES; j++) h[j] = to_half(v[j]);
#endif
    }
    memcpy((uint16_t*)p + i, &h, sizeof h);
  }
}

SCAN_INLINE Vec load(const float* p, int n) { return load((const char*)p, 0, Dtype::f32, n); }

// e^x within two units in the last place; zero below -87.3, NaN for NaN
SCAN_INLINE Vec exp(Vec x) {
  const float lowest = -87.3f, highest = 88.72f;
  Vec y = x < lowest ? all(lowest) : x;
  y = y > highest ? all(highest) : y;
  // the middle of 2^23's binade has whole numbers only: adding it rounds to one
  const float round = 12582912.f;
  const Vec n = (y * 1.44269504f + round) - round;
  const Vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.38888889e-3f + 8.33333333e-3f;  // Taylor's series; |r| <= ln(2) / 2
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = (p * r + 1.f) * r + 1.f;
  // in two halves, for 2^n itself may be too large
  const IntVec e = __builtin_convertvector(n, IntVec), half = e >> 1;
  p = p * bits<Vec>((half + 127) << 23) * bits<Vec>((e - half + 127) << 23);
  return x < lowest ? Vec{} : p;
}

// 2^(x y) for x y below 127, which is finite; below -126, zero or about 2^-126. Within three units in
// the last place: a table of 2^(j / 32) or 2^(j / 8) and a short polynomial, for few operations and
// none that wait
const float LN2 = 0.69314718f, LOG2E = 1.44269504f;

#if defined(__AVX2__)
static const uint32_t POWERS[32] = {
    0x3f800000, 0x3f82cd87, 0x3f85aac3, 0x3f88980f, 0x3f8b95c2, 0x3f8ea43a, 0x3f91c3d3, 0x3f94f4f0,
    0x3f9837f0, 0x3f9b8d3a, 0x3f9ef532, 0x3fa27043, 0x3fa5fed7, 0x3fa9a15b, 0x3fad583f, 0x3fb123f6,
    0x3fb504f3, 0x3fb8fbaf, 0x3fbd08a4, 0x3fc12c4d, 0x3fc5672a, 0x3fc9b9be, 0x3fce248c, 0x3fd2a81e,
    0x3fd744fd, 0x3fdbfbb8, 0x3fe0ccdf, 0x3fe5b907, 0x3feac0c7, 0x3fefe4ba, 0x3ff5257d, 0x3ffa83b3};
#endif

SCAN_INLINE Vec decay(Vec x, Vec y) {
#if defined(__AVX512F__)
  // the middle of 2^18's binade has 32nds only: adding it rounds to one, whose lowest bits say
  // which of a power of two's it is
  const float round = 393216.f, near = LN2 / 32;
  const Vec m = x * y + round, n = m - round, r = x * y - n;
  const Vec power = bits<Vec>(_mm512_permutex2var_epi32(
      _mm512_loadu_si512(POWERS), bits<__m512i>(m), _mm512_loadu_si512(POWERS + 16)));
  // LN2 r + (LN2 r)^2 / 2, with what a cube adds on the average of |r| <= 1/64
  const Vec part = r * (r * (LN2 * LN2 / 2) + LN2 * (1 + near * near / 32));
  return bits<Vec>(_mm512_scalef_ps(bits<__m512>(power * part + power), bits<__m512>(n)));
#elif defined(__AVX2__)
  const float round = 1572864.f;  // the same of eighths
  const Vec product = bits<Vec>(_mm256_max_ps(_mm256_set1_ps(-126.f), bits<__m256>(x * y)));  // NaN stays
  const Vec m = product + round, r = product - (m - round);
  const WordVec n = bits<WordVec>(m);
  // less what the shifted eighths add
  const WordVec eighths = {POWERS[0],
                           POWERS[4] - (1u << 20),
                           POWERS[8] - (2u << 20),
                           POWERS[12] - (3u << 20),
                           POWERS[16] - (4u << 20),
                           POWERS[20] - (5u << 20),
                           POWERS[24] - (6u << 20),
                           POWERS[28] - (7u << 20)};
  const __m256i power = _mm256_permutevar8x32_epi32(bits<__m256i>(eighths), bits<__m256i>(n));
  const Vec whole = bits<Vec>(bits<WordVec>(power) + (n << 20));
  const Vec part = r * (r * (r * (LN2 * LN2 * LN2 / 6) + LN2 * LN2 / 2) + LN2);
  return whole * part + whole;
#else
  return exp(x * y * LN2);
#endif
}

SCAN_INLINE Vec at_least(float limit, Vec x) {  // NaN stays
#if defined(__AVX512F__)
  return bits<Vec>(_mm512_max_ps(_mm512_set1_ps(limit), bits<__m512>(x)));
#else
  return x < limit ? all(limit) : x;
#endif
}

SCAN_INLINE Vec at_most(float limit, Vec x) {  // NaN stays
#if defined(__AVX512F__)
  return bits<Vec>(_mm512_min_ps(_mm512_set1_ps(limit), bits<__m512>(x)));
#else
  return x > limit ? all(limit) : x;
#endif
}

// e^-x, for an x beyond a limit that of the limit
SCAN_INLINE Vec falling(Vec x, float limit) {
  return decay(at_most(limit, at_least(-limit, x)), all(-LOG2E));
}

// 1 / x for x of neither very small nor very large size
SCAN_INLINE Vec inverse(Vec x) {
#if defined(__AVX512F__)
  const Vec y = bits<Vec>(_mm512_rcp14_ps(bits<__m512>(x)));  // doubled are its 14 bits by
  return y + y * (1.f - x * y);
#else
  return 1.f / x;
#endif
}

SCAN_INLINE float sum(Vec v) {
  typedef float Four __attribute__((vector_size(16)));
  Four part[LANES / 4];
  memcpy(part, &v, sizeof v);
  for (int i = 1; i < LANES / 4; i++) part[0] += part[i];
  return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

SCAN_INLINE Vec silu(Vec x) { return x * inverse(1.f + falling(x, 87.f)); }

// log(1 + e^x) = max(x, 0) + 2 atanh(y / (2 + y)), y = e^-|x|
SCAN_INLINE Vec softplus(Vec x) {
  const Vec size = bits<Vec>(bits<WordVec>(x) & 0x7fffffff);
  const Vec y = decay(at_most(87.f, size), all(-LOG2E)), s = y * inverse(2.f + y), q = s * s;
  Vec p = q * (1.f / 13) + 1.f / 11;
  p = p * q + 1.f / 9;
  p = p * q + 1.f / 7;
  p = p * q + 1.f / 5;
  p = p * q + 1.f / 3;
  p = p * q + 1.f;
  return (x < 0.f ? Vec{} : x) + 2.f * s * p;
}

SCAN_INLINE Vec root(Vec x) {  // square root
#if defined(__AVX512F__)
  return bits<Vec>(_mm512_sqrt_ps(bits<__m512>(x)));
#elif defined(__AVX2__)
  return bits<Vec>(_mm256_sqrt_ps(bits<__m256>(x)));
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

SCAN_INLINE int bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
SCAN_INLINE const char* row(const Rows& m, int64_t i) { return m.data + i * m.stride * bytes_of(m.dtype); }
SCAN_INLINE char* slot(const States& s, int64_t i) { return s.data + i * s.slot * bytes_of(s.dtype); }
SCAN_INLINE int at_most(int a, int b) { return a < b ? a : b; }
