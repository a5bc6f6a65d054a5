// The gated linear recurrence of Griffin (arXiv 2402.19427). Lanes are channels; a thread takes
// some of them and goes through the tokens row by row, with the states in the first cache.
#pragma once

enum { CHANNELS = 256 };  // of a thread at once

static void rg_lru_channels(const RgLru& call, int seq, int first, int channels) {
  const Batch& batch = call.batch;
  char* state = batch.slots[seq] < 0 ? nullptr : slot(call.states, batch.slots[seq]);
  const Dtype dtype = call.states.dtype;
  const bool has_state = state && batch.has_state[seq];
  Vec h[CHANNELS / LANES];
  for (int j = 0; j < channels; j += LANES)
    h[j / LANES] = has_state ? load(state, first + j, dtype, at_most(LANES, channels - j)) : Vec{};
  const int64_t begin = batch.query_start[seq], end = batch.query_start[seq + 1];
  for (int64_t t = begin; t < end; t++) {
    const char *x = row(call.x, t), *in = row(call.input_gate, t), *keep = row(call.gate, t);
    char* out = (char*)row(call.out, t);
    const bool starts = t == begin && !has_state;  // its input is not scaled
    for (int j = 0; j < channels; j += LANES) {
      const int n = at_most(LANES, channels - j), i = first + j;
      const Vec rate = load(call.rate + i, n);
      const Vec a = exp(rate * sigmoid(load(keep, i, call.gate.dtype, n)));
      Vec u = load(x, i, call.x.dtype, n) * sigmoid(load(in, i, call.input_gate.dtype, n));
      if (!starts) u *= root(1.f - a * a);
      h[j / LANES] = a * h[j / LANES] + u;
      store(out, i, call.out.dtype, n, h[j / LANES]);
    }
  }
  for (int j = 0; state && j < channels; j += LANES)
    store(state, first + j, dtype, at_most(LANES, channels - j), h[j / LANES]);
}

static void rg_lru(const RgLru& call, int threads) {
  const int blocks = (call.channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int block = 0; block < blocks; block++) {
      const int first = block * CHANNELS;
      rg_lru_channels(call, seq, first, at_most(CHANNELS, call.channels - first));
    }
}
