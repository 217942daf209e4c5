"""A grid that goes down a schedule: what the quantizers of weights and of inputs have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.core import (
    PASS_THROUGH_BITS,
    GradientEstimator,
    Levels,
    QuantParams,
    QuantScheme,
    fake_quantize,
)


class AnnealedGrid(nn.Module):
    """A grid whose width changes during training.

    Levels and scales are tensors, so that a change compiles nothing anew, but no buffers: weight averaging
    averages every buffer, and an average of two grids is neither. They travel in the extra state instead.

    Attributes:
        has_new_grid: Whether the grid was found anew since this was last set to False.
        loads_weight: Whether the state dict that is being loaded has the layer's weight.
    """

    def __init__(self, scheme: QuantScheme, device: torch.device | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.rung_scheme = scheme
        self._asked_for = scheme.num_bits
        self.blend = 1.0
        self.has_new_grid = False
        self.loads_weight = True
        self._levels = self._make_levels(device)

    @property
    def levels(self) -> Levels:
        """Levels of the current rung, as 0-d tensors."""
        return Levels(*self._levels[:4].unbind())

    @property
    def num_bits(self) -> float:
        """Width on the current rung."""
        return self.rung_scheme.num_bits

    def set_num_bits(self, num_bits: float) -> None:
        """Go to a rung: the width becomes ``max(num_bits, the scheme's own)``."""
        if num_bits == self._asked_for:  # every step asks; on an accelerator a copy would wait for the device
            return
        self._asked_for = num_bits
        self.rung_scheme = self.scheme.at(num_bits)
        with torch.no_grad():
            self._levels.copy_(self._make_levels(None))

    def set_blend(self, blend: float) -> None:
        """Let the share ``blend`` of a tensor be fake-quantized, from 0 to 1, and the rest pass unchanged."""
        if blend != self.blend:
            self.blend = blend
            self._levels[5] = blend

    @property
    def pass_through(self) -> bool:
        """Whether the tensor passes unchanged on the current rung."""
        return self.num_bits == PASS_THROUGH_BITS

    def _make_levels(self, device: torch.device | None) -> Tensor:
        values = [*self.rung_scheme.levels(), self.pass_through, self.blend]
        return torch.tensor(values, dtype=torch.float32, device=device)

    def _fake_quantize(self, tensor: Tensor, params: QuantParams, estimator: GradientEstimator) -> Tensor:
        # Not rung_scheme: a compiled graph would depend on its fields, and the levels say all that changes.
        return self._unless_passing(tensor, fake_quantize(tensor, params, self.scheme, self.levels, estimator))

    def _unless_passing(self, tensor: Tensor, quantized: Tensor) -> Tensor:
        """Return ``quantized``, or ``tensor`` where a compiled graph is at its pass-through."""
        return torch.where(self._levels[4] > 0, tensor, quantized) if torch.compiler.is_compiling() else quantized

    def _blend(self, tensor: Tensor, quantized: Tensor) -> Tensor:
        """Return ``(1 - blend) * tensor + blend * quantized``, which is ``quantized`` to the bit at 1."""
        if not torch.compiler.is_compiling() and self.blend == 1:
            return quantized
        blended = torch.lerp(tensor.float(), quantized.float(), self._levels[5]).to(tensor.dtype)
        return blended if not torch.compiler.is_compiling() else torch.where(self._levels[5] < 1, blended, quantized)

    def _passes_unchanged(self) -> bool:
        # A compiled graph serves every rung, so the pass-through is chosen inside it.
        return not torch.compiler.is_compiling() and self.pass_through

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnnealedGrid:
        """Follow the module to another device, but never to another dtype: the grid is float32."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._move_to(fn(self._levels).device)
        return self

    def _move_to(self, device: torch.device) -> None:
        self._levels = self._make_levels(device)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the rung, as primitives and tensors: safe for ``weights_only`` loading."""
        return {"num_bits": self.num_bits, "blend": self.blend}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        num_bits, blend = state["num_bits"], state.get("blend", 1.0)
        if not (isinstance(num_bits, (int, float)) and isinstance(blend, (int, float))):
            raise TypeError(f"num_bits={num_bits!r} and blend={blend!r} must be numbers")
        self.set_num_bits(num_bits)
        self.set_blend(blend)
        self.has_new_grid = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a checkpoint without quantizers, also one that leaves this layer out."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)
        elif self.loads_weight:
            self._on_missing_state()

    def _on_missing_state(self) -> None:
        """Called when the layer's weight was loaded from a checkpoint without quantizers."""

    def extra_repr(self) -> str:
        """Describe the grid."""
        return f"{self.rung_scheme}"


def named_grids(root: nn.Module) -> dict[str, AnnealedGrid]:
    """Return the distinct grids of ``root`` by name."""
    return {name: module for name, module in root.named_modules() if isinstance(module, AnnealedGrid)}
