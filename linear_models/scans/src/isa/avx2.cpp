#define SCAN_ENTRY scans_avx2
#include "scans.inc"
