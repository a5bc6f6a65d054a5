#define KV_ENTRY kernels_avx512
#include "kernels.inc"
