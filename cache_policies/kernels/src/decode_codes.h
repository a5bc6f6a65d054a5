// Decode over packed 2 and 4 bit pages with integer dot products; needs 32-byte integers.
//
// Keys: q.k = sum_c q_c (code_c s_c + m_c). The vector q_c s_c (KIVI: per group of tokens;
// FlexGen: q_c, with s per token outside) is rounded to 16 bit for 4-bit codes and to 8 bit for
// 2-bit codes. Codes are unsigned; counting them from their middle, whose
// share is taken exactly, leaves only the rounding error times (code - mid).
//
// Values: sum_t p_t (code_t s_t + m_t). The weights p_t s_t of 32 tokens are rounded to 8 bit
// unsigned against their largest; codes are shifted to be signed, the shift going exactly
// into the minimum.
#pragma once
#if defined(__AVX2__)

enum { MAX_GROUPS = 16, MAX_PAGE = 512, MAX_ROUNDED = MAX_PAGE / 32 };

#include "dots.h"

// Scales and minima of a page in float32, converted once for all query heads; minima are those
// of shifted codes. What no token has written is not read: it may hold a NaN.
struct PageScales {
  alignas(32) float key_scale[MAX_PAGE / 32 * 256], key_min[MAX_PAGE / 32 * 256];
  alignas(32) float value_scale[16 * MAX_PAGE], value_min[16 * MAX_PAGE];
};

static void load_scales(const uint8_t* from, int count, int padded, float* out) {
  const uint16_t* half = (const uint16_t*)from;
  int i = 0;
  for (; i + 8 <= count; i += 8) f8_store(out + i, f8_load_f16(half + i));
  for (; i < count; i++) out[i] = f16_to_float(half[i]);
  for (; i < padded; i++) out[i] = 0.f;
}

// min += mid * scale: the minimum of codes counted from their middle
static void shift_minima(const float* scale, int n, float mid, float* low) {
  for (int i = 0; i < n; i += 8) f8_store(low + i, f8_fma(f8_load(scale + i), f8_set(mid), f8_load(low + i)));
}

static void load_page_scales(const Layout& l, const uint8_t* run, int count, PageScales* s) {
  const int d = l.head_size, n = l.page_tokens, groups = d / l.group, padded = (count + 31) & ~31;
  const float key_mid = ((1 << l.k_bits) - 1) * 0.5f;
  if (l.keys_per_channel) {
    const int used = (count + l.group - 1) / l.group * d;
    load_scales(run + l.key_scale, used, used, s->key_scale);
    load_scales(run + l.key_min, used, used, s->key_min);
    shift_minima(s->key_scale, used, key_mid, s->key_min);
  }
  for (int g = 0; g < groups; g++) {
    if (!l.keys_per_channel) {
      load_scales(run + l.key_scale + 2 * g * n, count, padded, s->key_scale + g * n);
      load_scales(run + l.key_min + 2 * g * n, count, padded, s->key_min + g * n);
      shift_minima(s->key_scale + g * n, padded, key_mid, s->key_min + g * n);
    }
    load_scales(run + l.value_scale + 2 * g * n, count, padded, s->value_scale + g * n);
    load_scales(run + l.value_min + 2 * g * n, count, padded, s->value_min + g * n);
    shift_minima(s->value_scale + g * n, padded, float(1 << (l.v_bits - 1)), s->value_min + g * n);
  }
}

// x[c .. c + n) -> integers under `inverse`; the vector sum of the integers is added to *total
template <int BITS>
KV_INLINE void round_channels(const float* x, int c, int n, f8 inverse, RoundedQuery* out, i8v* total) {
  for (int i = c; i < c + n; i += 16) {
    const i8v a = _mm256_cvtps_epi32(f8_load(x + i) * inverse);
    const i8v b = _mm256_cvtps_epi32(f8_load(x + i + 8) * inverse);
    *total = _mm256_add_epi32(*total, _mm256_add_epi32(a, b));
    store_rounded<BITS>(pack16(a, b), i, out);
  }
}

// KIVI: every group of the page, eight at a time so that the horizontal sums are shared
template <int BITS>
static void round_by_channel(const Layout& l, const PageScales& p, const float* q, int groups, int stride,
                             RoundedQuery* out) {
  const int d = l.head_size;
  const float mid = ((1 << BITS) - 1) * 0.5f;
  alignas(32) float scaled[8][256];
  for (int first = 0; first < groups; first += 8) {
    const int n = min_int(8, groups - first);
    f8 top[8], extra[8], total[8];
    for (int i = 0; i < 8; i++) top[i] = extra[i] = total[i] = f8_zero();
    for (int i = 0; i < n; i++) {
      const float *scale = p.key_scale + (first + i) * d, *low = p.key_min + (first + i) * d;
      for (int c = 0; c < d; c += 8) {
        const f8 v = f8_load(q + c), x = v * f8_load(scale + c);
        f8_store(scaled[i] + c, x);
        top[i] = f8_max(top[i], f8_abs(x));
        extra[i] = f8_fma(v, f8_load(low + c), extra[i]);
      }
    }
    const f8 largest = f8_max8(top) + f8_set(1e-30f);
    alignas(32) float inverse[8], unit[8], offset[8];
    f8_store(inverse, f8_set(round_range<BITS>()) / largest);
    f8_store(unit, largest * f8_set(1.f / round_range<BITS>()));
    for (int i = 0; i < n; i++) {
      i8v sum = _mm256_setzero_si256();
      RoundedQuery* r = out + (first + i) * stride;
      round_channels<BITS>(scaled[i], 0, d, f8_set(inverse[i]), r, &sum);
      total[i] = f8_fma(_mm256_cvtepi32_ps(sum), f8_set(-unit[i] * mid), extra[i]);
    }
    f8_store(offset, f8_sum8(total));
    for (int i = 0; i < n; i++) out[(first + i) * stride].unit = unit[i], out[(first + i) * stride].offset = offset[i];
  }
}

// FlexGen: the query itself, with the sums of every group of channels
template <int BITS>
static void round_by_token(const Layout& l, const float* q, RoundedQuery* out) {
  const float mid = ((1 << BITS) - 1) * 0.5f;
  f8 top = f8_zero();
  for (int c = 0; c < l.head_size; c += 8) top = f8_max(top, f8_abs(f8_load(q + c)));
  const float largest = f8_hmax(top) + 1e-30f;
  out->unit = largest / round_range<BITS>();
  for (int g = 0; g < l.head_size / l.group; g++) {
    i8v sum = _mm256_setzero_si256();
    f8 exact = f8_zero();
    for (int c = g * l.group; c < (g + 1) * l.group; c += 8) exact = exact + f8_load(q + c);
    round_channels<BITS>(q, g * l.group, l.group, f8_set(round_range<BITS>() / largest), out, &sum);
    out->sum[g] = f8_sum(exact);
    out->lost[g] = -f8_sum(_mm256_cvtepi32_ps(sum)) * out->unit * mid;
  }
}

// scores of NV x 8 tokens from `token` on, which is vector v of its span
template <int BITS, int GC, int NV>
KV_INLINE void score_vectors(const Layout& l, const PageScales& p, const uint8_t* span, int token, int v,
                             const RoundedQuery* rq, float* score) {
  i8v dot[GC][NV];
  if (l.keys_per_channel) {
    dot_codes<BITS, GC, NV>(span, v, 0, l.head_size, rq, dot);
    for (int g = 0; g < GC; g++)
      for (int o = 0; o < NV; o++)
        f8_store(score + g * MAX_PAGE + 8 * o,
                 f8_fma(_mm256_cvtepi32_ps(dot[g][o]), f8_set(rq[g].unit), f8_set(rq[g].offset)));
    return;
  }
  f8 sum[GC][NV];
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) sum[g][o] = f8_zero();
  for (int group = 0; group < l.head_size / l.group; group++) {
    dot_codes<BITS, GC, NV>(span, v, group * l.group, (group + 1) * l.group, rq, dot);
    for (int o = 0; o < NV; o++) {
      const f8 scale = f8_load(p.key_scale + group * l.page_tokens + token + 8 * o);
      const f8 low = f8_load(p.key_min + group * l.page_tokens + token + 8 * o);
      for (int g = 0; g < GC; g++) {
        const f8 x = f8_fma(_mm256_cvtepi32_ps(dot[g][o]), f8_set(rq[g].unit), f8_set(rq[g].lost[group]));
        sum[g][o] = f8_fma(x, scale, f8_fma(f8_set(rq[g].sum[group]), low, sum[g][o]));
      }
    }
  }
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) f8_store(score + g * MAX_PAGE + 8 * o, sum[g][o]);
}

// vectors of accumulators a query head may have: as many as registers hold
template <int GC>
constexpr int code_vectors() { return FW == 16 ? (GC <= 3 ? 4 : 2) : GC <= 2 ? 4 : 2; }

template <int BITS, int GC>
static void score_codes(const Layout& l, const PageScales& p, const uint8_t* run, int count, const float* query,
                        float* score, Fetch* fetch) {
  enum { NV = code_vectors<GC>() };
  const int d = l.head_size, span_bytes = d * BITS * 4;
  RoundedQuery rq[MAX_ROUNDED * GC];
  for (int g = 0; g < GC; g++) {
    if (l.keys_per_channel) round_by_channel<BITS>(l, p, query + g * d, (count + l.group - 1) / l.group, GC, rq + g);
    else round_by_token<BITS>(l, query + g * d, rq + g);
  }
  for (int t = 0; t < count; t += 32) {
    const RoundedQuery* now = rq + (l.keys_per_channel ? t / l.group * GC : 0);
#pragma GCC unroll 2
    for (int v = 0; v < 4; v += NV, fetch->step())
      score_vectors<BITS, GC, NV>(l, p, run + l.key + t / 32 * span_bytes, t + 8 * v, v, now, score + t + 8 * v);
  }
}

// Weights p_t s_t of 32 tokens -> 8 bit unsigned under the given inverse step.
KV_INLINE void round_weights(const float* w, f8 inverse, uint8_t* out) {
  __m256i r[4];
  for (int i = 0; i < 4; i++) r[i] = _mm256_cvtps_epi32(f8_load(w + 8 * i) * inverse);
  const i8v a = _mm256_packs_epi32(r[0], r[1]), b = _mm256_packs_epi32(r[2], r[3]);
  const i8v packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_store_si256((__m256i*)out, packed);
}

struct RoundedWeights {  // one query head, one group of channels, one page
  alignas(32) uint8_t w8[MAX_PAGE];
  alignas(32) float unit[MAX_PAGE / 32 + 8];  // value of one step, a span of 32 tokens each
  float offset;                               // sum of p_t m_t
};

static void round_page_weights(const float* score, const float* scale, const float* low, int spans,
                               RoundedWeights* out) {
  alignas(32) float w[MAX_PAGE];
  f8 rest = f8_zero();
  for (int s = 0; s < spans; s += 8) {
    f8 top[8];
    for (int i = 0; i < 8; i++) top[i] = f8_zero();
    for (int i = 0; i < min_int(8, spans - s); i++)
      for (int t = (s + i) * 32; t < (s + i + 1) * 32; t += 8) {
        const f8 weight = f8_load(score + t), x = weight * f8_load(scale + t);
        f8_store(w + t, x);
        top[i] = f8_max(top[i], x);
        rest = f8_fma(weight, f8_load(low + t), rest);
      }
    const f8 largest = f8_max8(top) + f8_set(1e-30f);
    alignas(32) float inverse[8];
    f8_store(inverse, f8_set(255.f) / largest);
    f8_store(out->unit + s, largest * f8_set(1.f / 255.f));
    for (int i = 0; i < min_int(8, spans - s); i++)
      round_weights(w + (s + i) * 32, f8_set(inverse[i]), out->w8 + (s + i) * 32);
  }
  out->offset = f8_sum(rest);
}

// channels [c, c + 8 OC) of a page, for GC query heads
template <int BITS, int GC, int OC>
KV_INLINE void mix_octets(const uint8_t* codes, int64_t octet_bytes, int spans, const RoundedWeights* rw, int d,
                          float* out, Fetch* fetch) {
  const uint8_t* w8[GC];
  f8 total[GC][OC];
  for (int g = 0; g < GC; g++) {
    w8[g] = rw[g].w8;
    for (int o = 0; o < OC; o++) total[g][o] = f8_load(out + g * d + 8 * o) + f8_set(rw[g].offset);
  }
  for (int s = 0; s < spans; s++) {
    fetch->step();
    i8v dot[GC][OC];
    mix_span<BITS, GC, OC>(codes, octet_bytes, s, w8, dot);
    for (int g = 0; g < GC; g++)
      for (int o = 0; o < OC; o++)
        total[g][o] = f8_fma(_mm256_cvtepi32_ps(dot[g][o]), f8_set(rw[g].unit[s]), total[g][o]);
  }
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < OC; o++) f8_store(out + g * d + 8 * o, total[g][o]);
}

// score: probabilities, zero from count to the next multiple of 32
template <int BITS, int GC>
static void mix_codes(const Layout& l, const PageScales& p, const uint8_t* run, int count, const float* score,
                      float* out, Fetch* fetch) {
  enum { OC = code_vectors<GC>() };
  const int d = l.head_size, n = l.page_tokens, spans = (count + 31) / 32;
  const int64_t octet_bytes = int64_t(n) * BITS;
  RoundedWeights rw[GC];
  for (int group = 0; group < d / l.group; group++) {
    for (int g = 0; g < GC; g++)
      round_page_weights(score + g * MAX_PAGE, p.value_scale + group * n, p.value_min + group * n, spans, &rw[g]);
    const int end = (group + 1) * l.group;
    int c = group * l.group;
    const uint8_t* codes = run + l.value;
    for (; c + 8 * OC <= end; c += 8 * OC)
      mix_octets<BITS, GC, OC>(codes + c / 8 * octet_bytes, octet_bytes, spans, rw, d, out + c, fetch);
    for (; c < end; c += 16)
      mix_octets<BITS, GC, 2>(codes + c / 8 * octet_bytes, octet_bytes, spans, rw, d, out + c, fetch);
  }
}

template <int GC>
static void decode_codes_group(const Layout& l, const PageScales& p, const uint8_t* run, int count,
                               const float* query, int head, Softmax* s, Fetch* fetch) {
  const int d = l.head_size;
  alignas(32) float score[GC * MAX_PAGE];
  const float* q = query + head * d;
  if (l.k_bits == 2) score_codes<2, GC>(l, p, run, count, q, score, fetch);
  else score_codes<4, GC>(l, p, run, count, q, score, fetch);
  for (int g = 0; g < GC; g++) {
    softmax_row(s, head + g, d, score + g * MAX_PAGE, count);
    for (int t = (count + 7) & ~7; t < ((count + 31) & ~31); t++) score[g * MAX_PAGE + t] = 0.f;
  }
  if (l.v_bits == 2) mix_codes<2, GC>(l, p, run, count, score, s->out + head * d, fetch);
  else mix_codes<4, GC>(l, p, run, count, score, s->out + head * d, fetch);
}

static bool has_integer_dot(const Layout& l) {
  return l.kind == Kind::affine && l.k_bits != 8 && l.v_bits != 8 && l.page_tokens <= MAX_PAGE &&
         l.page_tokens % 32 == 0 && (!l.keys_per_channel || l.group % 32 == 0);
}

static void decode_codes(const Layout& l, const uint8_t* run, int count, const Query& q, Softmax* s, Fetch* fetch) {
  const int spans = (count + 31) / 32, steps = spans + spans * l.head_size / 32;  // at least
  fetch->lines = int((fetch->end - fetch->at) / 64 / max_int(1, steps)) + 1;
  PageScales p;
  load_page_scales(l, run, count, &p);
  for (int head = 0; head < q.heads;) {
    switch (min_int(4, q.heads - head)) {
      case 4: decode_codes_group<4>(l, p, run, count, q.data, head, s, fetch); head += 4; break;
      case 3: decode_codes_group<3>(l, p, run, count, q.data, head, s, fetch); head += 3; break;
      case 2: decode_codes_group<2>(l, p, run, count, q.data, head, s, fetch); head += 2; break;
      default: decode_codes_group<1>(l, p, run, count, q.data, head, s, fetch); head += 1; break;
    }
  }
}

#else
static bool has_integer_dot(const Layout&) { return false; }
static void decode_codes(const Layout&, const uint8_t*, int, const Query&, Softmax*, Fetch*) {}
#endif
