// Decode over int8 pages with integer dot products: queries, and weights times the values' scales,
// are rounded to 16 bits against their largest, which is far finer than the pages' eight. Two
// neighbours meet in a 32-bit lane: two channels of a key, two tokens of a value.
#pragma once

#include "rows/rows.h"
#include "tile/softmax.h"

#if defined(__AVX2__)

#if defined(__AVX512VNNI__)
typedef __m512i i16w;  // pairs of int16, one in each lane of an fw
KV_INLINE i16w pairs_zero() { return _mm512_setzero_si512(); }
KV_INLINE i16w pairs_set(int32_t pair) { return _mm512_set1_epi32(pair); }
KV_INLINE fw pairs_sum(i16w sum) { return _mm512_cvtepi32_ps(sum); }
// The instruction by its name, as in codes/dots.h.
KV_INLINE void pairs_dot(i16w& sum, i16w x, i16w y) { __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); }
KV_INLINE void pairs_round(fw x, int16_t* out) { _mm256_storeu_si256((__m256i*)out, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x))); }
// channels c and c + 1 of sixteen tokens; their second octet lies `octet` bytes on
KV_INLINE i16w pairs_of_channels(const char* at, int64_t octet) {
  const __m128i order = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  const __m128i one = _mm_loadu_si128((const __m128i*)at), other = _mm_loadu_si128((const __m128i*)(at + octet));
  return _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(_mm256_set_m128i(other, one), _mm256_broadcastsi128_si256(order)));
}
// 32 channels of two tokens: 0-7 and 16-23 of them, then the others
KV_INLINE void pairs_of_tokens(const char* a, const char* b, i16w out[2]) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)a), y = _mm256_loadu_si256((const __m256i*)b);
  out[0] = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y));
  out[1] = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y));
}
KV_INLINE void pairs_add(const i16w sum[2], float unit, float* out) {
  const fw x = pairs_sum(sum[0]) * Wide::set(unit), y = pairs_sum(sum[1]) * Wide::set(unit);
  f8_store(out, f8_load(out) + _mm512_castps512_ps256(x));
  f8_store(out + 8, f8_load(out + 8) + _mm512_castps512_ps256(y));
  f8_store(out + 16, f8_load(out + 16) + _mm512_extractf32x8_ps(x, 1));
  f8_store(out + 24, f8_load(out + 24) + _mm512_extractf32x8_ps(y, 1));
}
#else
typedef __m256i i16w;
KV_INLINE i16w pairs_zero() { return _mm256_setzero_si256(); }
KV_INLINE i16w pairs_set(int32_t pair) { return _mm256_set1_epi32(pair); }
KV_INLINE fw pairs_sum(i16w sum) { return _mm256_cvtepi32_ps(sum); }
KV_INLINE void pairs_dot(i16w& sum, i16w x, i16w y) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
  __asm__("" : "+x"(sum));  // as KV_KEEP in codes/dots.h
}
KV_INLINE void pairs_round(fw x, int16_t* out) {
  const __m256i r = _mm256_cvtps_epi32(x);
  _mm_storeu_si128((__m128i*)out, _mm_packs_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
KV_INLINE i16w pairs_of_channels(const char* at, int64_t) {
  const __m128i order = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)at), order));
}
// sixteen channels of two tokens
KV_INLINE void pairs_of_tokens(const char* a, const char* b, i16w out[2]) {
  const __m128i x = _mm_loadu_si128((const __m128i*)a), y = _mm_loadu_si128((const __m128i*)b);
  out[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y));
  out[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y));
}
KV_INLINE void pairs_add(const i16w sum[2], float unit, float* out) {
  f8_store(out, f8_fma(pairs_sum(sum[0]), f8_set(unit), f8_load(out)));
  f8_store(out + 8, f8_fma(pairs_sum(sum[1]), f8_set(unit), f8_load(out + 8)));
}
#endif

struct Rounded16 {  // a row of floats in steps of `unit`
  alignas(64) int16_t x[256];
  float unit;
};

// n is a multiple of FW; sums of 256 products with int8 fit 32 bits
KV_INLINE void round_row(const float* x, int n, Rounded16* out) {
  fw top = Wide::set(1e-30f);
  for (int i = 0; i < n; i += FW) top = Wide::max(top, Wide::abs(Wide::load(x + i)));
  const float largest = Wide::hmax(top);
  for (int i = 0; i < n; i += FW) pairs_round(Wide::load(x + i) * Wide::set(32767.f / largest), out->x + i);
  out->unit = largest * (1.f / 32767.f);
}

// the pair from i on, in every lane
KV_INLINE i16w pairs_at(const Rounded16& row, int i) {
  int32_t pair;
  memcpy(&pair, row.x + i, 4);
  return pairs_set(pair);
}

// scores of NV x FW tokens; octets: of the first
template <int GC, int NV>
KV_INLINE void score_int8_block(const char* octets, const Rounded16* q, int d, float* score, Fetch* fetch) {
  const int64_t octet = int64_t(d) * 8;
  i16w sum[GC][NV];
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) sum[g][o] = pairs_zero();
  for (int c = 0; c < d; c += 2) {
    fetch->step();
    i16w k[NV];
    for (int o = 0; o < NV; o++) k[o] = pairs_of_channels(octets + o * (FW / 8) * octet + c * 8, octet);
    for (int g = 0; g < GC; g++) {
      const i16w y = pairs_at(q[g], c);
      for (int o = 0; o < NV; o++) pairs_dot(sum[g][o], k[o], y);
    }
  }
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) Wide::store(score + g * TILE + FW * o, pairs_sum(sum[g][o]) * Wide::set(q[g].unit));
}

template <int GC>
static void score_int8(const KvRows& rows, const float* query, int d, float* score, Fetch* fetch) {
  enum { NV = FW == 16 ? 4 : GC <= 2 ? 4 : 2 };  // as many accumulators as registers hold
  Rounded16 q[GC];
  for (int g = 0; g < GC; g++) round_row(query + g * d, d, &q[g]);
  const int64_t octet = int64_t(d) * 8;
  int t = 0;
  for (; t + FW * NV <= rows.key.count; t += FW * NV)
    score_int8_block<GC, NV>(rows.octets + t / 8 * octet, q, d, score + t, fetch);
  for (; t < rows.key.count; t += FW) score_int8_block<GC, 1>(rows.octets + t / 8 * octet, q, d, score + t, fetch);
  for (int i = 0; i < rows.key.count; i += 8)
    for (int g = 0; g < GC; g++)
      f8_store(score + g * TILE + i, f8_load(score + g * TILE + i) * f8_load_f16(rows.key.scale + i));
}

// 2 x FW channels from c on
template <int GC>
KV_INLINE void mix_int8_block(const Rows& value, const Rounded16* weight, int d, int c, float* out, Fetch* fetch) {
  i16w sum[GC][2];
  for (int g = 0; g < GC; g++) sum[g][0] = sum[g][1] = pairs_zero();
  for (int t = 0; t < value.count; t += 2) {
    fetch->step();
    i16w v[2];
    pairs_of_tokens(value.row[t] + c, value.row[min_int(t + 1, value.count - 1)] + c, v);
    for (int g = 0; g < GC; g++) {
      const i16w w = pairs_at(weight[g], t);
      pairs_dot(sum[g][0], v[0], w);
      pairs_dot(sum[g][1], v[1], w);
    }
  }
  for (int g = 0; g < GC; g++) pairs_add(sum[g], weight[g].unit, out + g * d + c);
}

// score: probabilities, zero from count to the next multiple of FW
template <int GC>
static void mix_int8(const Rows& value, float* score, int d, float* out, Fetch* fetch) {
  Rounded16 weight[GC];
  const int padded = (value.count + FW - 1) / FW * FW;
  for (int g = 0; g < GC; g++) {
    float* w = score + g * TILE;
    int t = 0;
    for (; t + FW <= value.count; t += FW) Wide::store(w + t, Wide::load(w + t) * Wide::load_f16(value.scale + t));
    for (; t < value.count; t++) w[t] *= f16_to_float(value.scale[t]);
    round_row(w, padded, &weight[g]);
  }
  for (int c = 0; c < d; c += 2 * FW) mix_int8_block<GC>(value, weight, d, c, out, fetch);
}

template <int GC>
static void decode_int8_group(const KvRows& rows, const float* query, int d, int head, Softmax* s, Fetch* fetch) {
  alignas(64) float score[GC * TILE];
  score_int8<GC>(rows, query + head * d, d, score, fetch);
  softmax_rows<GC>(s, head, d, score, TILE, rows.key.count);
  mix_int8<GC>(rows.value, score, d, s->out + head * d, fetch);
}

static bool has_int8_dot(const Layout& l) {
  return l.kind == Kind::int8 && l.head_size % (2 * FW) == 0 && l.page_tokens % FW == 0;
}

static void decode_int8(const KvRows& rows, const Query& q, int d, Softmax* s, Fetch* fetch) {
  const int count = rows.key.count, steps = d / 2 * count / (4 * FW) + count / 2 * (d / (2 * FW));  // about
  fetch->spread(steps);
  for (int head = 0; head < q.heads;) {
    switch (min_int(4, q.heads - head)) {
      case 4: decode_int8_group<4>(rows, q.data, d, head, s, fetch); head += 4; break;
      case 3: decode_int8_group<3>(rows, q.data, d, head, s, fetch); head += 3; break;
      case 2: decode_int8_group<2>(rows, q.data, d, head, s, fetch); head += 2; break;
      default: decode_int8_group<1>(rows, q.data, d, head, s, fetch); head += 1; break;
    }
  }
}

#else
static bool has_int8_dot(const Layout&) { return false; }
static void decode_int8(const KvRows&, const Query&, int, Softmax*, Fetch*) {}
#endif
