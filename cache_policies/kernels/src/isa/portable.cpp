#define KV_ENTRY kernels_portable
#include "kernels.inc"
