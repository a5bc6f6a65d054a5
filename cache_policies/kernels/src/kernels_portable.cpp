#define KV_ENTRY kernels_portable
#include "isa.inc"
