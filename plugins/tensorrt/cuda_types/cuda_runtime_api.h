// The part of CUDA's header of this name that TensorRT's headers need: handles that they pass
// through.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
