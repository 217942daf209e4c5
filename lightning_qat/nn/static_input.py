"""Fake quantization of a layer's input on one grid for all inputs: calibrated, then frozen or learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.core import (
    ActivationObserver,
    GradientEstimator,
    QuantParams,
    QuantScheme,
    fake_quantize,
)
from lightning_qat.estimators import ClippedSTE
from lightning_qat.estimators.lsq import log_scale, lsq_factor, round_straight_through
from lightning_qat.estimators.lsq_plus import LearnedBounds, fake_quantize_learned, learned_zero_point
from lightning_qat.nn.forward import drop_padding
from lightning_qat.nn.input_fake_quantize import InputFakeQuantize
from lightning_qat.nn.sharded import gathered
from lightning_qat.observers import HistogramMSEObserver


@dataclass(frozen=True)
class StaticInputConfig:
    """What decides about static inputs besides their scheme.

    Attributes:
        observer: Where the range comes from.
        learn: Whether the calibrated grid is then learned.
    """

    observer: ActivationObserver = field(default_factory=HistogramMSEObserver)
    learn: bool = False


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What calibration has seen of the inputs of a layer.

    Attributes:
        observer: Who has seen it, and makes grids of it.
        seen: What it has seen; see :class:`~lightning_qat.core.ActivationObserver`.
    """

    observer: ActivationObserver
    seen: Tensor


class StaticInputFakeQuantize(InputFakeQuantize):
    """Fake quantization of a layer's input on one grid ``[1, 1]``.

    Only while :attr:`is_observing` does a forward pass look at its input, and it changes no grid: what it saw is kept
    apart until :meth:`take`. So gradient checkpointing, which runs it twice, finds the same grid twice. Until the first
    batch is taken, inputs pass unchanged.

    A learned grid has the scale ``scale * exp(log_scale_ratio)`` and the zero-point
    ``round(zero_point + zero_point_offset * (qmax - qmin))``, with the gradients of LSQ and LSQ+ (see
    :mod:`~lightning_qat.estimators.lsq_plus`). In their gradient scale ``1 / sqrt(N * Qp)``, ``N`` is the number of
    features of one token, or of one sample of a convolution, and ``Qp`` the largest distance of a code from the
    zero-point: all steps of an asymmetric grid. The zero-point of inputs that calibration never saw below 0 is not
    learned: theirs is the unsigned grid of LSQ.

    Attributes:
        config: Observer, and whether the grid is learned.
        seen: What the observer has seen so far; no buffer, see :class:`~lightning_qat.nn.annealed_grid.AnnealedGrid`.
        pending: What it has seen since the last :meth:`take`.
        scale: Calibrated scale, float32 ``[1]``.
        zero_point: Calibrated zero-point, a whole number in float32 ``[1]``, or None if symmetric.
        log_scale_ratio: Trainable parameter, float32 ``[1]``, or None if the grid is not learned.
        zero_point_offset: Trainable parameter, float32 ``[1]``, or None if the zero-point is not learned.
        is_observing: Whether forward passes are to be observed: set around the batches of calibration.
        mask: Which tokens of the batch that is observed count, ``[B, T]``, or None if all do. In a compiled forward
            pass all do.
        is_calibrated: Whether there is a grid yet.
        is_settled: Whether calibration is over.
        num_steps: Optimizer steps that were observed.
    """

    is_calibrated = False
    mask: Tensor | None

    def __init__(
        self,
        scheme: QuantScheme,
        estimator: GradientEstimator,
        sample_dims: int,
        device: torch.device | None = None,
        config: StaticInputConfig | None = None,
    ) -> None:
        super().__init__(scheme, estimator, sample_dims, device)
        self.config = config or StaticInputConfig()
        zeros = torch.zeros(1, dtype=torch.float32, device=device)
        self.log_scale_ratio = nn.Parameter(zeros.clone()) if self.config.learn else None
        learns_offset = self.config.learn and not scheme.symmetric
        self.zero_point_offset = nn.Parameter(zeros.clone()) if learns_offset else None
        self.is_observing, self.mask = False, None
        self.reset(device)

    @torch.no_grad()
    def reset(self, device: torch.device | None = None) -> None:
        """Forget everything: the next calibration begins anew."""
        zeros = torch.zeros(1, dtype=torch.float32, device=device)
        self.seen, self.pending = (self.config.observer.empty(device) for _ in range(2))
        self.scale = zeros + 1
        self.zero_point = None if self.scheme.symmetric else zeros.clone()
        self._is_ready = zeros.clone()
        self.is_calibrated = self.is_settled = False
        self.num_steps = 0
        for parameter in self.parameters():
            parameter.zero_()

    # ------------------------------------------------------------------------------------------- calibration

    def observe(self, mask: Tensor | None = None) -> None:
        """Observe forward passes from now on, of the tokens for which ``mask`` ``[B, T]`` is True."""
        self.is_observing, self.mask = True, mask

    def stop_observing(self) -> None:
        """Observe forward passes no longer."""
        self.is_observing, self.mask = False, None

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if not torch.compiler.is_compiling() and self.sample_dims == 1:
            x = drop_padding(x, self.mask)
            if x.numel() == 0:
                return
        pending = self.config.observer.merge(self.pending, self.config.observer.collect(x))
        if torch.compiler.is_compiling():  # one graph serves every rung
            pending = torch.where(self._levels[4] > 0, self.pending, pending)
        self.pending.copy_(pending)

    @torch.no_grad()
    def take(self, batch: Tensor) -> None:
        """Add what was seen in a batch, find the grid anew, and have nothing pending.

        Zeros alone, such as a layer that begins at zero gives, have no range: there is no grid yet.

        Args:
            batch: What was seen, on all processes; if that is nothing, the grid stays as it is.

        Raises:
            ValueError: If NaN or infinite values were seen.
        """
        low, high = batch[:2].tolist()  # the only wait for an accelerator, and in calibration alone
        if (low, high) != (math.inf, -math.inf):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError("Inputs were NaN or infinite.")
            self.seen.copy_(self.config.observer.update(self.seen, batch))
            if self.is_calibrated or low < 0 or high > 0:
                self._fit()
        self.pending.copy_(self.config.observer.empty(self.pending.device))

    def adopt(self, seen: Tensor) -> None:
        """Go on from what the observer has seen in a calibration elsewhere, and see nothing more."""
        self.reset(self.seen.device)
        self.take(seen.to(self.seen))
        self.settle()

    @torch.no_grad()
    def _fit(self) -> None:
        """Find the grid for the current rung in what was seen, and forget what was learned on an older one."""
        params = self.config.observer(self.seen, self.scheme, self.levels)
        self.scale.copy_(params.scale.flatten())
        if self.zero_point is not None and params.zero_point is not None:
            self.zero_point.copy_(params.zero_point.flatten())
        for parameter in self.parameters():
            parameter.zero_()
        self._mark_calibrated(True)
        self.has_new_grid = True

    def _mark_calibrated(self, is_calibrated: bool) -> None:
        self.is_calibrated = is_calibrated
        self._is_ready.fill_(float(is_calibrated))

    def settle(self) -> None:
        """End the calibration."""
        self.is_settled = True
        self.stop_observing()

    def set_num_bits(self, num_bits: float) -> None:
        """Go to a rung; if that changes the width, the grid is found anew in what was seen."""
        before = self.num_bits
        super().set_num_bits(num_bits)
        if self.is_calibrated and self.num_bits != before:
            self._fit()

    # ----------------------------------------------------------------------------------------------- the grid

    def qparams(self, num_values: int = 1) -> QuantParams:
        """Return scale and zero-point of the current rung, ``[1, 1]``.

        Args:
            num_values: LSQ's ``N``; it changes gradients alone.
        """
        scale, zero_point, levels = self.scale, self.zero_point, self.levels
        if self.log_scale_ratio is not None:
            num_steps = levels.qmax - levels.qmin
            factor = lsq_factor(num_values, levels.qmax if zero_point is None else num_steps)
            scale = round_straight_through(
                log_scale(scale, gathered(self.log_scale_ratio), factor), self.scheme.torch_scale_dtype
            )
            if zero_point is not None and self.zero_point_offset is not None:
                factor = (self.seen[:1] < 0) * factor / (self.scale * num_steps).square()
                bounds = (torch.as_tensor(levels.qmin), torch.as_tensor(levels.qmax))
                zero_point = learned_zero_point(zero_point, gathered(self.zero_point_offset), *bounds, factor)
        return QuantParams(scale.view(1, 1), None if zero_point is None else zero_point.view(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the calibrated grid, in its shape and dtype; unchanged as long as there is none."""
        passes, is_compiling = self._passes_unchanged(), torch.compiler.is_compiling()
        if self.is_observing and not passes and x.numel() > 0:
            self._observe(x.detach())
        if passes or not (is_compiling or self.is_calibrated):
            return self._keep_in_graph(x)
        quantized = self._quantize(x)
        return torch.where((self._levels[4] > 0) | (self._is_ready == 0), x, quantized) if is_compiling else quantized

    def _quantize(self, x: Tensor) -> Tensor:
        params = self.qparams(math.prod(x.shape[-self.sample_dims :]))
        if self.log_scale_ratio is None:
            return fake_quantize(x, params, self.scheme, self.levels, self.estimator)
        if type(self.estimator) is not ClippedSTE:
            return fake_quantize(x, params, self.scheme, self.levels, LearnedBounds(self.estimator))
        shape = [1] * x.dim()
        zero_point = 0.0 if params.zero_point is None else params.zero_point.view(shape)
        return fake_quantize_learned(x, params.scale.view(shape), zero_point, self.levels)

    def _keep_in_graph(self, x: Tensor) -> Tensor:
        # DDP reports a parameter that takes no part in the loss.
        for parameter in (self.log_scale_ratio, self.zero_point_offset):
            x = x if parameter is None else x + (0.0 * parameter.sum()).to(x.dtype)
        return x

    # -------------------------------------------------------------------------------------------------- state

    def _move_to(self, device: torch.device) -> None:
        super()._move_to(device)
        if self.seen.is_meta and device.type != "meta":
            self.reset(device)
        for name in ("seen", "pending", "scale", "zero_point", "_is_ready"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the rung, what was seen, the grid and the flags, as primitives and tensors."""
        return {
            **super().get_extra_state(),
            "seen": self.seen.clone(),
            "pending": None if self.is_settled else self.pending.clone(),
            "scale": self.scale.clone(),
            "zero_point": None if self.zero_point is None else self.zero_point.clone(),
            "is_calibrated": self.is_calibrated,
            "is_settled": self.is_settled,
            "num_steps": self.num_steps,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned.

        Raises:
            ValueError: If it comes from another observer or scheme.
        """
        if state["seen"].shape != self.seen.shape or (state["zero_point"] is None) != (self.zero_point is None):
            raise ValueError("The saved range of inputs does not fit: it is of another activation_observer or scheme.")
        grid = [state["scale"], *([] if self.zero_point is None else [state["zero_point"]])]
        if not all(each.shape == self.scale.shape and each.isfinite().all() for each in grid):
            raise ValueError("The saved grid of inputs has another shape, or holds NaN or infinity.")
        device = state["seen"].device if self.seen.is_meta else self.seen.device
        pending = self.config.observer.empty(device) if state["pending"] is None else state["pending"].clone()
        self.seen, self.pending = state["seen"].clone().to(device), pending.to(device)
        self.scale = state["scale"].clone().to(device)
        self.zero_point = None if self.zero_point is None else state["zero_point"].clone().to(device)
        self._is_ready = torch.zeros(1, device=device)
        self.is_calibrated = False  # so that a change of width finds no other grid
        super().set_extra_state(state)
        self._mark_calibrated(bool(state["is_calibrated"]))
        self.is_settled, self.num_steps = bool(state["is_settled"]), int(state["num_steps"])
        self.stop_observing()

    def _on_missing_state(self) -> None:
        """Let the inputs that the new weights give be calibrated anew."""
        self.reset(self.seen.device)

    def extra_repr(self) -> str:
        """Describe the grid."""
        state = "learned" if self.config.learn else "calibrated"
        if not self.is_settled:
            state = f"to be {state}"
        return f"{self.rung_scheme.describe_as_input()}, {state}"
