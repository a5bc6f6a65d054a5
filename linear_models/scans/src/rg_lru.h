// The gated linear recurrence of Griffin (arXiv 2402.19427). Lanes are channels; a thread takes
// some of them and goes through the tokens row by row, with the states in the first cache.
#pragma once

enum { CHANNELS = 256 };  // of a thread at once

// e^(x y) for x y <= 0, and 1 - e^(2 x y); where they are near one and zero, that is no difference of
// almost equal numbers
SCAN_INLINE Vec shrink(Vec x, Vec y, Vec& rest) {
#if defined(__AVX512F__)
  x *= LOG2E;
  const float round = 393216.f;  // as in `decay`, but for a third item of the series
  const Vec m = x * y + round, n = m - round, r = x * y - n;
  const Vec power = bits<Vec>(_mm512_permutex2var_epi32(
      _mm512_loadu_si512(POWERS), bits<__m512i>(m), _mm512_loadu_si512(POWERS + 16)));
  const Vec p = r * (r * (r * (LN2 * LN2 * LN2 / 6) + LN2 * LN2 / 2) + LN2);
  const Vec a = bits<Vec>(_mm512_scalef_ps(bits<__m512>(power * p + power), bits<__m512>(n)));
#else
  const float round = 12582912.f;
  const Vec z = at_least(-87.f, x * y);
  const Vec whole = z * LOG2E + round, n = whole - round;  // its last bits hold n
  const Vec r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = (p * r + 1.f) * r;
  const Vec a = bits<Vec>(bits<IntVec>(p + 1.f) + (bits<IntVec>(whole) << 23));
#endif
  rest = n == 0.f ? -p * (2.f + p) : 1.f - a * a;
  return a;
}

// one token of n channels from item i on; FLOATS: all rows are float32
template <bool FLOATS>
SCAN_INLINE void gate(const RgLru& call, int64_t t, int i, int n, bool starts, Vec& h) {
  const auto dtype = [](const Rows& rows) { return FLOATS ? Dtype::f32 : rows.dtype; };
  const auto item = [&](const Rows& rows) { return load(row(rows, t), i, dtype(rows), n); };
  // two sigmoids with one division; beyond 43 they are almost zero or one
  const Vec y = 1.f + falling(item(call.input_gate), 43.f), z = 1.f + falling(item(call.gate), 43.f);
  const Vec both = inverse(y * z);
  Vec rest, u = item(call.x) * (both * z);
  const Vec a = shrink(load(call.rate + i, n), both * y, rest);
  if (!starts) u *= root(rest);
  h = a * h + u;
  store((char*)row(call.out, t), i, dtype(call.out), n, h);
}

template <bool FLOATS>
static void rg_lru_channels(const RgLru& call, int seq, int first, int channels) {
  const Batch& batch = call.batch;
  char* state = batch.slots[seq] < 0 ? nullptr : slot(call.states, batch.slots[seq]);
  const Dtype dtype = call.states.dtype;
  const bool has_state = state && batch.has_state[seq];
  Vec h[CHANNELS / LANES];
  for (int j = 0; j < channels; j += LANES)
    h[j / LANES] = has_state ? load(state, first + j, dtype, at_most(LANES, channels - j)) : Vec{};
  const int64_t begin = batch.query_start[seq], end = batch.query_start[seq + 1];
  const int whole = channels / LANES;
  for (int64_t t = begin; t < end; t++) {
    const bool starts = t == begin && !has_state;  // its input is not scaled
    for (int j = 0; j < whole; j++) gate<FLOATS>(call, t, first + j * LANES, LANES, starts, h[j]);
    if (const int n = channels - whole * LANES)
      gate<FLOATS>(call, t, first + whole * LANES, n, starts, h[whole]);
  }
  for (int j = 0; state && j < channels; j += LANES)
    store(state, first + j, dtype, at_most(LANES, channels - j), h[j / LANES]);
}

static void rg_lru(const RgLru& call, int threads) {
  const int blocks = (call.channels + CHANNELS - 1) / CHANNELS;
  const bool floats = call.x.dtype == Dtype::f32 && call.input_gate.dtype == Dtype::f32 &&
                      call.gate.dtype == Dtype::f32 && call.out.dtype == Dtype::f32;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int block = 0; block < blocks; block++) {
      const int first = block * CHANNELS, channels = at_most(CHANNELS, call.channels - first);
      if (floats) rg_lru_channels<true>(call, seq, first, channels);
      else rg_lru_channels<false>(call, seq, first, channels);
    }
}
