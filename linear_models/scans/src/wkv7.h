// RWKV-7 (arXiv 2503.14456): a delta rule whose decay is a vector. Lanes are the value's items.
//
// What a token takes away depends on the state that the one before it left. Of a chunk of tokens
// the state is read once nevertheless: all that its tokens take and give out is a product with
// the state before the chunk, and with what earlier tokens of the chunk did to it, which are
// products of their keys. A chunk's decays are within e^(-0.61 tokens), and so are their inverses
// floats.
#pragma once

enum { WKV7_CHUNK = 4 };

// of a chunk, for each token and key item; decays are those from the chunk's begin on, or to its end
struct Wkv7Tile {
  enum { ITEMS = WKV7_CHUNK * MAX_HEAD };
  alignas(64) float reads[ITEMS], r[ITEMS];        // as the state before the chunk is read
  alignas(64) float takes[ITEMS], adds[ITEMS];     // as the state after the chunk is written
  alignas(64) float decay[MAX_HEAD];               // of the whole chunk
  // what earlier tokens add to a token's reads and outputs: by what they took, by what they added
  float read_took[WKV7_CHUNK][WKV7_CHUNK], read_added[WKV7_CHUNK][WKV7_CHUNK];
  float out_took[WKV7_CHUNK][WKV7_CHUNK], out_added[WKV7_CHUNK][WKV7_CHUNK];
};

// Fetches the next chunk's tokens, a line a call, for rows of a head lie far apart.
struct Wkv7Ahead {
  const Rows* const rows[7];
  const int64_t begin, end;
  const int first, size;
  int which, line;
  int64_t token;

  void next() {
    if (which == 7) return;
    const int item = bytes_of(rows[which]->dtype);
    if (token < end) __builtin_prefetch(row(*rows[which], token) + int64_t(first) * item + line);
    line += 64;
    if (line < size * item) return;
    line = 0;
    if (++token < end) return;
    token = begin;
    which++;
  }
};

// e^(-e^(-1/2) sigmoid(x))
SCAN_INLINE Vec wkv7_decay(Vec x) {
  return decay(inverse(1.f + falling(x, 87.f)), all(-0.60653066f * LOG2E));
}

template <int COUNT>
static void wkv7_fill(const Wkv7& call, int64_t token, int head, Wkv7Tile& tile) {
  const int size = call.size, first = head * size;
  Vec read_took[COUNT][COUNT] = {}, read_added[COUNT][COUNT] = {};
  Vec out_took[COUNT][COUNT] = {}, out_added[COUNT][COUNT] = {};
  for (int i = 0; i < size; i += LANES) {
    const auto item = [&](const Rows& rows, int t) {
      return load(row(rows, token + t), first + i, rows.dtype, LANES);
    };
    const auto keep = [&](float* to, int t, Vec x) { memcpy(to + t * size + i, &x, sizeof x); };
    Vec w[COUNT], reads[COUNT], r[COUNT], since = all(1.f), until = all(1.f);
    for (int t = 0; t < COUNT; t++) {
      w[t] = wkv7_decay(item(call.w, t));
      reads[t] = -item(call.removed, t) * since;
      since *= w[t];
      r[t] = item(call.r, t) * since;
      keep(tile.reads, t, reads[t]);
      keep(tile.r, t, r[t]);
    }
    memcpy(tile.decay + i, &since, sizeof since);
    const Vec back = inverse(since);
    for (int s = COUNT - 1; s >= 0; s--) {
      const Vec takes = item(call.removed, s) * item(call.rate, s) * until;
      const Vec adds = item(call.k, s) * until;
      until *= w[s];
      keep(tile.takes, s, takes);
      keep(tile.adds, s, adds);
      for (int t = s; t < COUNT; t++) {
        if (t > s) {
          read_took[t][s] += takes * back * reads[t];
          read_added[t][s] += adds * back * reads[t];
        }
        out_took[t][s] += takes * back * r[t];
        out_added[t][s] += adds * back * r[t];
      }
    }
  }
  for (int t = 0; t < COUNT; t++)
    for (int s = 0; s <= t; s++) {
      tile.read_took[t][s] = sum(read_took[t][s]);
      tile.read_added[t][s] = sum(read_added[t][s]);
      tile.out_took[t][s] = sum(out_took[t][s]);
      tile.out_added[t][s] = sum(out_added[t][s]);
    }
}

// COLUMNS * LANES value items from item j on
template <int COUNT, int COLUMNS>
SCAN_INLINE void wkv7_columns(const Wkv7& call, const Wkv7Tile& tile, int64_t token, int head, int j,
                              float* state, Wkv7Ahead& ahead) {
  const int size = call.size, first = head * size;
  Vec took[COUNT][COLUMNS] = {}, out[COUNT][COLUMNS] = {}, value[COUNT][COLUMNS];
  for (int i = 0; i < size; i++)
    for (int c = 0; c < COLUMNS; c++) {
      const Vec s = load(state + int64_t(i) * size + j + c * LANES, LANES);
      for (int t = 0; t < COUNT; t++) {
        took[t][c] += s * tile.reads[t * size + i];
        out[t][c] += s * tile.r[t * size + i];
      }
    }
  for (int t = 0; t < COUNT; t++)
    for (int c = 0; c < COLUMNS; c++) {
      const int item = first + j + c * LANES;
      value[t][c] = load(row(call.v, token + t), item, call.v.dtype, LANES);
      for (int s = 0; s < t; s++)
        took[t][c] += took[s][c] * tile.read_took[t][s] + value[s][c] * tile.read_added[t][s];
      for (int s = 0; s <= t; s++)
        out[t][c] += took[s][c] * tile.out_took[t][s] + value[s][c] * tile.out_added[t][s];
      store((char*)row(call.out, token + t), item, call.out.dtype, LANES, out[t][c]);
    }
  for (int i = 0; i < size; i++) {
    ahead.next();
    for (int c = 0; c < COLUMNS; c++) {
      float* at = state + int64_t(i) * size + j + c * LANES;
      Vec s = load(at, LANES) * tile.decay[i];
      for (int t = 0; t < COUNT; t++)
        s += took[t][c] * tile.takes[t * size + i] + value[t][c] * tile.adds[t * size + i];
      memcpy(at, &s, sizeof s);
    }
  }
}

template <int COUNT>
static int64_t wkv7_chunks(const Wkv7& call, Wkv7Tile& tile, int64_t token, int64_t end, int head,
                           float* state) {
#if defined(__AVX512F__)
  enum { COLUMNS = 2 };  // 32 registers: products of a key's item with both
#else
  enum { COLUMNS = 1 };
#endif
  for (; token + COUNT <= end; token += COUNT) {
    wkv7_fill<COUNT>(call, token, head, tile);
    const int64_t begin = token + COUNT, after = begin + COUNT < end ? begin + COUNT : end;
    Wkv7Ahead ahead{{&call.r, &call.w, &call.k, &call.v, &call.removed, &call.rate, &call.out},
                    begin, after, head * call.size, call.size, 0, 0, begin};
    int j = 0;
    for (; j + COLUMNS * LANES <= call.size; j += COLUMNS * LANES)
      wkv7_columns<COUNT, COLUMNS>(call, tile, token, head, j, state, ahead);
    for (; j < call.size; j += LANES) wkv7_columns<COUNT, 1>(call, tile, token, head, j, state, ahead);
  }
  return token;
}

static void wkv7(const Wkv7& call, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int seq = 0; seq < call.batch.num_seqs; seq++)
    for (int head = 0; head < call.heads; head++) {
      alignas(64) float own[MAX_HEAD * MAX_HEAD];
      float* state = head_state(call, seq, head, own);
      const int64_t end = call.batch.query_start[seq + 1];
      Wkv7Tile tile;
      const int64_t token = wkv7_chunks<WKV7_CHUNK>(call, tile, call.batch.query_start[seq], end, head, state);
      wkv7_chunks<1>(call, tile, token, end, head, state);
    }
}
