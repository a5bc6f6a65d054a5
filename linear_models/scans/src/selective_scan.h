// Mamba 1 (arXiv 2312.00752). Lanes are channels: one has `size` states, which stay in registers
// or the first cache over the tokens of a request.
#pragma once

enum { MAX_SIZE = 256 };
const float FINITE = 1e15f;  // no step is longer: decays of its square would be no floats

// SIZE is that of the states where it is known at compile time, else 0
template <int SIZE>
static void scan_channels(const SelectiveScan& call, int seq, int first) {
  enum { ROOM = SIZE ? SIZE : MAX_SIZE, SUMS = 4 };
  const Batch& batch = call.batch;
  const int n = at_most(LANES, call.channels - first), size = SIZE ? SIZE : call.size;
  const States& states = call.states;
  char* state = batch.slots[seq] < 0 ? nullptr : slot(states, batch.slots[seq]);
  const bool has_state = state && batch.has_state[seq];
  Vec h[ROOM], a[ROOM];
  for (int k = 0; k < size; k++) {
    h[k] = a[k] = Vec{};
    for (int j = 0; j < n; j++) {
      a[k][j] = call.a[int64_t(first + j) * size + k] * LOG2E;
      if (has_state) h[k][j] = get(state, (first + j) * states.row + k, states.dtype);
    }
  }
  const Vec d = load(call.d + first, n), bias = call.bias ? load(call.bias + first, n) : Vec{};
  for (int64_t t = batch.query_start[seq]; t < batch.query_start[seq + 1]; t++) {
    const float* b = (const float*)row(call.b, t);
    const float* c = (const float*)row(call.c, t);
    const Vec x = load(row(call.x, t), first, call.x.dtype, n);
    const Vec dt = softplus(load(row(call.dt, t), first, call.dt.dtype, n) + bias), dx = dt * x;
    const Vec finite = most(FINITE, dt);
    Vec y[SUMS] = {d * x};  // several, so that none waits for the one before
#pragma GCC unroll 16
    for (int k = 0; k < size; k++) {
      h[k] = decay(finite, a[k]) * h[k] + dx * b[k];
      y[k % SUMS] += h[k] * c[k];
    }
    Vec all = (y[0] + y[1]) + (y[2] + y[3]);
    if (call.gate.data) all *= silu(load(row(call.gate, t), first, call.gate.dtype, n));
    store((char*)row(call.out, t), first, call.out.dtype, n, all);
  }
  if (!state) return;
  for (int j = 0; j < n; j++)
    for (int k = 0; k < size; k++) put(state, (first + j) * states.row + k, states.dtype, h[k][j]);
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
  const Vec finite = most(FINITE, dt);
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

static void selective_scan(const SelectiveScan& call, int threads) {
  const int blocks = (call.channels + LANES - 1) / LANES;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int block = 0; block < blocks; block++) {
      const int tokens = call.batch.query_start[seq + 1] - call.batch.query_start[seq];
      if (tokens == 1 && call.batch.slots[seq] >= 0 && call.batch.has_state[seq])
        step_channels(call, seq, block * LANES);
      else if (call.size == 16) scan_channels<16>(call, seq, block * LANES);
      else scan_channels<0>(call, seq, block * LANES);
    }
}
