"""Benchmarks: implementations against each other and against what the machine can do.

`op` needs the extra "export" (torch and onnx); `session` runs without it.
"""
