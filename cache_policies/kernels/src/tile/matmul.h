// Small matrix products over rows of floats, or of pairs of bfloat16 (bf16.h).
#pragma once

#include "simd.h"

// What a matrix product multiplies: STEP neighbours of a row of A with a vector of B, a lane of
// which holds as many. bf16.h has another.
struct Float32 {
  typedef float Item;
  typedef fw Vec;
  enum { STEP = 1 };
  KV_INLINE fw load(const float* p) { return Wide::load(p); }
  KV_INLINE fw broadcast(const float* p) { return Wide::set(*p); }
  KV_INLINE fw fma(fw a, fw b, fw c) { return Wide::fma(a, b, c); }
};

// C[m][n] (+)= A[m][k STEP] B[k][n][STEP] for MR rows and NV wide vectors of columns
template <class P, int MR, int NV, bool ADD>
KV_INLINE void micro(int k, const typename P::Item* a, int lda, const typename P::Item* b, int ldb, float* c, int ldc) {
  fw acc[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) acc[i][j] = ADD ? Wide::load(c + i * ldc + j * FW) : Wide::set(0.f);
  for (int p = 0; p < k; p++) {
    typename P::Vec bv[NV];
    for (int j = 0; j < NV; j++) bv[j] = P::load(b + P::STEP * (int64_t(p) * ldb + j * FW));
    for (int i = 0; i < MR; i++) {
      const typename P::Vec av = P::broadcast(a + i * lda + P::STEP * p);
      for (int j = 0; j < NV; j++) acc[i][j] = P::fma(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) Wide::store(c + i * ldc + j * FW, acc[i][j]);
}

template <class P, int MR, bool ADD>
static void panel(int n, int k, const typename P::Item* a, int lda, const typename P::Item* b, int ldb, float* c, int ldc) {
  enum { NV = FW == 16 ? 4 : 2 };  // as many accumulators as registers hold
  int j = 0;
  for (; j + NV * FW <= n; j += NV * FW) micro<P, MR, NV, ADD>(k, a, lda, b + P::STEP * j, ldb, c + j, ldc);
  for (; j < n; j += FW) micro<P, MR, 1, ADD>(k, a, lda, b + P::STEP * j, ldb, c + j, ldc);
}

// n is a multiple of FW
template <class P, bool ADD>
static void matmul(int m, int n, int k, const typename P::Item* a, int lda, const typename P::Item* b, int ldb, float* c,
                   int ldc) {
  int i = 0;
  for (; i + 6 <= m; i += 6) panel<P, 6, ADD>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc);
  a += i * lda;
  c += i * ldc;
  switch (m - i) {
    case 5: panel<P, 5, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 4: panel<P, 4, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 3: panel<P, 3, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 2: panel<P, 2, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    case 1: panel<P, 1, ADD>(n, k, a, lda, b, ldb, c, ldc); break;
    default: break;
  }
}
