"""An ordinary float checkpoint whose weights are the quantized ones: any code that reads the model reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_qat.core import QuantizedWeight, QuantScheme

FILE = "model.safetensors"


class Dequantized:
    """The model's own state dict, with every quantized weight on its grid, in the dtype that it had."""

    name = "dequantized"
    holds_codes = False

    def explain(self, scheme: QuantScheme) -> str | None:
        """Return why the format cannot hold a scheme, or None."""
        if scheme.activation is not None:
            return "it holds weights; what quantizes inputs is not in it"
        return None

    def stored_bits(self, weight: QuantizedWeight) -> float:
        """Return the bits that a file has for a weight in float32."""
        return 32.0 * weight.codes.numel()

    def write(self, weights: Mapping[str, QuantizedWeight], rest: Mapping[str, Tensor], folder: Path) -> None:
        """Write all into ``folder``; ``rest`` holds the dequantized weights, too."""
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in rest.items()}, folder / FILE)

    def read(self, folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return no codes, and all tensors by name."""
        from safetensors.torch import load_file

        return {}, load_file(folder / FILE)
