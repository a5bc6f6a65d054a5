// RWKV-5 (arXiv 2404.05892). Lanes are the value's items; a head's state is a matrix of key items
// by value items.
//
// Of a chunk of tokens the state is read and written once. Within a chunk it is kept divided by
// the decay since the chunk's begin, so that a token costs two products an item: receptances
// carry the decay up to their token, keys its inverse. Decays are no functions of the token here,
// so both are tables of a head; where an inverse would leave floats, the head's chunks are shorter.
#pragma once

#if defined(__AVX512F__)
enum { CHUNK = 8 };  // outputs and values of a chunk stay in registers
#else
enum { CHUNK = 4 };
#endif
enum { SHORT_CHUNK = 4 };

struct Wkv5Tile {
  alignas(64) float r[CHUNK * MAX_HEAD], k[CHUNK * MAX_HEAD], bonus[CHUNK];
};

struct Powers {
  int safe;  // tokens of a chunk whose inverses are floats
  alignas(64) float before[(CHUNK + 1) * MAX_HEAD], inverse[CHUNK * MAX_HEAD];
};

static void powers_of(const float* decays, int size, Powers& powers) {
  const double least = 1e-30;  // keys below 1e8 stay floats
  powers.safe = CHUNK;
  for (int i = 0; i < size; i++) {
    double power = 1;
    for (int t = 0; t <= CHUNK; t++) {
      powers.before[t * size + i] = float(power);
      if (t) powers.inverse[(t - 1) * size + i] = float(1 / power);
      if (!(power >= least)) powers.safe = at_most(powers.safe, t - 1);
      power *= decays[i];
    }
  }
}

// receptances and keys of `count` tokens with their decays, and receptance . (bonus * key)
static void wkv5_fill(const Wkv5& call, const Powers* powers, int64_t token, int head, int count, Wkv5Tile& tile) {
  const int size = call.size, first = head * size;
  const float* bonus = call.bonus + first;
  for (int t = 0; t < count; t++) {
    const char *r = row(call.r, token + t), *k = row(call.k, token + t);
    Vec product = {};
    for (int i = 0; i < size; i += LANES) {
      Vec ri = load(r, first + i, call.r.dtype, LANES), ki = load(k, first + i, call.k.dtype, LANES);
      product += ri * ki * load(bonus + i, LANES);
      if (powers) {
        ri *= load(powers->before + t * size + i, LANES);
        ki *= load(powers->inverse + t * size + i, LANES);
      }
      memcpy(tile.r + t * size + i, &ri, sizeof ri);
      memcpy(tile.k + t * size + i, &ki, sizeof ki);
    }
    tile.bonus[t] = sum(product);
  }
}

// a line of the next chunk's tokens, for rows of a head lie far apart: i counts through them
SCAN_INLINE void fetch(const Rows* rows, int64_t token, int64_t end, int first, int bytes, int i) {
  const int line = i % 8 * 64;
  if (line >= bytes || token + i / 8 >= end) return;
  const int item = bytes_of(rows->dtype);
  __builtin_prefetch(row(*rows, token + i / 8) + int64_t(first) * item + line);
}

template <int COUNT>
static void wkv5_advance(const Wkv5& call, const Wkv5Tile& tile, const float* decays, int64_t token, int64_t end,
                    int head, float* state) {
  const int size = call.size, first = head * size;
  const Rows* next[] = {&call.r, &call.k, &call.v, &call.out};
  for (int j = 0; j < size; j += LANES) {
    const Rows* ahead = next[j / LANES % 4];
    const int bytes = size * bytes_of((ahead->dtype));
    Vec out[COUNT], value[COUNT];
    for (int t = 0; t < COUNT; t++) {
      value[t] = load(row(call.v, token + t), first + j, call.v.dtype, LANES);
      out[t] = value[t] * tile.bonus[t];
    }
    for (int i = 0; i < size; i++) {
      if (COUNT > 1) fetch(ahead, token + COUNT, end, first, bytes, i);
      float* at = state + int64_t(i) * size + j;
      Vec s = load(at, LANES);
      for (int t = 0; t < COUNT; t++) {
        out[t] += s * tile.r[t * size + i];
        if (COUNT == 1) s *= decays[i];
        s += value[t] * tile.k[t * size + i];
      }
      if (COUNT > 1) s *= decays[i];
      memcpy(at, &s, sizeof s);
    }
    for (int t = 0; t < COUNT; t++)
      store((char*)row(call.out, token + t), first + j, call.out.dtype, LANES, out[t]);
  }
}

// whole chunks from a token on; the token after them
template <int COUNT>
static int64_t wkv5_chunks(const Wkv5& call, const Powers& powers, Wkv5Tile& tile, int64_t token, int64_t end,
                      int head, float* state) {
  for (; token + COUNT <= end; token += COUNT) {
    wkv5_fill(call, &powers, token, head, COUNT, tile);
    wkv5_advance<COUNT>(call, tile, powers.before + COUNT * call.size, token, end, head, state);
  }
  return token;
}

static void wkv5_head(const Wkv5& call, int seq, int head) {
  const Batch& batch = call.batch;
  const int size = call.size;
  const float* decays = call.decay + head * size;
  alignas(64) float own[MAX_HEAD * MAX_HEAD];
  float* state = head_state(call, seq, head, own);
  int64_t token = batch.query_start[seq];
  const int64_t end = batch.query_start[seq + 1];
  Wkv5Tile tile;
  if (end - token >= SHORT_CHUNK) {
    Powers powers;
    powers_of(decays, size, powers);
    if (powers.safe == CHUNK) token = wkv5_chunks<CHUNK>(call, powers, tile, token, end, head, state);
    if (powers.safe >= SHORT_CHUNK)
      token = wkv5_chunks<SHORT_CHUNK>(call, powers, tile, token, end, head, state);
  }
  for (; token < end; token++) {
    wkv5_fill(call, nullptr, token, head, 1, tile);
    wkv5_advance<1>(call, tile, decays, token, end, head, state);
  }
}

static void wkv5(const Wkv5& call, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int head = 0; head < call.heads; head++) wkv5_head(call, seq, head);
}
