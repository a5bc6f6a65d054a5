#define SCAN_ENTRY scans_avx512
#include "scans.inc"
