// Depthwise causal convolution with a state, then SiLU if asked for. Lanes are channels.
#pragma once

enum { MAX_WIDTH = 8 };

// WIDTH is the convolution's where it is known at compile time, else 0
template <int WIDTH>
static void conv_channels(const Conv& call, int seq, int first) {
  const Batch& batch = call.batch;
  const int n = at_most(LANES, call.channels - first), tail = (WIDTH ? WIDTH : call.width) - 1;
  const States& states = call.states;
  char* state = batch.slots[seq] < 0 ? nullptr : slot(states, batch.slots[seq]);
  Vec weight[WIDTH ? WIDTH : MAX_WIDTH] = {}, seen[WIDTH ? WIDTH : MAX_WIDTH] = {};
  for (int k = 0; k <= tail; k++)
    for (int j = 0; j < n; j++) weight[k][j] = call.weight[int64_t(first + j) * call.width + k];
  const Vec bias = call.bias ? load(call.bias + first, n) : Vec{};
  if (state && batch.has_state[seq])
    for (int k = 0; k < tail; k++)
      for (int j = 0; j < n; j++)
        seen[k][j] = get(state, k * states.row + (first + j) * states.item, states.dtype);
  for (int64_t t = batch.query_start[seq]; t < batch.query_start[seq + 1]; t++) {
    seen[tail] = load(row(call.x, t), first, call.x.dtype, n);
    Vec sum = bias;
    for (int k = 0; k <= tail; k++) sum += weight[k] * seen[k];
    store((char*)row(call.out, t), first, call.out.dtype, n, call.activate ? silu(sum) : sum);
    for (int k = 0; k < tail; k++) seen[k] = seen[k + 1];
  }
  if (state)
    for (int k = 0; k < tail; k++)
      for (int j = 0; j < n; j++)
        put(state, k * states.row + (first + j) * states.item, states.dtype, seen[k][j]);
}

static void causal_conv(const Conv& call, int threads) {
  const int blocks = (call.channels + LANES - 1) / LANES;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int block = 0; block < blocks; block++) {
      if (call.width == 4) conv_channels<4>(call, seq, block * LANES);
      else conv_channels<0>(call, seq, block * LANES);
    }
}
