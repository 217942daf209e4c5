"""The factor of the inverse Hessian that GPTQ works with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError as LinAlgError  # type: ignore[attr-defined]

ESCALATION = (1.0, 10.0, 100.0)
"""By how much the damping is raised, one after the other, until the factorization succeeds."""


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped Hessian.

    Features that are always zero get a diagonal of 1. A factorization that fails in float32 is tried in
    float64, then with more damping.

    Args:
        hessian: Symmetric, positive semi-definite, float32 ``[K, I, I]``.
        damping: Share of the mean of the diagonal that is added to it.

    Returns:
        ``U`` with ``Uᵀ U = H⁻¹``, float32 ``[K, I, I]``.

    Raises:
        LinAlgError: If none of these helps.
    """
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    base = hessian + torch.diag_embed((diagonal == 0).to(hessian.dtype))
    mean = diagonal.mean(-1)[:, None, None]
    mean = torch.where(mean > 0, mean, 1.0)
    identity = torch.eye(hessian.shape[-1], device=hessian.device, dtype=hessian.dtype)
    for factor in ESCALATION:
        for dtype in (torch.float32, torch.float64):
            try:
                return _factorize((base + factor * damping * mean * identity).to(dtype)).float()
            except LinAlgError:
                continue
    raise LinAlgError(f"The Hessian is not positive definite with {ESCALATION[-1] * damping:g} damping.")


def _factorize(hessian: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
