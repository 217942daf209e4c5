"""Notices layers that were swapped but whose forward is never called."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_qat.nn import quantized_layers


class BypassCheck:
    """Watches one training batch: a model that uses ``layer.weight`` directly would train in float unnoticed."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._missing: set[str] = set()

    def start(self, root: nn.Module) -> None:
        """Watch the quantized layers of ``root``, unless they are compiled (a hook would not be called)."""
        if any(_is_compiled(module) for module in root.modules()):
            return
        layers = quantized_layers(root)
        self._missing = set(layers)
        self._handles = [layer.register_forward_hook(self._make_hook(name)) for name, layer in layers.items()]

    def _make_hook(self, name: str) -> Any:
        return lambda *_: self._missing.discard(name)

    def finish(self, report: bool = True) -> None:
        """Stop watching, and warn of layers that were not called."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._missing and report:
            rank_zero_warn(
                f"The first batch did not call {len(self._missing)} of the quantized layers: "
                f"{', '.join(sorted(self._missing))}. If the model uses their weights directly, they train in float; "
                "add them to ignore, or call the layers."
            )
        self._handles = []
        self._missing = set()


def _is_compiled(module: nn.Module) -> bool:
    marks = ("_compiled_call_impl", "_orig_mod", "_compiler_ctx")  # of Module.compile, torch.compile, Lightning
    return any(getattr(module, mark, None) is not None for mark in marks)
