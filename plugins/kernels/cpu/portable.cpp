#define FWL_LANES 4
#define FWL_TILE_ROWS 4
#define FWL_INSTRUCTIONS kPortable
#include "kernels/cpu/kernels.inl"
