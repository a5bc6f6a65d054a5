#define KV_ENTRY kernels_avx2
#include "kernels.inc"
