#define FWL_LANES 8
#define FWL_TILE_ROWS 6
#define FWL_INSTRUCTIONS kAvx2
#include "kernels/cpu/kernels.inl"
