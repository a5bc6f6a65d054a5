// Products by AMX's matrix registers: 16 rows of 32 bfloat16 numbers times 32 rows of 16.

// GCC's tile loads do not say that they read memory: what is written before this stays before it.
KV_INLINE void written() { asm volatile("" ::: "memory"); }

// The layout of the registers, while this lives; then again that of before, which another library
// of this thread may count on.
struct MatrixRegisters {
  struct Config {
    uint8_t palette, start, zero[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  alignas(64) Config before;
  MatrixRegisters() {
    alignas(64) Config all = {};
    all.palette = 1;
    for (int i = 0; i < 8; i++) all.row_bytes[i] = 64, all.rows[i] = 16;
    asm volatile("sttilecfg %0" : "=m"(before));  // GCC's intrinsics name 8 bytes of the 64
    use(all);
  }
  MatrixRegisters(const MatrixRegisters&) = delete;
  ~MatrixRegisters() { use(before); }
  static void use(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
};

struct Operand {
  const uint16_t* part[2];
  int parts, stride;  // stride in items
};

// C[16 MT][16 NT] (+)= A B, with C in registers 0 to 3, A in 4 and 5, B in 6 and 7
template <int MT, int NT>
KV_INLINE void amx_load_a(const uint16_t* a, int stride) {
  _tile_loadd(4, a, 2 * stride);
  if (MT == 2) _tile_loadd(5, a + 16 * stride, 2 * stride);
}
template <int MT, int NT>
KV_INLINE void amx_load_b(const uint16_t* b, int stride) {
  _tile_loadd(6, b, 2 * stride);
  if (NT == 2) _tile_loadd(7, b + 32, 2 * stride);
}
template <int MT, int NT>
KV_INLINE void amx_product() {
  _tile_dpbf16ps(0, 4, 6);
  if (NT == 2) _tile_dpbf16ps(1, 4, 7);
  if (MT == 2) _tile_dpbf16ps(2, 5, 6);
  if (MT == 2 && NT == 2) _tile_dpbf16ps(3, 5, 7);
}

template <int MT, int NT, bool ADD>
static void amx_block(int k, const Operand& a, int64_t a_at, const Operand& b, int64_t b_at, float* c, int ldc) {
  float *c1 = c + 16, *c2 = c + 16 * ldc, *c3 = c2 + 16;
  written();
  if (ADD) {
    _tile_loadd(0, c, 4 * ldc);
    if (NT == 2) _tile_loadd(1, c1, 4 * ldc);
    if (MT == 2) _tile_loadd(2, c2, 4 * ldc);
    if (MT == 2 && NT == 2) _tile_loadd(3, c3, 4 * ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int p = 0; p < k; p += 32) {  // the small products first
    const int64_t a_from = a_at + p, b_from = b_at + int64_t(p) * b.stride;
    amx_load_b<MT, NT>(b.part[0] + b_from, 2 * b.stride);
    if (a.parts == 2) {
      amx_load_a<MT, NT>(a.part[1] + a_from, a.stride);
      amx_product<MT, NT>();
    }
    amx_load_a<MT, NT>(a.part[0] + a_from, a.stride);
    amx_product<MT, NT>();
    if (b.parts == 2) {
      amx_load_b<MT, NT>(b.part[1] + b_from, 2 * b.stride);
      amx_product<MT, NT>();
    }
  }
  _tile_stored(0, c, 4 * ldc);
  if (NT == 2) _tile_stored(1, c1, 4 * ldc);
  if (MT == 2) _tile_stored(2, c2, 4 * ldc);
  if (MT == 2 && NT == 2) _tile_stored(3, c3, 4 * ldc);
}

// C[m][n] (+)= A[m][k] B[k / 2][n][2]: k a multiple of 32, n of 16, m is rounded up to one of 16
template <bool ADD>
static void amx_matmul(int m, int n, int k, const Operand& a, const Operand& b, float* c, int ldc) {
  for (int i = 0; i < m; i += 32)
    for (int j = 0; j < n; j += 32) {
      const bool rows = i + 16 < m, columns = j + 16 < n;
      float* to = c + int64_t(i) * ldc + j;
      const int64_t a_at = int64_t(i) * a.stride, b_at = 2 * j;
      if (rows && columns) amx_block<2, 2, ADD>(k, a, a_at, b, b_at, to, ldc);
      else if (rows) amx_block<2, 1, ADD>(k, a, a_at, b, b_at, to, ldc);
      else if (columns) amx_block<1, 2, ADD>(k, a, a_at, b, b_at, to, ldc);
      else amx_block<1, 1, ADD>(k, a, a_at, b, b_at, to, ldc);
    }
}

// score [rows][TILE] of the query rows from `first` on
static void bf16_scores(const TileBf16& tile, int count, int first, int rows, int d, float* score) {
  const int64_t at = int64_t(first) * query_row(d);
  const Operand query = {{tile.query[0] + at, tile.query[1] + at}, tile.query_parts, query_row(d)};
  const Operand key = {{tile.key[0], tile.key[1]}, tile.parts, KEY_ROW};
  amx_matmul<false>(rows, (count + 15) & ~15, padded32(d), query, key, score, TILE);
}
// adds to out [rows][d]
static void bf16_mix(const TileBf16& tile, int count, int rows, int d, float* out) {
  const Operand weight = {{tile.weight[0], tile.weight[1]}, tile.parts, WEIGHT_ROW};
  const Operand value = {{tile.value[0], tile.value[1]}, tile.parts, value_row(d)};
  amx_matmul<true>(rows, d, padded32(count), weight, value, out, d);
}
