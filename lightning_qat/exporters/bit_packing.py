"""Codes of 1 to 8 bits in bytes: dense, row by row, the lowest bit first."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_bits(num_bits: float) -> int:
    """Return the bits that a code takes; a ternary one takes 2."""
    return 2 if num_bits == 1.58 else int(num_bits)


def pack(codes: Tensor, qmin: int, num_bits: int) -> Tensor:
    """Return ``codes - qmin`` as bytes.

    Args:
        codes: Integer codes ``[O, I]`` from ``qmin`` to ``qmin + 2 ** num_bits - 1``.
        qmin: The smallest code.
        num_bits: Bits of each.

    Returns:
        uint8 ``[O, ceil(I * num_bits / 8)]``; the last bits of a row are 0.
    """
    digits = (codes.to(torch.int16) - qmin).unsqueeze(-1) >> torch.arange(num_bits, dtype=torch.int16) & 1
    rows = digits.to(torch.uint8).flatten(1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    weights = (1 << torch.arange(8, dtype=torch.int16)).to(torch.uint8)
    return (rows.view(len(codes), -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, qmin: int, num_bits: int, in_features: int) -> Tensor:
    """Return the codes int8 ``[O, in_features]`` that :func:`pack` was given."""
    digits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    digits = digits.flatten(1)[:, : in_features * num_bits].view(len(packed), in_features, num_bits)
    weights = 1 << torch.arange(num_bits, dtype=torch.int16)
    return ((digits.to(torch.int16) * weights).sum(-1) + qmin).to(torch.int8)
