// Where a packed code lies; the order is documented in cache_policies/pages/codecs/packing.py.
#pragma once

// Byte and bit of a packed code.
struct CodeSlot {
  int64_t byte;
  int shift;
};
inline CodeSlot key_slot(int token, int channel, int bits, int head_size) {
  const int per_byte = 8 / bits, vec = token % 32 / 8;
  const int64_t block = int64_t(token / 32) * (head_size / 4) + channel / 4;
  return {(block * (bits / 2) + vec / per_byte) * 32 + token % 8 * 4 + channel % 4,
          vec % per_byte * bits};
}
inline CodeSlot value_slot(int token, int channel, int bits, int page_tokens) {
  const int per_byte = 8 / bits, vec = token % 16 / 4;
  const int64_t block = int64_t(channel / 8) * (page_tokens / 16) + token / 16;
  return {(block * (bits / 2) + vec / per_byte) * 32 + channel % 8 * 4 + token % 4,
          vec % per_byte * bits};
}
