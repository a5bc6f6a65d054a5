// Depthwise causal convolution with a state, then SiLU if asked for. Lanes are channels; a thread
// takes some of them and goes through the tokens row by row, for rows lie far apart.
#pragma once

enum { MAX_WIDTH = 8 };

// TILE vectors of channels; WIDTH is the convolution's where it is known at compile time, else 0
template <int WIDTH, int TILE>
static void conv_channels(const Conv& call, int seq, int first, int channels) {
  enum { ROOM = WIDTH ? WIDTH : MAX_WIDTH, AHEAD = 2 };
  const Batch& batch = call.batch;
  const int tail = (WIDTH ? WIDTH : call.width) - 1, blocks = (channels + LANES - 1) / LANES;
  const States& states = call.states;
  char* state = batch.slots[seq] < 0 ? nullptr : slot(states, batch.slots[seq]);
  Vec weight[TILE][ROOM] = {}, seen[TILE][ROOM] = {}, bias[TILE] = {};
  for (int j = 0; j < channels; j++) {
    const int i = j / LANES, lane = j % LANES;
    for (int k = 0; k <= tail; k++)
      weight[i][k][lane] = call.weight[int64_t(first + j) * call.width + k];
    if (call.bias) bias[i][lane] = call.bias[first + j];
    if (state && batch.has_state[seq])
      for (int k = 0; k < tail; k++)
        seen[i][k][lane] = get(state, k * states.row + (first + j) * states.item, states.dtype);
  }
  const Rows* const ahead[] = {&call.x, &call.out};
  const int64_t end = batch.query_start[seq + 1];
  for (int64_t t = batch.query_start[seq]; t < end; t++)
    for (int i = 0; i < blocks; i++) {
      const int from = first + i * LANES, n = at_most(LANES, channels - i * LANES);
      for (const Rows* rows : ahead)
        if (t + AHEAD < end)
          __builtin_prefetch(row(*rows, t + AHEAD) + int64_t(from) * bytes_of(rows->dtype));
      Vec sum = bias[i];
      for (int k = 0; k < tail; k++) sum += weight[i][k] * seen[i][k];
      for (int k = 0; k + 1 < tail; k++) seen[i][k] = seen[i][k + 1];
      const Vec x = load(row(call.x, t), from, call.x.dtype, n);
      if (tail) seen[i][tail - 1] = x;
      sum += weight[i][tail] * x;
      store((char*)row(call.out, t), from, call.out.dtype, n, call.activate ? silu(sum) : sum);
    }
  for (int j = 0; state && j < channels; j++)
    for (int k = 0; k < tail; k++)
      put(state, k * states.row + (first + j) * states.item, states.dtype,
          seen[j / LANES][k][j % LANES]);
}

static void causal_conv(const Conv& call, int threads) {
  enum { TILE = 8, CHANNELS_AT_ONCE = TILE * LANES };
  const int tiles = (call.channels + CHANNELS_AT_ONCE - 1) / CHANNELS_AT_ONCE;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int tile = 0; tile < tiles; tile++) {
      const int first = tile * CHANNELS_AT_ONCE;
      const int channels = at_most(CHANNELS_AT_ONCE, call.channels - first);
      if (call.width == 4) conv_channels<4, TILE>(call, seq, first, channels);
      else conv_channels<0, TILE>(call, seq, first, channels);
    }
}
