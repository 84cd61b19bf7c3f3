"""Compile the GPU kernels ahead of time: see plugins/kernels/gpu/compile.py.

python -m tools.compile_kernels -o build/gpu_kernels
"""

from __future__ import annotations

from plugins.kernels.gpu.compile import main

if __name__ == "__main__":
    raise SystemExit(main())
