"""Weights that jump to and fro between two levels: how to count, dampen and freeze them.

Source of all three: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (arXiv:2203.11086).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.core import (
    QuantParams,
    QuantScheme,
    dequantize,
    fake_quantize,
    group_view,
    nearest_codes,
    ungroup,
)
from lightning_qat.nn.layers import QATLayer


@dataclass
class OscillationState:
    """What is remembered of each weight of a matrix ``[O, I]``; 6 bytes a weight, 11 if weights can be frozen.

    Attributes:
        codes: Integer codes, int8.
        directions: Sign of the last change of each code, 0 if there was none yet, int8.
        frequency: Moving average of the oscillations, in oscillations per step, float32.
        anchor: Moving average of the codes, float32, or None if weights cannot be frozen. For a frozen weight, the code
            that it is held at, or the value if its scale follows the weights.
        frozen: Which weights are frozen, bool, or None.
    """

    codes: Tensor
    directions: Tensor
    frequency: Tensor
    anchor: Tensor | None = None
    frozen: Tensor | None = None

    @classmethod
    def begin(cls, codes: Tensor, can_freeze: bool) -> OscillationState:
        """Return the state of weights that have not moved yet, from their ``codes`` (int8 ``[O, I]``)."""
        state = cls(codes.clone(), torch.zeros_like(codes), torch.zeros_like(codes, dtype=torch.float32))
        if can_freeze:
            state.anchor, state.frozen = codes.float(), torch.zeros_like(codes, dtype=torch.bool)
        return state

    def update(self, codes: Tensor, momentum: float) -> None:
        """Take note of the ``codes`` (int8 ``[O, I]``) after a step.

        A code oscillates in a step if it changes, and in the direction opposite to that of its last change (section
        4.1). A frozen weight does not.

        Args:
            codes: The codes now.
            momentum: Weight of this step in the moving averages.
        """
        if self.frozen is not None:
            codes = torch.where(self.frozen, self.codes, codes)
        direction = (codes > self.codes).to(torch.int8) - (codes < self.codes).to(torch.int8)
        self.frequency.lerp_((direction * self.directions < 0).float(), momentum)
        self.directions = torch.where(direction == 0, self.directions, direction)
        self.codes = codes
        if self.anchor is not None and self.frozen is not None:
            averaged = torch.lerp(self.anchor, codes.float(), momentum)
            self.anchor = torch.where(self.frozen, self.anchor, averaged)

    def freeze(self, threshold: float, params: QuantParams | None, scheme: QuantScheme) -> None:
        """Freeze the weights that oscillate more often than ``threshold``, each at the code it was at the most.

        Source: section 4.3.

        Args:
            threshold: In oscillations per step.
            params: The grid, if weights are to be held at a value rather than at a code.
            scheme: What the codes belong to.
        """
        assert self.anchor is not None
        assert self.frozen is not None
        is_new = (self.frequency > threshold) & ~self.frozen
        nearest = self.anchor.round()
        held = nearest if params is None else dequantize(nearest, params, scheme)
        self.codes = torch.where(is_new, nearest.to(torch.int8), self.codes)
        self.anchor = torch.where(is_new, held, self.anchor)
        self.frozen = self.frozen | is_new

    def counts(self, threshold: float) -> Tensor:
        """Return how many weights oscillate more often than ``threshold`` and are free, and how many are frozen.

        Returns:
            Two counts, int64 ``[2]``.
        """
        is_over = self.frequency > threshold
        if self.frozen is None:
            return torch.stack([is_over.sum(), torch.zeros_like(is_over.sum())])
        return torch.stack([(is_over & ~self.frozen).sum(), self.frozen.sum()])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name; they are this object's own, as in ``Module.state_dict``."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], can_freeze: bool) -> OscillationState:
        """Return a copy of what :meth:`state_dict` was called of.

        Args:
            state: What it returned.
            can_freeze: Whether weights can be frozen; if they could not be before, they can be from here on.
        """
        kept = {name: value.clone() for name, value in state.items() if can_freeze or name not in ("anchor", "frozen")}
        restored = cls(**kept)
        if can_freeze and restored.anchor is None:
            restored.anchor, restored.frozen = restored.codes.float(), torch.zeros_like(restored.codes).bool()
        return restored

    def to(self, device: torch.device) -> None:
        """Move to a device, if it is not there."""
        if self.codes.device != device:
            vars(self).update({name: value.to(device) for name, value in self.state_dict().items()})


def holds_values(layer: QATLayer) -> bool:
    """Return whether a frozen weight of ``layer`` keeps its value, since its scale follows the weights.

    A scale that is taken from weights which in turn are set to a level of it could shrink at every step. Where scales
    are learned, or observed now and then, a frozen weight keeps its code instead, and its value moves with the scale,
    as in the source.
    """
    config = layer.weight_fake_quant.config
    return config.observer.every_forward and not config.learn_scales


def current_codes(layer: QATLayer) -> Tensor:
    """Return the integer codes of the weight on the current rung, int8 ``[O, I]``."""
    matrix, quantizer = layer.matrix(), layer.weight_fake_quant
    return nearest_codes(matrix, quantizer.qparams(matrix), quantizer.rung_scheme)


@torch.no_grad()
def hold_frozen(layer: QATLayer, state: OscillationState) -> None:
    """Put every frozen weight of ``layer`` back to where it is held."""
    assert state.anchor is not None
    assert state.frozen is not None
    matrix, quantizer = layer.matrix(), layer.weight_fake_quant
    held = state.anchor
    if not holds_values(layer):
        held = dequantize(held, quantizer.qparams(matrix), quantizer.rung_scheme)
    held = torch.where(state.frozen, held.to(matrix.dtype), matrix)
    layer.set_matrix(held)


@torch.no_grad()
def dampening_gradient(weight: Tensor, params: QuantParams, scheme: QuantScheme) -> Tensor:
    """Return the gradient of ``||w_hat - clip(w)||²`` with respect to ``w``, in which ``w_hat`` is constant.

    The gradient is ``2 (w - w_hat)`` between the outermost levels and zero beyond: it pulls a weight to the level in
    the middle of its bin, and leaves scales and clipped weights alone (section 4.2).

    Args:
        weight: ``[O, I]``, any floating dtype; float64 is computed in float64.
        params: Scales and zero-points.
        scheme: Granularity and levels.

    Returns:
        ``[O, I]``, float32 or float64.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    qmin, qmax, offset, _ = scheme.levels()
    zero_point = 0.0 if params.zero_point is None else params.zero_point
    ends = [((code - zero_point + offset) * params.scale).unsqueeze(-1) for code in (qmin, qmax)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)  # a negative scale turns them round
    view = group_view(weight, scheme)
    is_inside = ungroup((view >= low) & (view <= high), weight.shape)
    return torch.where(is_inside, 2 * (weight - fake_quantize(weight, params, scheme)), 0.0)
