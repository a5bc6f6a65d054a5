// Encoding tokens into rows: plain pages and int8 ones.
#pragma once

#include "rows/rows.h"

// where channel 0 of a key lies, in elements; its channels are 8 apart (see KvRows::octets)
KV_INLINE int64_t octet_start(int token, int d) { return int64_t(token / 8) * d * 8 + token % 8; }

// step: elements between two channels
static void encode_int8(int8_t* out, int step, uint16_t* scales, int token, int d, const float* x) {
  float top = 0.f;
  for (int c = 0; c < d; c++) top = max_float(top, fabsf(x[c]));
  const uint16_t bits = float_to_f16(clamp_f16(top / 127.f));
  const float scale = f16_to_float(bits), inverse = scale > 0.f ? 1.f / scale : 0.f;
  scales[token] = bits;
  for (int c = 0; c < d; c++) {
    const float code = rintf(x[c] * inverse);
    out[c * step] = int8_t(code > 127.f ? 127.f : code < -127.f ? -127.f : code);
  }
}

static void store_clamped(char* row, Dtype dtype, int n, float* x) {
  if (dtype == Dtype::f16)
    for (int c = 0; c < n; c++) x[c] = clamp_f16(x[c]);
  store_row(row, dtype, n, x);
}
