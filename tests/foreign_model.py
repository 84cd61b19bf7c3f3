"""A Fast Weight Layer language model as somebody else might have written it.

It shares no code with `fwl_export`, computes in whole matrices and with autograd, and stores its
parameters otherwise: dense layers as `nn.Linear`, step sizes as logs, forgetting as a half-life.
The page on the checkpoint format converts it (docs/formats/checkpoint.md), and test_docs.py runs
the conversion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "ln.weight", "ln.bias")


class ForeignModel(nn.Module):
    """Embedding, transformer blocks, and a head whose weights learn from every token."""

    def __init__(self, vocab: int = 40, dim: int = 12, depth: int = 2, tokens: int = 50) -> None:
        super().__init__()
        self.heads, self.window, self.tokens_per_batch = 3, 6, tokens
        self.tok = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(ForeignBlock(dim) for _ in range(depth))
        self.final_gain = nn.Parameter(torch.rand(dim) + 0.5)
        self.fc1, self.fc2 = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.ln = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, vocab)
        self.log_lr = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(torch.tensor(-float(i)))
                for i, name in enumerate(LEARNING)
            }
        )
        self.half_life = nn.Parameter(torch.tensor(20.0))

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the states [T, dim] that go into the head."""
        x = self.tok(ids)
        for block in self.blocks:
            x = block(x, self.heads, self.window)
        return rms(x) * self.final_gain

    def forward(self, ids: Tensor) -> Tensor:
        """Read one text [T], learning from each token; return the predictions [T, vocab]."""
        slow = {name: self.get_parameter(name) for name in LEARNING}
        learned = {name: torch.zeros_like(weight) for name, weight in slow.items()}
        keep = 0.5 ** (1 / self.half_life.detach())
        predictions: list[Tensor] = []
        hidden = self.hidden(ids).detach()
        for t, h in enumerate(hidden):
            if t:  # what follows the position before is known now
                loss = F.cross_entropy(self._head(hidden[t - 1], slow)[None], ids[None, t])
                gradients = torch.autograd.grad(loss, list(slow.values()))
                for name, gradient in zip(LEARNING, gradients, strict=True):
                    learned[name] = keep * learned[name] + gradient
            lr = {n: self.log_lr[n.replace(".", "_")].exp() / self.tokens_per_batch for n in slow}
            fast = {name: slow[name] - lr[name] * learned[name] for name in slow}
            predictions.append(self._head(h, fast).detach())
        return torch.stack(predictions)

    def _head(self, h: Tensor, w: dict[str, Tensor]) -> Tensor:
        a = F.relu(F.linear(h, w["fc1.weight"], w["fc1.bias"])) ** 2
        m = F.linear(a, w["fc2.weight"], w["fc2.bias"])
        return self.head(F.layer_norm(m, m.shape[-1:], w["ln.weight"], w["ln.bias"], self.ln.eps))


class ForeignOnTransformers(ForeignModel):
    """The same learning head on a language model of transformers, whose own head it uses."""

    def __init__(self, causal: Any) -> None:
        vocab, dim = causal.lm_head.weight.shape
        super().__init__(vocab, dim, depth=0)
        self.body, self.head = causal.base_model, causal.lm_head

    def hidden(self, ids: Tensor) -> Tensor:
        return self.body(input_ids=ids[None]).last_hidden_state[0]  # type: ignore[no-any-return]


class ForeignBlock(nn.Module):
    """Attention within a window, and an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain_a, self.gain_m = (nn.Parameter(torch.rand(dim) + 0.5) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.fc_in = nn.Linear(dim, 2 * dim, bias=False)
        self.fc_out = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, heads: int, window: int) -> Tensor:
        n = rms(x) * self.gain_a
        q, k, v = (f(n).view(len(x), heads, -1).transpose(0, 1) for f in (self.q, self.k, self.v))
        q, k = rotated(rms(q)), rotated(rms(k))
        at = torch.arange(len(x))
        near = (at[:, None] >= at) & (at[:, None] - at < window)
        attended = F.scaled_dot_product_attention(q, k, v, near).transpose(0, 1).reshape(x.shape)
        x = x + self.o(attended)
        return x + self.fc_out(F.relu(self.fc_in(rms(x) * self.gain_m)) ** 2)


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x: Tensor) -> Tensor:
    """Turn the pairs (i, i + size / 2) of x [heads, T, size]: rotary positions from 0 on.

    Frequencies are multiples of one turn in 2^20 positions, as those of our decoder are.
    """
    half = x.shape[-1] // 2
    turn = 2 * math.pi / 2**20
    frequency = (10000.0 ** (-torch.arange(half, dtype=torch.float64) / half) / turn).round() * turn
    pairs = torch.complex(x[..., :half], x[..., half:])
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)
