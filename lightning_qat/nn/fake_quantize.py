"""Fake quantization of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.core import (
    GradientEstimator,
    Observer,
    QuantizedWeight,
    QuantParams,
    QuantScheme,
    group_view,
    quantize,
    ungroup,
)
from lightning_qat.estimators import ClippedSTE
from lightning_qat.estimators.lsq import log_scale, lsq_factor, round_straight_through
from lightning_qat.estimators.lsq_plus import LearnedBounds, fake_quantize_learned
from lightning_qat.nn.annealed_grid import AnnealedGrid
from lightning_qat.nn.sharded import gathered


@dataclass(frozen=True)
class FakeQuantizeConfig:
    """Everything that decides how a weight is fake-quantized.

    Attributes:
        scheme: The grid at the final width.
        observer: Where the range comes from.
        estimator: How the gradient passes the rounding.
        learn_scales: Whether the scales are parameters.
    """

    scheme: QuantScheme
    observer: Observer
    estimator: GradientEstimator
    learn_scales: bool = False


class WeightFakeQuantize(AnnealedGrid):
    """Fake quantization of a weight ``[O, I]``, shared by the layers that share the weight.

    The scales follow the weight in every forward pass (a cheap observer), are refreshed now and then (a
    costly one), are learned, or are frozen. A learned scale is ``scale * exp(log_scale_ratio)``, with LSQ's gradient
    (see :func:`~lightning_qat.estimators.lsq.log_scale`): positive by construction, and a weight decay, should it get
    one, pulls towards the observed value.

    Attributes:
        scale: Observed or frozen scales, float32 ``[O * G]``; no buffer, see
            :class:`~lightning_qat.nn.annealed_grid.AnnealedGrid`.
        zero_point: Zero-points, whole numbers in float32 ``[O * G]``, or None if symmetric.
        log_scale_ratio: Trainable parameter, float32 ``[O * G]`` (1-D: FSDP2 refuses 0-D, and optimizers such
            as Muon take 2-D for a matrix), or None if scales are not learned.
        frozen: Whether the grid no longer moves.
        loaded: What the weight was quantized to before it was put in to pass unchanged, or None.
    """

    def __init__(
        self, config: FakeQuantizeConfig, out_features: int, in_features: int, device: torch.device | None = None
    ) -> None:
        """Make the state for a weight ``[out_features, in_features]``; the grid is found when first needed."""
        super().__init__(config.scheme, device)
        self.config = config
        num_groups = config.scheme.num_groups(in_features)
        self.qparams_shape = (1, 1) if config.scheme.granularity == "tensor" else (out_features, num_groups)
        num_scales = self.qparams_shape[0] * self.qparams_shape[1]
        self.weights_per_scale = config.scheme.group_size or out_features * in_features // self.qparams_shape[0]
        zeros = torch.zeros(num_scales, dtype=torch.float32, device=device)
        self.scale = zeros + 1
        self.zero_point = None if config.scheme.symmetric else zeros.clone()
        self.log_scale_ratio = nn.Parameter(zeros.clone()) if config.learn_scales else None
        self.frozen = False
        self.is_stale = True
        self.loaded: QuantizedWeight | None = None

    @property
    def follows_weight(self) -> bool:
        """Whether the grid is found anew in every forward pass."""
        return self.config.observer.every_forward and self.log_scale_ratio is None and not self.frozen

    def set_num_bits(self, num_bits: float) -> None:
        """Go to a rung; if that changes the width, the grid is found anew when it is next needed."""
        before = self.num_bits
        super().set_num_bits(num_bits)
        self.is_stale |= self.num_bits != before

    @torch.no_grad()
    def observe(self, weight: Tensor) -> None:
        """Take scales and zero-points from ``weight`` ``[O, I]``, and forget what was learned on an older grid."""
        self._take(self.config.observer(weight.detach(), self.scheme, self.levels))

    @torch.no_grad()
    def adopt(self, params: QuantParams) -> None:
        """Go on from scales and zero-points ``[O, G]`` that were found elsewhere, in place of observed ones.

        Raises:
            ValueError: If the next forward pass would observe others: scales must be learned or frozen.
        """
        if self.follows_weight:
            raise ValueError("Scales that follow the weight cannot be initialised. Learn (scale_lr) or freeze them.")
        self._take(params)

    def _take(self, params: QuantParams) -> None:
        self.scale.copy_(params.scale.flatten())
        if self.zero_point is not None and params.zero_point is not None:
            self.zero_point.copy_(params.zero_point.flatten())
        if self.log_scale_ratio is not None:
            self.log_scale_ratio.zero_()
        self.is_stale, self.has_new_grid = False, True

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Fix the grid as it is now, given the current ``weight`` ``[O, I]``."""
        if self.follows_weight or self.is_stale:
            self.observe(weight)
        self.frozen = True

    def unfreeze(self) -> None:
        """Let the grid move again: a learned one from where it is, another from where the weight is then."""
        self.is_stale |= self.frozen and self.log_scale_ratio is None
        self.frozen = False

    def qparams(self, weight: Tensor) -> QuantParams:
        """Return the grid for ``weight`` ``[O, I]`` on the current rung."""
        if self.follows_weight:
            return self.config.observer(weight.detach(), self.scheme, self.levels)
        if self.is_stale:
            self.observe(weight)
        scale = self.scale
        if self.log_scale_ratio is not None:
            factor = lsq_factor(self.weights_per_scale, self.levels.qmax)
            scale = round_straight_through(
                log_scale(scale, gathered(self.log_scale_ratio), factor), self.scheme.torch_scale_dtype
            )
        zero_point = None if self.zero_point is None else self.zero_point.view(self.qparams_shape)
        return QuantParams(scale.view(self.qparams_shape), zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight`` ``[O, I]`` on the grid of the current rung, in its dtype.

        During a blend the result is ``(1 - blend) * weight + blend * fake_quantize(weight)``, and so is the gradient.
        """
        if self._passes_unchanged():
            return self._keep_in_graph(weight)
        return self._blend(weight, self._on_grid(weight))

    def _on_grid(self, weight: Tensor) -> Tensor:
        params, estimator = self.qparams(weight), self.config.estimator
        if self.log_scale_ratio is None:
            return self._fake_quantize(weight, params, estimator)
        if type(estimator) is not ClippedSTE:
            return self._fake_quantize(weight, params, LearnedBounds(estimator))
        zero_point = 0.0 if params.zero_point is None else params.zero_point.unsqueeze(-1)
        grouped, scale = group_view(weight, self.scheme), params.scale.unsqueeze(-1)
        quantized = fake_quantize_learned(grouped, scale, zero_point, self.levels, estimator.margin)
        return self._unless_passing(weight, ungroup(quantized, weight.shape))

    def _keep_in_graph(self, weight: Tensor) -> Tensor:
        # DDP reports a parameter that takes no part in the loss.
        if self.log_scale_ratio is None:
            return weight
        return weight + (0.0 * self.log_scale_ratio.sum()).to(weight.dtype)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Return the codes of ``weight`` ``[O, I]`` and the grid that they are on, in the middle of a blend too.

        Raises:
            ValueError: If the weight has NaN or infinite values, or the current rung is the pass-through.
        """
        if self.pass_through and self.loaded is not None and torch.equal(self.loaded.dequantize().to(weight), weight):
            return self.loaded
        if self.pass_through:
            raise ValueError(
                "The weight is not quantized yet: the schedule is at its 16-bit pass-through. Train on until fake "
                "quantization starts, or go to a width with lightning_qat.nn.set_num_bits(model, num_bits)."
            )
        params = self.qparams(weight)
        params = QuantParams(params.scale.clone(), None if params.zero_point is None else params.zero_point.clone())
        return QuantizedWeight(quantize(weight, params, self.rung_scheme), params, self.rung_scheme)

    def _move_to(self, device: torch.device) -> None:
        super()._move_to(device)
        if self.scale.is_meta and device.type != "meta":
            self.scale = torch.ones_like(self.scale, device=device)
            self.zero_point = None if self.zero_point is None else torch.zeros_like(self.scale, device=device)
            self.is_stale = True
        self.scale = self.scale.to(device)
        self.zero_point = None if self.zero_point is None else self.zero_point.to(device)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the rung, the observed grid and the flags, as primitives and tensors."""
        grid = {"scale": self.scale.clone(), "zero_point": None if self.zero_point is None else self.zero_point.clone()}
        return {**super().get_extra_state(), **grid, "frozen": self.frozen, "is_stale": self.is_stale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned.

        Raises:
            ValueError: If it comes from a weight of another shape.
        """
        for name, present in (("scale", self.scale), ("zero_point", self.zero_point)):
            saved = state[name]
            if (saved is None) != (present is None) or (saved is not None and saved.shape != self.scale.shape):
                raise ValueError(f"The saved {name} does not fit: the weight had another shape or scheme.")
            if saved is not None and not saved.isfinite().all():
                raise ValueError(f"The saved {name} holds NaN or infinity.")
            if present is not None:
                setattr(self, name, saved.clone() if present.is_meta else present.copy_(saved))
        super().set_extra_state(state)
        self.frozen, self.is_stale = bool(state["frozen"]), bool(state["is_stale"])

    def _on_missing_state(self) -> None:
        """Let the new weights get a grid of their own."""
        self.is_stale = True

    def extra_repr(self) -> str:
        """Describe the grid."""
        rung = "" if self.num_bits == self.scheme.num_bits else f", now at {self.num_bits:g} bits"
        blend = "" if self.blend == 1 else f", blended in by {self.blend:.3g}"
        return f"{self.scheme}{rung}{blend}" + (", frozen" if self.frozen else "")
