// Decode over packed 2 and 4 bit pages with integer dot products; needs 32-byte integers.
//
// Keys: q.k = sum_c q_c (code_c s_c + m_c). The vector q_c s_c (KIVI: per group of tokens;
// FlexGen: q_c, with s per token outside) is rounded to int16 for 4-bit codes (`madd`) and to
// int8 for 2-bit codes (`maddubs`). Codes are unsigned; counting them from their middle, whose
// share is taken exactly, leaves only the rounding error times (code - mid).
//
// Values: sum_t p_t (code_t s_t + m_t). The weights p_t s_t of 32 tokens are rounded to 8 bit
// unsigned against their largest; codes are shifted to be signed, the shift going exactly
// into the minimum.
#pragma once
#if defined(__AVX2__)

typedef __m256i i8v;
// Keeps a running sum in its register: GCC otherwise regroups the integer additions of an
// unrolled loop into a tree, and spills its leaves.
#define KV_KEEP(x) __asm__("" : "+x"(x))
KV_INLINE i8v iv_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
KV_INLINE i8v iv_broadcast4(const void* p) { int32_t x; memcpy(&x, p, 4); return _mm256_set1_epi32(x); }

// vector `v` (0..3) of a block of packed codes; see codecs/packing.py
template <int BITS>
KV_INLINE i8v iv_codes(const uint8_t* block, int v) {
  enum { PER_BYTE = 8 / BITS };
  const i8v x = iv_load(block + v / PER_BYTE * 32);
  return _mm256_and_si256(_mm256_srli_epi16(x, v % PER_BYTE * BITS), _mm256_set1_epi8((1 << BITS) - 1));
}

enum { MAX_GROUPS = 16, MAX_PAGE = 512, MAX_ROUNDED = MAX_PAGE / 32 };

// One query head, rounded, against one group of keys (KIVI) or all of a page (FlexGen).
struct RoundedQuery {
  alignas(32) int8_t q8[256];    // 2-bit keys
  alignas(32) int16_t q16[256];  // 4-bit keys; channels of a block of four in order 0 2 1 3
  float unit;                    // value of one step
  float offset;                  // KIVI: sum of q_c m_c, less the rounded channels' mid codes
  float lost[MAX_GROUPS], sum[MAX_GROUPS];  // FlexGen, per group: those mid codes; sum of q_c
};

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

KV_INLINE i8v pack16(__m256i a, __m256i b) {  // 16 int32 -> int16, in order
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0));
}

template <int BITS>
KV_INLINE void store_rounded(i8v packed, int c, RoundedQuery* out) {
  if (BITS == 4) {
    const i8v low = _mm256_shufflelo_epi16(packed, _MM_SHUFFLE(3, 1, 2, 0));
    _mm256_store_si256((__m256i*)(out->q16 + c), _mm256_shufflehi_epi16(low, _MM_SHUFFLE(3, 1, 2, 0)));
  } else {
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
    _mm_store_si128((__m128i*)(out->q8 + c), bytes);
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

template <int BITS>
KV_INLINE float round_range() { return BITS == 4 ? 32767.f : 127.f; }

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
  else dot_2bit<GC, NV>(span, v, from, to, rq, dot);
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

template <int BITS, int GC>
static void score_codes(const Layout& l, const PageScales& p, const uint8_t* run, int count, const float* query,
                        float* score, Fetch* fetch) {
  enum { NV = GC <= 2 ? 4 : 2 };  // as many accumulators as registers hold
  const int d = l.head_size, span_bytes = d * BITS * 4;
  RoundedQuery rq[MAX_ROUNDED * GC];
  for (int g = 0; g < GC; g++) {
    if (l.keys_per_channel) round_by_channel<BITS>(l, p, query + g * d, (count + l.group - 1) / l.group, GC, rq + g);
    else round_by_token<BITS>(l, query + g * d, rq + g);
  }
  for (int t = 0; t < count; t += 32) {
    fetch->step();
    const RoundedQuery* now = rq + (l.keys_per_channel ? t / l.group * GC : 0);
#pragma GCC unroll 2
    for (int v = 0; v < 4; v += NV)
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
                          float* out) {
  const i8v shift = _mm256_set1_epi8(1 << (BITS - 1)), one = _mm256_set1_epi16(1);
  f8 total[GC][OC];
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < OC; o++) total[g][o] = f8_load(out + g * d + 8 * o) + f8_set(rw[g].offset);
  for (int s = 0; s < spans; s++) {
    i8v part[GC][OC];
    for (int g = 0; g < GC; g++)
      for (int o = 0; o < OC; o++) part[g][o] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {  // at most 8 x 2 x 255 x 8: fits 16 bits
      i8v w[GC];
      for (int g = 0; g < GC; g++) w[g] = iv_broadcast4(rw[g].w8 + s * 32 + 4 * v);
      for (int o = 0; o < OC; o++) {
        const uint8_t* block = codes + o * octet_bytes + (s * 2 + v / 4) * (BITS / 2) * 32;
        const i8v x = _mm256_sub_epi8(iv_codes<BITS>(block, v % 4), shift);
        for (int g = 0; g < GC; g++) {
          part[g][o] = _mm256_add_epi16(part[g][o], _mm256_maddubs_epi16(w[g], x));
          KV_KEEP(part[g][o]);
        }
      }
    }
    for (int g = 0; g < GC; g++)
      for (int o = 0; o < OC; o++) {
        const f8 x = _mm256_cvtepi32_ps(_mm256_madd_epi16(part[g][o], one));
        total[g][o] = f8_fma(x, f8_set(rw[g].unit[s]), total[g][o]);
      }
  }
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < OC; o++) f8_store(out + g * d + 8 * o, total[g][o]);
}

// score: probabilities, zero from count to the next multiple of 32
template <int BITS, int GC>
static void mix_codes(const Layout& l, const PageScales& p, const uint8_t* run, int count, const float* score,
                      float* out, Fetch* fetch) {
  enum { OC = GC <= 2 ? 4 : 2 };
  const int d = l.head_size, n = l.page_tokens, spans = (count + 31) / 32;
  const int64_t octet_bytes = int64_t(n) * BITS;
  RoundedWeights rw[GC];
  for (int group = 0; group < d / l.group; group++) {
    for (int g = 0; g < GC; g++)
      round_page_weights(score + g * MAX_PAGE, p.value_scale + group * n, p.value_min + group * n, spans, &rw[g]);
    const int end = (group + 1) * l.group;
    int c = group * l.group;
    const uint8_t* codes = run + l.value;
    for (; c + 8 * OC <= end; c += 8 * OC, fetch->step())
      mix_octets<BITS, GC, OC>(codes + c / 8 * octet_bytes, octet_bytes, spans, rw, d, out + c);
    for (; c < end; c += 16) mix_octets<BITS, GC, 2>(codes + c / 8 * octet_bytes, octet_bytes, spans, rw, d, out + c);
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
  fetch->lines = int((fetch->end - fetch->at) / 64 / (l.page_tokens / 32 + l.head_size / 16)) + 1;
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
