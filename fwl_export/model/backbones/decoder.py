"""A small decoder-only transformer with pre-norm, rotary positions and sliding-window attention.

It reads whole texts at once for training, or reads a stream. In a stream, keys and values live in
ring buffers of fixed capacity, so a session reads without end in constant memory.

In half precision, the matrix products and the attention are computed in it. The residual stream,
the norms and the squares are float32: nothing bounds the size of the first and the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fwl_export.bundle.config import BackboneConfig
from fwl_export.model.backbones.ring import Ring, float_mask
from fwl_export.model.numerics import linear, wide

# Rotary frequencies are integer multiples of 2 pi / ROTARY_PERIOD. So the phase of a position is an
# integer product modulo the period, which is exact at any position. A float32 angle would be off by
# 0.06 rad after a million tokens.
ROTARY_PERIOD = 1 << 20


class Decoder(nn.Module):
    """Token embedding, `layers` blocks, and a norm: ids [B, T] -> hidden states [B, T, width].

    With the attribute `gradient_checkpointing`, training computes each block again in the backward
    pass instead of storing its activations.
    """

    rotary_cycles: Tensor
    gradient_checkpointing = False

    def __init__(self, config: BackboneConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _Norm(config)
        half = config.width // config.heads // 2
        exponent = torch.arange(half, dtype=torch.float64) / half
        cycles = config.rotary_base**-exponent * ROTARY_PERIOD / (2 * math.pi)
        self.register_buffer("rotary_cycles", cycles.round().long(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Read whole texts from their beginning.

        Args:
          input_ids: Token ids, [B, T] int64.

        Returns:
          The hidden states, [B, T, width].
        """
        length = input_ids.shape[1]
        # A window beyond the text would only make blocks of padding, as large as the config says.
        window = min(self.config.window, length)
        x = wide(self.embedding(F.pad(input_ids, (0, -length % window))))
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(positions, x.dtype)
        mask = self._block_mask(x, window)
        for block in self._blocks():
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, window, use_reentrant=False)
            else:
                x = block(x, rotary, mask, window)
        return self.norm(x)[:, :length]

    def stream(
        self, input_ids: Tensor, position: Tensor, lengths: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Read the next tokens of every row.

        Args:
          input_ids: Token ids, [B, T] int64; row b has `lengths[b]` tokens, then padding.
          position: Number of tokens that each row has read before, [B] int64.
          lengths: Number of tokens in each row, [B] int64 in 0..T.
          caches: Keys and values in the order of `cache_specs`, [B, heads, capacity, head size]
            each.

        Returns:
          The hidden states, [B, T, width], and the new caches. Hidden states of padding are
          meaningless. A row of length 0 keeps its caches bit for bit.
        """
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = wide(self.embedding(input_ids))
        positions = position[:, None] + steps
        rotary = self.rotary(positions, x.dtype)
        ring = Ring(position, lengths, steps, caches[0].shape[2])
        mask = ring.mask(positions, self.config.window, self.activation_type)
        present = []
        for index, block in enumerate(self._blocks()):
            query, key, value = block.attention.project(block.norm_1(x), rotary)
            keys = ring.write(caches[2 * index], key)
            values = ring.write(caches[2 * index + 1], value)
            present += [keys, values]
            x = block.rest(x, block.attention.attend(query, keys, values, mask))
        return self.norm(x), present

    def cache_specs(self, capacity: int) -> list[tuple[str, tuple[int, ...]]]:
        """Return the names of the caches, and their shapes without the batch axis.

        Args:
          capacity: Number of tokens that a cache holds; it suffices for calls of up to
            `capacity - window + 1` tokens.
        """
        head_size = self.config.width // self.config.heads
        shape = (self.config.heads, capacity, head_size)
        return [
            (f"cache.{layer}.{kind}", shape)
            for layer in range(self.config.layers)
            for kind in ("key", "value")
        ]

    @property
    def activation_type(self) -> torch.dtype:
        """The dtype of keys, values and the hidden states that `forward` returns.

        A matrix may have another one, see `fwl_export.precision.policy`.
        """
        return self.norm.weight.dtype

    def _blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.blocks)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the cosine and the sine of positions [B, T], [B, 1, T, head size / 2] each."""
        phase = torch.remainder(positions[..., None] * self.rotary_cycles, ROTARY_PERIOD)
        angle_type = torch.float64 if dtype == torch.float64 else torch.float32
        angle = phase.to(angle_type) * (2 * math.pi / ROTARY_PERIOD)
        return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)

    def _block_mask(self, x: Tensor, window: int) -> Tensor:
        """Return the attention mask of blocks of queries, [1, 1, blocks, window, 2 * window].

        A block of queries sees keys of the block before and of its own; the first has none before.
        """
        query = torch.arange(window, device=x.device)[:, None] + window
        key = torch.arange(2 * window, device=x.device)
        allowed = (key <= query) & (key > query - window)
        allowed = allowed.repeat(x.shape[1] // window, 1, 1)
        allowed[0, :, :window] = False
        return float_mask(allowed, self.activation_type)[None, None]


class Block(nn.Module):
    """Attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, inner = config.width, config.mlp_ratio * config.width
        self.norm_1 = _Norm(config)
        self.attention = _Attention(config)
        self.norm_2 = _Norm(config)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = _Down(inner, width, bias=False)
        nn.init.normal_(self.up.weight, std=width**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, window: int
    ) -> Tensor:
        """Return the block's output for whole texts, [B, T, width]; window must divide T."""
        query, key, value = self.attention.project(self.norm_1(x), rotary)
        return self.rest(x, _windowed_attention(query, key, value, mask, window))

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's result, [B, heads, T, head size], and then the MLP's to x."""
        merged = attended.transpose(1, 2).flatten(2)
        x = x + self.attention.out(merged)
        return x + self.down(torch.relu(wide(self.up(self.norm_2(x)))).square())


class _Down(nn.Linear):
    """A dense layer without bias whose input is float32, and may be of any size."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class _Attention(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        nn.init.normal_(self.qkv.weight, std=config.width**-0.5)
        nn.init.zeros_(self.out.weight)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalized and rotated query and key, and value; [B, heads, T, head size] each."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (rotate(_rms(each, 1e-6), rotary).to(x.dtype) for each in (query, key))
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return softmax(query key^T / sqrt(size) + mask) value, [B, heads, T, head size]."""
        return _attention(query, key, value, mask)


class _Norm(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.center = config.norm == "layer"
        self.epsilon = config.norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.width))

    def forward(self, x: Tensor) -> Tensor:
        if self.center:
            x = x - x.mean(-1, keepdim=True)
        return (_rms(x, self.epsilon) * self.weight).to(self.weight.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(wide(scores + mask), -1).to(value.dtype) @ value


def _windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int
) -> Tensor:
    """Attend within a sliding window, block by block.

    Args:
      query: Queries, [B, heads, T, size]; T is a multiple of the window.
      key: Keys in the same shape.
      value: Values in the same shape.
      mask: The mask of `Decoder._block_mask`.
      window: Number of tokens that a query sees, and the size of a block.
    """
    blocks = (query.shape[2] // window, window)
    q, k, v = (x.unflatten(2, blocks) for x in (query, key, value))
    k, v = (torch.cat((F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x), 3) for x in (k, v))
    return _attention(q, k, v, mask).flatten(2, 3)


def _rms(x: Tensor, epsilon: float) -> Tensor:
    # In half precision, the sum of squares would overflow.
    mean_square = wide(x).square().mean(-1, keepdim=True)
    return wide(x) * torch.rsqrt(mean_square + epsilon)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + size / 2) of x [B, heads, T, size] by the angles of `rotary`."""
    cos, sin = rotary
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
