#define KV_ENTRY kernels_avx512bf16
#include "kernels.inc"
