#define SCAN_ENTRY scans_portable
#include "scans.inc"
