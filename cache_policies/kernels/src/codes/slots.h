// Where a packed code lies; the order is documented in cache_policies/pages/codecs/packing.py.
#pragma once

// Byte and bit of a packed code; of 3 bits the low two, and where the high one is.
struct CodeSlot {
  int64_t byte;
  int shift;
  int64_t high_byte;
  int high_shift;
};
// byte `byte` of vector `vec` of a block of four
inline CodeSlot block_slot(int64_t block, int bits, int vec, int byte) {
  const int field = bits == 3 ? 2 : bits, per_byte = 8 / field;
  const int64_t start = block * bits * 16;
  return {start + vec / per_byte * 32 + byte, vec % per_byte * field, start + 32 + byte % 16, vec + byte / 16 * 4};
}
inline CodeSlot key_slot(int token, int channel, int bits, int head_size) {
  const int64_t block = int64_t(token / 32) * (head_size / 4) + channel / 4;
  return block_slot(block, bits, token % 32 / 8, token % 8 * 4 + channel % 4);
}
inline CodeSlot value_slot(int token, int channel, int bits, int page_tokens) {
  const int64_t block = int64_t(channel / 8) * (page_tokens / 16) + token / 16;
  return block_slot(block, bits, token % 16 / 4, channel % 8 * 4 + token % 4);
}
inline int get_code(const uint8_t* codes, CodeSlot slot, int bits) {
  const int low = codes[slot.byte] >> slot.shift;
  if (bits != 3) return low & ((1 << bits) - 1);
  return (low & 3) | (codes[slot.high_byte] >> slot.high_shift & 1) << 2;
}
