// The query of a task and its running softmax.
#pragma once

#include "simd.h"

// The query token of a decode task.
struct Query {
  const float* data;  // [heads, head_size], already multiplied by the softmax scale
  int heads;
};

// Running softmax of a set of query rows; out is the unnormalized sum. Scores are in units of
// log 2: queries carry a factor log2(e), so that 2^x serves as the exponential.
struct Softmax {
  float* top;   // [rows] largest score so far
  float* sum;   // [rows]
  float* out;   // [rows, head_size]
  float cap;    // of the scores; 0: none
};

// score -> cap tanh(score / cap); up to the next multiple of FW
KV_INLINE void soft_cap_row(float* score, int count, float cap) {
  const fw inverse = Wide::set(2.f * LOG2_E / cap), two_caps = Wide::set(2.f * cap);
  for (int t = 0; t < count; t += FW) {  // tanh(x) = 1 - 2 / (e^2x + 1)
    const fw power = fw_exp2(Wide::set(0.f) - Wide::max(Wide::set(-60.f), Wide::set(0.f) - Wide::load(score + t) * inverse));
    Wide::store(score + t, Wide::set(cap) - two_caps / (power + Wide::set(1.f)));
  }
}

static void softmax_begin(Softmax* s, int rows, int d) {
  for (int r = 0; r < rows; r++) s->top[r] = -1e30f, s->sum[r] = 0.f;
  memset(s->out, 0, sizeof(float) * size_t(rows) * d);
}

// The largest of a row's scores [count] and of those before; pads the row to a multiple of FW.
KV_INLINE float softmax_top(const Softmax* s, int row, float* score, int count) {
  const int padded = (count + FW - 1) / FW * FW;
  if (s->cap > 0.f) soft_cap_row(score, count, s->cap);
  for (int t = count; t < padded; t++) score[t] = -1e30f;
  fw even = Wide::load(score), odd = even;
  int t = FW;
  for (; t + FW < padded; t += 2 * FW) {
    even = Wide::max(even, Wide::load(score + t));
    odd = Wide::max(odd, Wide::load(score + t + FW));
  }
  if (t < padded) even = Wide::max(even, Wide::load(score + t));
  return max_float(s->top[row], Wide::hmax(Wide::max(even, odd)));
}

// scores [count] -> probabilities under the new maximum; earlier sums are rescaled.
// score[count .. next multiple of FW) is set to 0.
KV_INLINE void softmax_powers(Softmax* s, int row, int d, float now, float* score, int count) {
  const int padded = (count + FW - 1) / FW * FW;
  const float old = s->top[row];
  fw sum = Wide::set(0.f);
  for (int t = 0; t < padded; t += FW) {
    const fw p = fw_exp2(Wide::load(score + t) - Wide::set(now));
    Wide::store(score + t, p);
    sum = sum + p;
  }
  for (int t = count; t < padded; t++) score[t] = 0.f;
  if (now > old) {
    const float shrink = old > -1e29f ? exp2f(old - now) : 0.f;
    s->sum[row] *= shrink;
    s->top[row] = now;
    float* out = s->out + int64_t(row) * d;
    for (int c = 0; c < d; c += FW) Wide::store(out + c, Wide::load(out + c) * Wide::set(shrink));
  }
  s->sum[row] += Wide::sum(sum);
}

KV_INLINE void softmax_row(Softmax* s, int row, int d, float* score, int count) {
  softmax_powers(s, row, d, softmax_top(s, row, score, count), score, count);
}

// Rows from `first` on, `stride` floats apart. All maxima come first: each is a chain of its own,
// and powers wait for one.
template <int ROWS>
KV_INLINE void softmax_rows(Softmax* s, int first, int d, float* score, int stride, int count) {
  float now[ROWS];
  for (int r = 0; r < ROWS; r++) now[r] = softmax_top(s, first + r, score + r * stride, count);
  for (int r = 0; r < ROWS; r++) softmax_powers(s, first + r, d, now[r], score + r * stride, count);
}
