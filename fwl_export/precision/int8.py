"""Matrices in int8 with one scale per output channel, as ONNX's DequantizeLinear reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_INT8_LARGEST = 127  # symmetric: -128 is not used


class Int8Weight(NamedTuple):
    """A matrix in int8.

    Attributes:
      values: The quantized matrix, [n, m] int8.
      scale: One scale per channel, [n] or [m] float32; a value times its scale is the weight.
      channels: The axis of the channels, 0 or 1.
    """

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    channels: int

    @property
    def transposed(self) -> Int8Weight:
        """The same matrix with its axes exchanged."""
        return Int8Weight(self.values.T.copy(), self.scale, 1 - self.channels)

    def dequantized(self) -> npt.NDArray[np.float32]:
        """Return the float32 matrix [n, m], bit for bit as DequantizeLinear computes it."""
        scale = np.expand_dims(self.scale, 1 - self.channels)
        result: npt.NDArray[np.float32] = self.values.astype(np.float32) * scale
        return result


def quantize(weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8, symmetrically and with one scale per channel.

    Args:
      weight: The matrix, [n, m] float32.
      channels: The axis of the channels, 0 or 1.

    Returns:
      The values [n, m] int8 and the scales float32, [n] or [m]. The scale of a channel is its
      largest absolute weight divided by 127, or 1 if all its weights are 0.
    """
    scale = weight.abs().amax(1 - channels) / _INT8_LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    rounded = torch.round(weight / scale.unsqueeze(1 - channels))
    return rounded.to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, channels: int) -> Tensor:
    """Return the float32 matrix that ONNX's DequantizeLinear makes of `quantize`'s results."""
    return values.float() * scale.unsqueeze(1 - channels)
