"""TensorRT and TensorRT-RTX: engines of a bundle, with the state on the GPU."""
