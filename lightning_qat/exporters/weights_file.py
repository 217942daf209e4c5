"""What formats share that are one safetensors file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_qat.core import QuantScheme

FILE = "model.safetensors"


class WeightsFile:
    """Holds any scheme of weights, and nothing about inputs."""

    def explain(self, scheme: QuantScheme) -> str | None:
        """Return why the format cannot hold a scheme, or None."""
        if scheme.activation is not None:
            return "it holds weights; what quantizes inputs is not in it"
        return None


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, which may share memory, as they are now."""
    from safetensors.torch import save_file

    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / FILE, metadata)
