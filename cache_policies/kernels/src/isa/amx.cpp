#define KV_ENTRY kernels_amx
#include "kernels.inc"
