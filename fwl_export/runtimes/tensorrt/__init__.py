"""Runtime "tensorrt": engines in TensorRT or TensorRT-RTX, with the state on the GPU."""
