#define FWL_LANES 16
#define FWL_TILE_ROWS 12
#define FWL_INSTRUCTIONS kAvx512
#include "kernels/cpu/kernels.inl"
