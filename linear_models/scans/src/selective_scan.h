// Mamba 1 (arXiv 2312.00752). Lanes are channels: one has `size` states.
#pragma once

enum { MAX_SIZE = 256 };
// the longest step of a decay, whose polynomial squares what rounding leaves of its products
const float FINITE = 1e15f;

// Tokens row by row, TILE vectors of channels each, whose states stay in the first cache: rows lie
// far apart. SIZE is that of the states where it is known at compile time, else 0.
template <int SIZE, int TILE>
static void scan_channels(const SelectiveScan& call, int seq, int first, int channels) {
  enum { ROOM = SIZE ? SIZE : MAX_SIZE, SUMS = 4, AHEAD = 2 };
  const Batch& batch = call.batch;
  const int size = SIZE ? SIZE : call.size, blocks = (channels + LANES - 1) / LANES;
  const States& states = call.states;
  char* state = batch.slots[seq] < 0 ? nullptr : slot(states, batch.slots[seq]);
  const bool has_state = state && batch.has_state[seq];
  Vec h[TILE][ROOM], a[TILE][ROOM], d[TILE], bias[TILE];
  for (int i = 0; i < blocks; i++) {
    const int from = first + i * LANES, n = at_most(LANES, channels - i * LANES);
    for (int k = 0; k < size; k++) {
      h[i][k] = a[i][k] = Vec{};
      for (int j = 0; j < n; j++) {
        a[i][k][j] = call.a[int64_t(from + j) * size + k] * LOG2E;
        if (has_state) h[i][k][j] = get(state, (from + j) * states.row + k, states.dtype);
      }
    }
    d[i] = load(call.d + from, n);
    bias[i] = call.bias ? load(call.bias + from, n) : Vec{};
  }
  const Rows* const ahead[] = {&call.x, &call.dt, &call.gate, &call.out};
  const int64_t end = batch.query_start[seq + 1];
  for (int64_t t = batch.query_start[seq]; t < end; t++) {
    const float* b = (const float*)row(call.b, t);
    const float* c = (const float*)row(call.c, t);
    Vec dt[TILE], dx[TILE], y[TILE];
    // loops of their own, so that no vector's decays wait for the long way to its step
    for (int i = 0; i < blocks; i++) {
      const int from = first + i * LANES, n = at_most(LANES, channels - i * LANES);
      for (const Rows* rows : ahead)
        if (rows->data && t + AHEAD < end)
          __builtin_prefetch(row(*rows, t + AHEAD) + int64_t(from) * bytes_of(rows->dtype));
      const Vec x = load(row(call.x, t), from, call.x.dtype, n);
      const Vec step = softplus(load(row(call.dt, t), from, call.dt.dtype, n) + bias[i]);
      dt[i] = at_most(FINITE, step);
      dx[i] = step * x;
      y[i] = d[i] * x;
    }
    for (int i = 0; i < blocks; i++) {
      Vec sums[SUMS] = {y[i]};  // several, so that none waits for the one before
#pragma GCC unroll 16
      for (int k = 0; k < size; k++) {
        h[i][k] = decay(dt[i], a[i][k]) * h[i][k] + dx[i] * b[k];
        sums[k % SUMS] += h[i][k] * c[k];
      }
      y[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    for (int i = 0; i < blocks; i++) {
      const int from = first + i * LANES, n = at_most(LANES, channels - i * LANES);
      if (call.gate.data) y[i] *= silu(load(row(call.gate, t), from, call.gate.dtype, n));
      store((char*)row(call.out, t), from, call.out.dtype, n, y[i]);
    }
  }
  if (!state) return;
  for (int j = 0; j < channels; j++)
    for (int k = 0; k < size; k++)
      put(state, (first + j) * states.row + k, states.dtype, h[j / LANES][k][j % LANES]);
}

// One token of a request with a state: lanes are the states of a channel, as they lie in memory.
static void step_channels(const SelectiveScan& call, int seq, int first) {
  const Batch& batch = call.batch;
  const int n = at_most(LANES, call.channels - first);
  const int64_t t = batch.query_start[seq];
  const float* b = (const float*)row(call.b, t);
  const float* c = (const float*)row(call.c, t);
  char* state = slot(call.states, batch.slots[seq]);
  const Vec x = load(row(call.x, t), first, call.x.dtype, n);
  const Vec bias = call.bias ? load(call.bias + first, n) : Vec{};
  const Vec dt = softplus(load(row(call.dt, t), first, call.dt.dtype, n) + bias), dx = dt * x;
  const Vec finite = at_most(FINITE, dt);
  Vec y = {};
  for (int j = 0; j < n; j++) {
    const int64_t at = (first + j) * call.states.row;
    const float* a = call.a + int64_t(first + j) * call.size;
    Vec products = {};
    for (int k = 0; k < call.size; k += LANES) {
      const int m = at_most(LANES, call.size - k);
      Vec h = load(state, at + k, call.states.dtype, m);
      h = decay(all(finite[j]), load(a + k, m) * LOG2E) * h + dx[j] * load(b + k, m);
      store(state, at + k, call.states.dtype, m, h);
      products += h * load(c + k, m);
    }
    y[j] = sum(products);
  }
  y += load(call.d + first, n) * x;
  if (call.gate.data) y *= silu(load(row(call.gate, t), first, call.gate.dtype, n));
  store((char*)row(call.out, t), first, call.out.dtype, n, y);
}

template <int SIZE, int TILE>
static void scan_tiles(const SelectiveScan& call, int threads) {
  const int tiles = (call.channels + TILE * LANES - 1) / (TILE * LANES);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int tile = 0; tile < tiles; tile++) {
      const int first = tile * TILE * LANES, channels = at_most(TILE * LANES, call.channels - first);
      const int tokens = call.batch.query_start[seq + 1] - call.batch.query_start[seq];
      if (tokens > 1 || call.batch.slots[seq] < 0 || !call.batch.has_state[seq])
        scan_channels<SIZE, TILE>(call, seq, first, channels);
      else
        for (int i = 0; i < channels; i += LANES) step_channels(call, seq, first + i);
    }
}

static void selective_scan(const SelectiveScan& call, int threads) {
  if (call.size == 16) scan_tiles<16, 8>(call, threads);  // 16 KiB of states and rates
  else scan_tiles<0, 1>(call, threads);
}
