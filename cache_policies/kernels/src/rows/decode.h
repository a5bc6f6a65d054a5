// Decode: one query token, all query heads of a KV head, over pages as they are stored.
#pragma once

#include "rows/rows.h"
#include "tile/softmax.h"

// ---- rows: plain and int8 pages, ring, fresh tokens --------------------------------------

// eight tokens at a time, converted once for all query heads
template <Dtype T, int GC>
static void score_rows(const Rows& key, const float* query, int d, float* score) {
  alignas(32) float block[8 * 256];
  for (int t = 0; t < key.count; t += 8) {
    const char* row[8];
    for (int i = 0; i < 8; i++) row[i] = key.row[min_int(t + i, key.count - 1)];
    f8 first[8];
    for (int i = 0; i < 8; i++) first[i] = f8_zero();
    for (int c = 0; c < d; c += 8) {
      const f8 q = f8_load(query + c);
      for (int i = 0; i < 8; i++) {
        const f8 k = load8_as<T>(row[i], c);
        if (GC > 1) f8_store(block + c * 8 + i * 8, k);
        first[i] = f8_fma(q, k, first[i]);
      }
    }
    f8_store(score + t, f8_sum8(first));
    for (int g = 1; g < GC; g++) {
      f8 acc[8];
      for (int i = 0; i < 8; i++) acc[i] = f8_zero();
      for (int c = 0; c < d; c += 8) {
        const f8 q = f8_load(query + g * d + c);
        for (int i = 0; i < 8; i++) acc[i] = f8_fma(q, f8_load(block + c * 8 + i * 8), acc[i]);
      }
      f8_store(score + g * TILE + t, f8_sum8(acc));
    }
  }
}

// NV vectors of keys; octets: of the first
template <class L, Dtype T, int GC, int NV>
KV_INLINE void score_octet_block(const char* octets, const float* query, int d, float* score, Fetch* fetch) {
  const int64_t channel = 8 * item_bytes(T), octet = d * channel;
  typename L::Vec acc[GC][NV];
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) acc[g][o] = L::set(0.f);
  for (int c = 0; c < d; c++) {
    fetch->step();
    typename L::Vec k[NV];
    for (int o = 0; o < NV; o++) k[o] = load_octets<L, T>(octets + o * (L::N / 8) * octet + c * channel, octet);
    for (int g = 0; g < GC; g++) {
      const typename L::Vec q = L::set(query[g * d + c]);
      for (int o = 0; o < NV; o++) acc[g][o] = L::fma(q, k[o], acc[g][o]);
    }
  }
  for (int g = 0; g < GC; g++)
    for (int o = 0; o < NV; o++) L::store(score + g * TILE + L::N * o, acc[g][o]);
}

// vectors of accumulators a query head may have: as many as registers hold
template <int GC>
constexpr int row_vectors() { return FW == 16 ? 4 : GC == 4 ? 2 : 4; }

template <Dtype T, int GC>
static void score_octets(const KvRows& rows, const float* query, int d, float* score, Fetch* fetch) {
  enum { NV = row_vectors<GC>() };
  const int64_t octet = int64_t(d) * 8 * item_bytes(T);
  int t = 0;
  for (; t + FW * NV <= rows.key.count; t += FW * NV)
    score_octet_block<Wide, T, GC, NV>(rows.octets + t / 8 * octet, query, d, score + t, fetch);
  for (; t < rows.key.count; t += 8)
    score_octet_block<Lanes8, T, GC, 1>(rows.octets + t / 8 * octet, query, d, score + t, fetch);
  if (!rows.key.scale) return;
  for (int i = 0; i < rows.key.count; i += 8)
    for (int g = 0; g < GC; g++)
      f8_store(score + g * TILE + i, f8_load(score + g * TILE + i) * f8_load_f16(rows.key.scale + i));
}

template <Dtype T, int GC, int NV>
KV_INLINE void mix_columns(const Rows& value, const float* weight, int d, int c, float* out, Fetch* fetch) {
  fw acc[GC][NV];
  for (int g = 0; g < GC; g++)
    for (int j = 0; j < NV; j++) acc[g][j] = Wide::load(out + g * d + c + FW * j);
  for (int t = 0; t < value.count; t++) {
    const char* row = value.row[t];
    fetch->step();
    fw v[NV];
    for (int j = 0; j < NV; j++) v[j] = load_as<Wide, T>(row, c + FW * j);
    for (int g = 0; g < GC; g++) {
      const fw w = Wide::set(weight[g * TILE + t]);
      for (int j = 0; j < NV; j++) acc[g][j] = Wide::fma(w, v[j], acc[g][j]);
    }
  }
  for (int g = 0; g < GC; g++)
    for (int j = 0; j < NV; j++) Wide::store(out + g * d + c + FW * j, acc[g][j]);
}

template <Dtype T, int GC>
static void mix_rows(const Rows& value, float* weight, int d, float* out, Fetch* fetch) {
  enum { NV = GC == 1 ? 8 : row_vectors<GC>() };
  if (value.scale)
    for (int g = 0; g < GC; g++)
      for (int t = 0; t < value.count; t++) weight[g * TILE + t] *= f16_to_float(value.scale[t]);
  int c = 0;
  for (; c + FW * NV <= d; c += FW * NV) mix_columns<T, GC, NV>(value, weight, d, c, out, fetch);
  for (; c < d; c += 16) mix_columns<T, GC, 16 / FW>(value, weight, d, c, out, fetch);
}

template <Dtype T, int GC>
static void decode_rows_as(const KvRows& rows, const float* query, int d, int head, Softmax* s, Fetch* fetch) {
  alignas(32) float score[GC * TILE];
  if (rows.octets) score_octets<T, GC>(rows, query + head * d, d, score, fetch);
  else score_rows<T, GC>(rows.key, query + head * d, d, score);
  softmax_rows<GC>(s, head, d, score, TILE, rows.key.count);
  mix_rows<T, GC>(rows.value, score, d, s->out + head * d, fetch);
}

template <int GC>
static void decode_rows_group(const KvRows& rows, const float* query, int d, int head, Softmax* s, Fetch* fetch) {
  switch (rows.key.dtype) {
    case Dtype::f32: return decode_rows_as<Dtype::f32, GC>(rows, query, d, head, s, fetch);
    case Dtype::f16: return decode_rows_as<Dtype::f16, GC>(rows, query, d, head, s, fetch);
    case Dtype::bf16: return decode_rows_as<Dtype::bf16, GC>(rows, query, d, head, s, fetch);
    default: return decode_rows_as<Dtype::s8, GC>(rows, query, d, head, s, fetch);
  }
}

static void decode_rows(const KvRows& rows, const Query& q, int d, Softmax* s, Fetch* fetch) {
  const int steps = d * rows.key.count / (FW * row_vectors<4>()) + rows.key.count;  // or somewhat fewer
  fetch->spread(steps);
  for (int head = 0; head < q.heads;) {
    switch (min_int(4, q.heads - head)) {
      case 4: decode_rows_group<4>(rows, q.data, d, head, s, fetch); head += 4; break;
      case 3: decode_rows_group<3>(rows, q.data, d, head, s, fetch); head += 3; break;
      case 2: decode_rows_group<2>(rows, q.data, d, head, s, fetch); head += 2; break;
      default: decode_rows_group<1>(rows, q.data, d, head, s, fetch); head += 1; break;
    }
  }
}
