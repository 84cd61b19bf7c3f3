"""Benchmarks: implementations against each other and against what the machine can do."""

from __future__ import annotations

from fwl_export.bench.op import (
    LIMIT,
    OURS,
    OpSize,
    OpTimes,
    bench_op,
    describe_machine,
)

__all__ = ["LIMIT", "OURS", "OpSize", "OpTimes", "bench_op", "describe_machine"]
