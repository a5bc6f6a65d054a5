// Depthwise causal convolution with a state, then SiLU if asked for. Lanes are channels; a thread
// takes some of them and goes through the tokens row by row, for rows lie far apart.
#pragma once

enum { MAX_WIDTH = 8 };

// TILE vectors of channels; WIDTH is the convolution's where it is known at compile time, else 0
template <int WIDTH, int TILE>
struct ConvTile {
  enum { ROOM = WIDTH ? WIDTH : MAX_WIDTH, AHEAD = 2 };
  const Conv& call;
  const int first, channels, blocks, tail;  // tail: tokens before one that it needs
  Vec weight[TILE][ROOM] = {}, bias[TILE] = {};

  ConvTile(const Conv& call, int first, int channels)
      : call(call), first(first), channels(channels), blocks((channels + LANES - 1) / LANES),
        tail((WIDTH ? WIDTH : call.width) - 1) {
    for (int j = 0; j < channels; j++) {
      for (int k = 0; k <= tail; k++)
        weight[j / LANES][k][j % LANES] = call.weight[int64_t(first + j) * call.width + k];
      if (call.bias) bias[j / LANES][j % LANES] = call.bias[first + j];
    }
  }

  int of_block(int i) const { return at_most(LANES, channels - i * LANES); }

  // token k of a state to or from the lanes of block i
  void read(const char* state, int i, int k, Vec& seen) const {
    const int64_t at = k * call.states.row + (first + i * LANES) * call.states.item;
    if (call.states.item == 1) seen = load(state, at, call.states.dtype, of_block(i));
    else
      for (int j = 0; j < of_block(i); j++) seen[j] = get(state, at + j * call.states.item, call.states.dtype);
  }
  void write(char* state, int i, int k, Vec seen) const {
    const int64_t at = k * call.states.row + (first + i * LANES) * call.states.item;
    if (call.states.item == 1) store(state, at, call.states.dtype, of_block(i), seen);
    else
      for (int j = 0; j < of_block(i); j++) put(state, at + j * call.states.item, call.states.dtype, seen[j]);
  }

  void run(int seq) const {
    const Batch& batch = call.batch;
    char* state = batch.slots[seq] < 0 ? nullptr : slot(call.states, batch.slots[seq]);
    Vec seen[TILE][ROOM] = {};
    for (int i = 0; state && batch.has_state[seq] && i < blocks; i++)
      for (int k = 0; k < tail; k++) read(state, i, k, seen[i][k]);
    const Rows* const ahead[] = {&call.x, &call.out};
    const int64_t end = batch.query_start[seq + 1];
    for (int64_t t = batch.query_start[seq]; t < end; t++)
      for (int i = 0; i < blocks; i++) {
        const int from = first + i * LANES, n = of_block(i);
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
    for (int i = 0; state && i < blocks; i++)
      for (int k = 0; k < tail; k++) write(state, i, k, seen[i][k]);
  }
};

// Requests go in groups, so that weights are turned once for many that decode; there are as many
// groups as give every thread some tiles.
template <int WIDTH>
static void conv_tiles(const Conv& call, int threads) {
  enum { TILE = 8, AT_ONCE = TILE * LANES };
  const int seqs = call.batch.num_seqs, tiles = (call.channels + AT_ONCE - 1) / AT_ONCE;
  const int groups = at_most(seqs, (4 * threads + tiles - 1) / tiles);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int group = 0; group < groups; group++)
    for (int tile = 0; tile < tiles; tile++) {
      const ConvTile<WIDTH, TILE> channels(call, tile * AT_ONCE, at_most(AT_ONCE, call.channels - tile * AT_ONCE));
      for (int64_t seq = int64_t(seqs) * group / groups; seq < int64_t(seqs) * (group + 1) / groups; seq++)
        channels.run(int(seq));
    }
}

static void causal_conv(const Conv& call, int threads) {
  if (call.width == 4) conv_tiles<4>(call, threads);
  else conv_tiles<0>(call, threads);
}
