"""An ordinary float checkpoint whose weights are the quantized ones: any code that reads the model reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_qat.core import QuantizedWeight
from lightning_qat.exporters.weights_file import FILE, WeightsFile, save_tensors


class Dequantized(WeightsFile):
    """The model's own state dict, with every quantized weight on its grid, in the dtype that it had."""

    name = "dequantized"
    holds_codes = False

    def stored_bits(self, weight: QuantizedWeight) -> float:
        """Return the bits that a file has for a weight in float32."""
        return 32.0 * weight.codes.numel()

    def write(self, weights: Mapping[str, QuantizedWeight], rest: Mapping[str, Tensor], folder: Path) -> None:
        """Write all into ``folder``; ``rest`` holds the dequantized weights, too."""
        save_tensors(rest, folder)

    def read(self, folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return no codes, and all tensors by name."""
        from safetensors.torch import load_file

        return {}, load_file(folder / FILE)
