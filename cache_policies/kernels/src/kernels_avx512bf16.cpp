#define KV_ENTRY kernels_avx512bf16
#include "isa.inc"
