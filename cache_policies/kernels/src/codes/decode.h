// Decode over packed 2, 3 and 4 bit pages with integer dot products; needs 32-byte integers.
//
// Keys: q.k = sum_c q_c (code_c s_c + m_c). The vector q_c s_c (KIVI: per group of tokens;
// FlexGen: q_c, with s per token outside) is rounded to 16 bit, for 2-bit codes to 8 bit. Codes are unsigned; counting them from their middle, whose
// share is taken exactly, leaves only the rounding error times (code - mid); at 16 bits KIVI's keys do without.
//
// Values: sum_t p_t (code_t s_t + m_t). The weights p_t s_t of 32 tokens are rounded to 8 bit
// unsigned against their largest; codes are shifted to be signed, the shift going exactly
// into the minimum.
#pragma once

#include "tile/softmax.h"

#if defined(__AVX2__)
#include "codes/dots.h"

// SCORES: between the rows of two heads; not a power of two, so that they do not meet in a cache
enum { MAX_PAGE = 512, MAX_ROUNDED = MAX_PAGE / 32, SCORES = MAX_PAGE + 16 };

// Scales and minima of a page in float32, converted once for all query heads (KIVI's keys: in the
// order of `order_row`); minima are those of shifted codes. What no token has written is not read: it may hold a NaN.
struct PageScales {
  // of a channel and group of tokens, or of a token and group of at least 16 of 256 channels
  alignas(32) float key_scale[16 * MAX_PAGE], key_min[16 * MAX_PAGE];
  alignas(32) float key_top[MAX_ROUNDED][8];  // KIVI: of every group, as `lane_tops`
  alignas(32) float value_scale[16 * MAX_PAGE], value_min[16 * MAX_PAGE];
};

// count scales and minima to float32, then zeros up to padded; the minima are those of codes
// counted from `mid`
static void load_affine(const uint8_t* scales, const uint8_t* minima, int count, int padded, float mid, float* scale,
                        float* low) {
  const uint16_t *s16 = (const uint16_t*)scales, *m16 = (const uint16_t*)minima;
  int i = 0;
  for (; i + FW <= count; i += FW) {
    const fw s = Wide::load_f16(s16 + i);
    Wide::store(scale + i, s);
    Wide::store(low + i, Wide::fma(s, Wide::set(mid), Wide::load_f16(m16 + i)));
  }
  for (; i < count; i++) scale[i] = f16_to_float(s16[i]), low[i] = f16_to_float(m16[i]) + mid * scale[i];
  for (; i < padded; i++) scale[i] = low[i] = 0.f;
}

// largest of |x| over channels that are eight apart
KV_INLINE f8 lane_tops(const float* x, int d) {
  fw top = Wide::set(0.f);
  for (int c = 0; c < d; c += FW) top = Wide::max(top, Wide::abs(Wide::load(x + c)));
  return Wide::fold_max(top);
}

// KIVI: the scales and minima of `groups` groups of tokens; the minima are those of codes counted from `mid`
template <int BITS>
static void load_channel_scales(const Layout& l, const uint8_t* run, int groups, float mid, PageScales* s) {
  const int d = l.head_size;
  order_halves<BITS>((const uint16_t*)(run + l.key_scale), groups * d, s->key_scale);
  order_halves<BITS>((const uint16_t*)(run + l.key_min), groups * d, s->key_min);
  for (int i = 0; BITS > 2 && i < groups; i++) f8_store(s->key_top[i], lane_tops(s->key_scale + i * d, d));
  for (int i = 0; mid > 0.f && i < groups * d; i += FW)
    Wide::store(s->key_min + i, Wide::fma(Wide::load(s->key_scale + i), Wide::set(mid), Wide::load(s->key_min + i)));
}

static void load_page_scales(const Layout& l, const uint8_t* run, int count, PageScales* s) {
  const int n = l.page_tokens, padded = (count + 31) & ~31;
  const float key_mid = ((1 << l.k_bits) - 1) * 0.5f, value_mid = float(1 << (l.v_bits - 1));
  if (l.keys_per_channel) {
    const int groups = (count + l.group - 1) / l.group;
    if (l.k_bits > 2) load_channel_scales<4>(l, run, groups, 0.f, s);
    else load_channel_scales<2>(l, run, groups, key_mid, s);
  }
  for (int i = 0; i < l.head_size / l.group * n; i += n) {
    if (!l.keys_per_channel)
      load_affine(run + l.key_scale + 2 * i, run + l.key_min + 2 * i, count, padded, key_mid, s->key_scale + i, s->key_min + i);
    load_affine(run + l.value_scale + 2 * i, run + l.value_min + 2 * i, count, padded, value_mid, s->value_scale + i,
                s->value_min + i);
  }
}

// KIVI at 16 bits. The unit of a group and head comes from a bound on their largest product, lane by
// lane: coarser than need be, and still far finer than the codes. Eight are found at a time, for one
// alone would wait for its own maximum. out[groups][GC]
template <int BITS, int GC>
static void round_by_bound(const Layout& l, const PageScales& p, const float* query, int groups, RoundedQuery* out) {
  const int d = l.head_size;
  alignas(64) float q[GC][256 + 16];
  alignas(32) float inverse[MAX_ROUNDED * GC + 8], unit[MAX_ROUNDED * GC + 8];
  f8 largest[GC];
  for (int g = 0; g < GC; g++) order_row<BITS>(query + g * d, d, q[g]);
  for (int g = 0; g < GC; g++) largest[g] = lane_tops(q[g], d);
  for (int first = 0; first < groups * GC; first += 8) {
    f8 top[8];
    for (int i = 0; i < 8; i++)
      top[i] = first + i < groups * GC ? largest[(first + i) % GC] * f8_load(p.key_top[(first + i) / GC]) : f8_zero();
    const f8 most = f8_max8(top) + f8_set(1e-30f);
    f8_store(inverse + first, f8_set(round_range<BITS>()) / most);
    f8_store(unit + first, most * f8_set(1.f / round_range<BITS>()));
  }
  const float *scale = p.key_scale, *low = p.key_min;
  for (int i = 0; i < groups; i++, scale += d, low += d, out += GC) {
    fw rest[GC], by[GC];
    for (int g = 0; g < GC; g++) rest[g] = Wide::set(0.f), by[g] = Wide::set(inverse[i * GC + g]);
    for (int c = 0; c < d; c += 16)
#pragma GCC unroll 4
      for (int g = 0; g < GC; g++) {
        round16<BITS>(q[g], [&](int at) { return Wide::load(scale + at) * by[g]; }, c, out + g);
#pragma GCC unroll 2
        for (int j = c; j < c + 16; j += FW) rest[g] = Wide::fma(Wide::load(q[g] + j), Wide::load(low + j), rest[g]);
      }
    for (int g = 0; g < GC; g++) out[g].unit = unit[i * GC + g], out[g].offset = Wide::sum(rest[g]);
  }
}

// KIVI at 8 bits: the largest product itself, and the rounded channels' mid codes
template <int BITS, int GC>
static void round_by_group(const Layout& l, const PageScales& p, const float* query, int groups, RoundedQuery* out) {
  const int d = l.head_size;
  const float mid = ((1 << BITS) - 1) * 0.5f;
  alignas(64) float scaled[8][256 + 16], q[GC][256 + 16];
  for (int g = 0; g < GC; g++) order_row<BITS>(query + g * d, d, q[g]);
  for (int first = 0; first < groups * GC; first += 8, out += 8) {
    const int n = min_int(8, groups * GC - first);
    f8 top[8], extra[8], total[8];
    for (int i = 0; i < 8; i++) top[i] = extra[i] = total[i] = f8_zero();
    for (int i = 0; i < n; i++) {
      const float *head = q[(first + i) % GC], *scale = p.key_scale + (first + i) / GC * d, *low = p.key_min + (first + i) / GC * d;
      fw most = Wide::set(0.f), rest = Wide::set(0.f);
      for (int c = 0; c < d; c += FW) {
        const fw v = Wide::load(head + c), x = v * Wide::load(scale + c);
        Wide::store(scaled[i] + c, x);
        most = Wide::max(most, Wide::abs(x));
        rest = Wide::fma(v, Wide::load(low + c), rest);
      }
      top[i] = Wide::fold_max(most), extra[i] = Wide::fold_sum(rest);
    }
    const f8 largest = f8_max8(top) + f8_set(1e-30f);
    alignas(32) float inverse[8], unit[8], offset[8];
    f8_store(inverse, f8_set(round_range<BITS>()) / largest);
    f8_store(unit, largest * f8_set(1.f / round_range<BITS>()));
    for (int i = 0; i < n; i++) {
      i8v sum = _mm256_setzero_si256();
      const fw by = Wide::set(inverse[i]);
#pragma GCC unroll 4
      for (int c = 0; c < d; c += 16) sum = _mm256_add_epi32(sum, round16<BITS>(scaled[i], [=](int) { return by; }, c, out + i));
      total[i] = f8_fma(_mm256_cvtepi32_ps(sum), f8_set(-unit[i] * mid), extra[i]);
    }
    f8_store(offset, f8_sum8(total));
    for (int i = 0; i < n; i++) out[i].unit = unit[i], out[i].offset = offset[i];
  }
}

// FlexGen: the query itself, with the sums of every group of channels
template <int BITS>
static void round_by_token(const Layout& l, const float* query, RoundedQuery* out) {
  const float mid = ((1 << BITS) - 1) * 0.5f;
  alignas(64) float q[256];
  order_row<BITS>(query, l.head_size, q);
  f8 top = f8_zero();
  for (int c = 0; c < l.head_size; c += 8) top = f8_max(top, f8_abs(f8_load(q + c)));
  const float largest = f8_hmax(top) + 1e-30f;
  const fw by = Wide::set(round_range<BITS>() / largest);
  out->unit = largest / round_range<BITS>();
  for (int g = 0; g < l.head_size / l.group; g++) {
    i8v sum = _mm256_setzero_si256();
    f8 exact = f8_zero();
    for (int c = g * l.group; c < (g + 1) * l.group; c += 8) exact = exact + f8_load(q + c);
    for (int c = g * l.group; c < (g + 1) * l.group; c += 16)
      sum = _mm256_add_epi32(sum, round16<BITS>(q, [=](int) { return by; }, c, out));
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
        f8_store(score + g * SCORES + 8 * o,
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
    for (int o = 0; o < NV; o++) f8_store(score + g * SCORES + 8 * o, sum[g][o]);
}

// vectors of accumulators a query head may have: as many as registers hold
constexpr int code_vectors(int heads) { return FW == 16 ? (heads <= 3 ? 4 : 2) : heads <= 2 ? 4 : 2; }

template <int BITS, int GC>
static void score_codes(const Layout& l, const PageScales& p, const uint8_t* run, int count, const float* query,
                        float* score, Fetch* fetch) {
  enum { NV = code_vectors(GC) };
  const int d = l.head_size, span_bytes = d * BITS * 4;
  RoundedQuery rq[MAX_ROUNDED * GC];
  const int groups = (count + l.group - 1) / l.group;
  if (l.keys_per_channel && BITS > 2) round_by_bound<BITS, GC>(l, p, query, groups, rq);
  else if (l.keys_per_channel) round_by_group<BITS, GC>(l, p, query, groups, rq);
  else for (int g = 0; g < GC; g++) round_by_token<BITS>(l, query + g * d, rq + g);
  for (int t = 0; t < count; t += 32) {
    const RoundedQuery* now = rq + (l.keys_per_channel ? t / l.group * GC : 0);
#pragma GCC unroll 2
    for (int v = 0; v < 4; v += NV, fetch->step())
      score_vectors<BITS, GC, NV>(l, p, run + l.key + t / 32 * span_bytes, t + 8 * v, v, now, score + t + 8 * v);
  }
}

struct RoundedWeights {  // one query head, one group of channels, one page
  alignas(32) uint8_t w8[MAX_PAGE];
  alignas(32) float unit[MAX_PAGE / 32 + 8];  // value of one step, a span of 32 tokens each
  float offset;                               // sum of p_t m_t
};

// one group of channels of a page, for GC query heads; each step for all of them, as in `round_by_group`
template <int GC>
static void round_page_weights(const float* score, const float* scale, const float* low, int spans, RoundedWeights* out) {
  alignas(64) float w[GC][8 * 32 + 16];
  alignas(32) float inverse[GC][8];
  fw rest[GC];
  f8 top[GC][8];
  for (int g = 0; g < GC; g++) rest[g] = Wide::set(0.f);
  for (int s = 0; s < spans; s += 8, score += 256, scale += 256, low += 256) {
    const int n = min_int(8, spans - s);
    for (int i = 0; i < 8; i++) {
      fw most[GC];
      for (int g = 0; g < GC; g++) most[g] = Wide::set(0.f);
      for (int t = i * 32; t < min_int(i + 1, n) * 32; t += FW) {
        const fw by = Wide::load(scale + t), minimum = Wide::load(low + t);
#pragma GCC unroll 4
        for (int g = 0; g < GC; g++) {
          const fw weight = Wide::load(score + g * SCORES + t), x = weight * by;
          Wide::store(w[g] + t, x);
          most[g] = Wide::max(most[g], x);
          rest[g] = Wide::fma(weight, minimum, rest[g]);
        }
      }
      for (int g = 0; g < GC; g++) top[g][i] = Wide::fold_max(most[g]);
    }
    for (int g = 0; g < GC; g++) {
      const f8 largest = f8_max8(top[g]) + f8_set(1e-30f);
      f8_store(inverse[g], f8_set(255.f) / largest);
      f8_store(out[g].unit + s, largest * f8_set(1.f / 255.f));
    }
    for (int i = 0; i < n; i++)
      for (int g = 0; g < GC; g++) round_weights(w[g] + i * 32, inverse[g][i], out[g].w8 + (s + i) * 32);
  }
  for (int g = 0; g < GC; g++) out[g].offset = Wide::sum(rest[g]);
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
  enum { OC = code_vectors(GC) };
  const int d = l.head_size, n = l.page_tokens, spans = (count + 31) / 32;
  const int64_t octet_bytes = int64_t(n) * BITS;
  RoundedWeights rw[GC];
  for (int group = 0; group < d / l.group; group++) {
    round_page_weights<GC>(score, p.value_scale + group * n, p.value_min + group * n, spans, rw);
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
  alignas(32) float score[GC * SCORES];
  const float* q = query + head * d;
  if (l.k_bits == 2) score_codes<2, GC>(l, p, run, count, q, score, fetch);
  else if (l.k_bits == 3) score_codes<3, GC>(l, p, run, count, q, score, fetch);
  else score_codes<4, GC>(l, p, run, count, q, score, fetch);
  softmax_rows<GC>(s, head, d, score, SCORES, count);
  for (int g = 0; g < GC; g++) {
    for (int t = (count + 7) & ~7; t < ((count + 31) & ~31); t++) score[g * SCORES + t] = 0.f;
  }
  if (l.v_bits == 2) mix_codes<2, GC>(l, p, run, count, score, s->out + head * d, fetch);
  else if (l.v_bits == 3) mix_codes<3, GC>(l, p, run, count, score, s->out + head * d, fetch);
  else mix_codes<4, GC>(l, p, run, count, score, s->out + head * d, fetch);
}

static bool has_integer_dot(const Layout& l) {
  return l.kind == Kind::affine && l.k_bits != 8 && l.v_bits != 8 && l.page_tokens <= MAX_PAGE &&
         l.page_tokens % 32 == 0 && (!l.keys_per_channel || l.group % 32 == 0);
}

static void decode_codes(const Layout& l, const uint8_t* run, int count, const Query& q, Softmax* s, Fetch* fetch) {
  const int spans = (count + 31) / 32, blocks = (q.heads + 3) / 4, vectors = code_vectors(min_int(4, q.heads));
  fetch->spread(blocks * spans * (4 + l.head_size / 8) / vectors);  // or somewhat fewer
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
