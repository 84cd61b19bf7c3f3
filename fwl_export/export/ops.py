"""What operators an ONNX file uses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx


def count_ops(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in the graph, most frequent first; ours leads."""
    graph = onnx.load(str(path), load_external_data=False).graph
    counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node)
    ranked = sorted(counts.items(), key=lambda item: ("::" not in item[0], -item[1], item[0]))
    return dict(ranked)
