// What TensorRT's headers take from CUDA's header of this name: handles that they pass through.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
