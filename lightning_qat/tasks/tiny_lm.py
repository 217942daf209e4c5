"""A small decoder-only language model in plain torch: RMSNorm, rotary positions, SwiGLU, tied head.

Shapes: ``B`` sequences, ``T`` tokens, ``D`` model width, ``N`` heads, ``H`` head width, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyLM(nn.Module):
    """A Llama-like language model.

    Args:
        vocab_size: Number of token ids; 256 for bytes.
        dim: Width of the model.
        num_layers: Number of blocks.
        num_heads: Number of attention heads.
        ffn_dim: Width of the feed-forward layers.
        max_length: Longest sequence.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        ffn_dim: int = 192,
        max_length: int = 128,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.lm_head.weight = self.embed.weight
        cos, sin = _rotations(max_length, dim // num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(_init_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return next-token logits ``[B, T, V]`` for ``tokens`` int64 ``[B, T]``."""
        length = tokens.shape[1]
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, self.cos[:length], self.sin[:length])
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.ffn_norm = nn.RMSNorm(dim)
        self.ffn = SwiGLU(dim, ffn_dim)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return ``hidden`` ``[B, T, D]`` after the block."""
        hidden = hidden + self.attention(self.attention_norm(hidden), cos, sin)
        output: Tensor = hidden + self.ffn(self.ffn_norm(hidden))
        return output


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv:2104.09864)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the attention output ``[B, T, D]``."""
        query, key, value = (self._split(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _split(self, projected: Tensor) -> Tensor:
        """Return ``[B, T, D]`` as ``[B, N, T, H]``."""
        return projected.view(*projected.shape[:2], self.num_heads, -1).transpose(1, 2)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv:2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the feed-forward output ``[B, T, D]``."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


def _rotations(max_length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[max_length, head_dim / 2]`` of the rotary angles."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(max_length), frequencies)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (first half, second half) of ``x`` ``[B, N, T, H]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
