// What a recurrence is called with: addresses, strides and dtypes, checked by scans/cpu.py.
#pragma once
#include <stdint.h>

namespace kvthrift::scans {

enum class Dtype : int { f32, f16, bf16 };

// a matrix; a row's items are contiguous
struct Rows {
  char* data;
  int64_t stride;  // items from row to row
  Dtype dtype;
};

struct Batch {
  int num_seqs;
  const int32_t* query_start;
  const int32_t* slots;      // below zero: no state is kept
  const uint8_t* has_state;
};

// states of one layer; strides in items
struct States {
  char* data;
  int64_t slot, row, item;
  Dtype dtype;
};

struct Conv {
  Batch batch;
  Rows x, out;
  States states;  // rows are tokens, items are channels
  const float *weight, *bias;
  int channels, width;
  bool activate;  // SiLU
};

struct SelectiveScan {
  Batch batch;
  Rows x, dt, b, c, gate, out;  // gate.data may be null
  States states;                // rows are channels; b and c are float32
  const float *a, *d, *bias;
  int channels, size;
};

struct Wkv5 {
  Batch batch;
  Rows r, k, v, out;           // a row holds its heads one after the other
  States states;               // float32; a slot's items are contiguous
  const float *decay, *bonus;  // [heads, size]
  int heads, size;
};

struct Wkv7 {
  Batch batch;
  Rows r, w, k, v, removed, rate, out;  // a row holds its heads one after the other
  States states;                        // float32; a slot's items are contiguous
  int heads, size;
};

struct RgLru {
  Batch batch;
  Rows x, input_gate, gate, out;  // gates before their sigmoids
  States states;
  const float* rate;  // -8 softplus(parameter)
  int channels;
};

// one instruction set's functions
struct Scans {
  void (*causal_conv)(const Conv&, int threads);
  void (*selective_scan)(const SelectiveScan&, int threads);
  void (*wkv5)(const Wkv5&, int threads);
  void (*wkv7)(const Wkv7&, int threads);
  void (*rg_lru)(const RgLru&, int threads);
};

}  // namespace kvthrift::scans
