"""Benchmarks: implementations against each other and against what the machine can do.

`op` needs the extra "export"; `session` runs without torch and onnx.
"""
