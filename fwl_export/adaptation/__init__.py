"""Compare what a model gains by adapting while it reads, and what that costs."""

from __future__ import annotations

from fwl_export.adaptation.compare import Comparison, ComparisonPlan, compare, machine
from fwl_export.adaptation.cost import (
    PARTS,
    Reading,
    count_flops,
    count_parts,
    count_shape,
    linear_attention_flops,
    peak_memory,
    read_interleaved,
    time_ratio,
)
from fwl_export.adaptation.readers import (
    CHUNK,
    AdaptingReader,
    DynamicReader,
    Losses,
    PlainReader,
    Reader,
    gradient_rms,
    iterate_losses,
    perplexity,
)
from fwl_export.adaptation.tuning import Choice, choose, minimize_on_grid, stream_perplexity

__all__ = [
    "CHUNK",
    "PARTS",
    "AdaptingReader",
    "Choice",
    "Comparison",
    "ComparisonPlan",
    "DynamicReader",
    "Losses",
    "PlainReader",
    "Reader",
    "Reading",
    "choose",
    "compare",
    "count_flops",
    "count_parts",
    "count_shape",
    "gradient_rms",
    "iterate_losses",
    "linear_attention_flops",
    "machine",
    "minimize_on_grid",
    "peak_memory",
    "perplexity",
    "read_interleaved",
    "stream_perplexity",
    "time_ratio",
]
