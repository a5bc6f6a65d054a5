// Writing fresh tokens into the ring, and absorbing full groups of them into the store.
#pragma once

KV_INLINE void put_code(uint8_t* codes, CodeSlot slot, int bits, int code) {
  uint8_t* byte = codes + slot.byte;
  *byte = uint8_t((*byte & ~(((1 << bits) - 1) << slot.shift)) | (code << slot.shift));
}

struct Affine {  // the stored, rounded scale and minimum of a group
  uint16_t scale_bits, min_bits;
  float minimum, inverse;
};

KV_INLINE float clamp_f16(float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; }

KV_INLINE Affine fit(float low, float high, int levels) {
  Affine a;
  a.scale_bits = float_to_f16(clamp_f16((high - low) / float(levels)));
  a.min_bits = float_to_f16(clamp_f16(low));
  const float scale = f16_to_float(a.scale_bits);
  a.minimum = f16_to_float(a.min_bits);
  a.inverse = scale > 0.f ? 1.f / scale : 0.f;
  return a;
}

KV_INLINE int encode(const Affine& a, float x, int levels) {
  const float code = rintf((x - a.minimum) * a.inverse);
  return code > 0.f ? (code < float(levels) ? int(code) : levels) : 0;
}

// groups of channels of one token: values, and FlexGen's keys
static void encode_token(const Layout& l, uint8_t* run, int64_t codes, int64_t scales, int64_t mins,
                         int bits, bool is_key, int token, const float* x) {
  const int levels = (1 << bits) - 1;
  for (int g = 0; g < l.head_size / l.group; g++) {
    float low = x[g * l.group], high = low;
    for (int c = g * l.group; c < (g + 1) * l.group; c++) {
      low = x[c] < low ? x[c] : low;
      high = x[c] > high ? x[c] : high;
    }
    const Affine a = fit(low, high, levels);
    ((uint16_t*)(run + scales))[g * l.page_tokens + token] = a.scale_bits;
    ((uint16_t*)(run + mins))[g * l.page_tokens + token] = a.min_bits;
    for (int c = g * l.group; c < (g + 1) * l.group; c++) {
      const CodeSlot slot = is_key ? key_slot(token, c, bits, l.head_size)
                                   : value_slot(token, c, bits, l.page_tokens);
      put_code(run + codes, slot, bits, encode(a, x[c], levels));
    }
  }
}

// KIVI's keys: one group of tokens, channel by channel; x is [group, head_size]
static void encode_key_group(const Layout& l, uint8_t* run, int token, const float* x) {
  const int levels = (1 << l.k_bits) - 1, d = l.head_size;
  const int64_t row = int64_t(token / l.group) * d;
  for (int c = 0; c < d; c++) {
    float low = x[c], high = low;
    for (int t = 1; t < l.group; t++) {
      const float v = x[t * d + c];
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    const Affine a = fit(low, high, levels);
    ((uint16_t*)(run + l.key_scale))[row + c] = a.scale_bits;
    ((uint16_t*)(run + l.key_min))[row + c] = a.min_bits;
    for (int t = 0; t < l.group; t++) {
      put_code(run + l.key, key_slot(token + t, c, l.k_bits, d), l.k_bits,
               encode(a, x[t * d + c], levels));
    }
  }
}

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

// keys and values of `count` tokens, [count, head_size] float, into the store at `first`
static void write_store(Call& c, int seq, int head, int first, int count, float* key, float* value) {
  const Layout& l = c.layout;
  const int d = l.head_size;
  for (int t = 0; t < count; t++) {
    const int position = first + t, slot = position % l.page_tokens;
    uint8_t* run = c.run(seq, c.batch.store_row[seq] + position / l.page_tokens, head);
    float *k = key + int64_t(t) * d, *v = value + int64_t(t) * d;
    if (l.kind == Kind::affine) {
      if (!l.keys_per_channel)
        encode_token(l, run, l.key, l.key_scale, l.key_min, l.k_bits, true, slot, k);
      else if (slot % l.group == 0)
        encode_key_group(l, run, slot, k);
      encode_token(l, run, l.value, l.value_scale, l.value_min, l.v_bits, false, slot, v);
    } else if (l.kind == Kind::int8) {
      encode_int8((int8_t*)run + l.key + octet_start(slot, d), 8, (uint16_t*)(run + l.key_scale), slot, d, k);
      encode_int8((int8_t*)run + l.value + int64_t(slot) * d, 1, (uint16_t*)(run + l.value_scale), slot, d, v);
    } else {
      const int64_t item = item_bytes(l.store_dtype);
      char row[256 * 4];
      store_clamped(row, l.store_dtype, d, k);
      char* octet = (char*)run + l.key + octet_start(slot, d) * item;
      for (int j = 0; j < d; j++) memcpy(octet + 8 * j * item, row + j * item, size_t(item));
      store_clamped((char*)run + l.value + slot * d * item, l.store_dtype, d, v);
    }
  }
}

static void write_ring(Call& c, int seq, int head, int slot, float* key, float* value) {
  const Layout& l = c.layout;
  uint8_t* run = c.run(seq, slot / l.ring_tokens, head);
  char* row = (char*)run + int64_t(slot % l.ring_tokens) * 4 * l.head_size;
  store_clamped(row, l.ring_dtype, l.head_size, key);
  store_clamped(row + 2 * l.head_size, l.ring_dtype, l.head_size, value);
}

static void load_pending(const Call& c, int seq, int head, int first, int count, int in_ring,
                         float* key, float* value) {
  // pending tokens are those of the ring followed by the fresh ones
  const int d = c.layout.head_size;
  KvRows rows;
  for (int t = 0; t < count; t++) {
    const int i = first + t;
    if (i < in_ring) ring_rows(c, seq, head, i, 1, &rows);
    else fresh_rows(c, seq, head, i - in_ring, 1, &rows);
    load_row(rows.key.row[0], rows.key.dtype, d, key + int64_t(t) * d);
    load_row(rows.value.row[0], rows.value.dtype, d, value + int64_t(t) * d);
  }
}

static void append_head(Call& c, int seq, int head) {
  enum { STEP = 128 };  // every group divides it
  const Batch& b = c.batch;
  const int fresh = b.appended[seq], in_ring = b.ring[seq], absorbed = b.stored_after[seq] - b.stored[seq];
  float key[STEP * 256], value[STEP * 256];
  for (int i = 0; i < absorbed; i += STEP) {
    const int count = min_int(STEP, absorbed - i);
    load_pending(c, seq, head, i, count, in_ring, key, value);
    write_store(c, seq, head, b.stored[seq] + i, count, key, value);
  }
  // What is left moves to the front of the ring; without absorption only fresh tokens move.
  for (int i = absorbed ? absorbed : in_ring; i < in_ring + fresh; i++) {
    load_pending(c, seq, head, i, 1, in_ring, key, value);
    write_ring(c, seq, head, i - absorbed, key, value);
  }
}

static void append(Call& c) {
  const int tasks = c.batch.num_seqs * c.num_kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.num_threads) if (tasks > 1)
  for (int i = 0; i < tasks; i++) append_head(c, i / c.num_kv_heads, i % c.num_kv_heads);
}
