"""Default values that the Python functions and the command line share.

This module imports no package: the command line reads it for its help texts, which must appear at
once.
"""

from __future__ import annotations

DEFAULT_OPSET = 20
"""ONNX opset of an exported model."""

DEFAULT_MAX_TOKENS = 256
"""Largest number of tokens that an exported model takes in one call."""

DEFAULT_MAX_BATCH = 8
"""Largest number of rows that an engine takes in one call."""

DEFAULT_SMS = (80, 86, 89, 120)
"""GPU architectures that TensorRT-RTX builds engines for: compute capabilities without the dot."""

DEFAULT_MAX_LEARNING_WEIGHT = 10.0
"""Largest product of a token's label weight and its row's learning-rate scale in a session."""
