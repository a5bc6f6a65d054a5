// What the recurrences of RWKV share: a head's state is a matrix of key items by value items.
#pragma once

enum { MAX_HEAD = 256 };

// the matrix of a head, from zeros where there is none yet; in `own` where none is kept
template <typename Call>
SCAN_INLINE float* head_state(const Call& call, int seq, int head, float* own) {
  const Batch& batch = call.batch;
  const int64_t items = int64_t(call.size) * call.size;
  const int index = batch.slots[seq];
  float* state = index < 0 ? own : (float*)slot(call.states, index) + head * items;
  if (index < 0 || !batch.has_state[seq]) memset(state, 0, sizeof(float) * items);
  return state;
}
