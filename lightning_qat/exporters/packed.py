"""The project's own layout: packed codes in one safetensors file, read by plain torch.

For a layer ``name``: ``name.codes`` uint8 ``[O, ceil(I * bits / 8)]`` (see ``bit_packing``), ``name.scale`` in the
scheme's scale dtype and ``name.zero_point`` int8, both ``[O, G]``, and ``name.input_scale`` float32 if there is one. A
weight is ``(code - zero_point + zero_offset) * scale``. What is not quantized has its own name and dtype. The header
holds the schemes as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_qat.core import QuantizedWeight, QuantParams, QuantScheme
from lightning_qat.exporters.bit_packing import pack, storage_bits, unpack
from lightning_qat.exporters.weights_file import FILE, WeightsFile, save_tensors

LAYOUT = "lightning_qat packed 1"


class Packed(WeightsFile):
    """Codes of 1 to 8 bits, packed densely; any scheme of weights."""

    name = "safetensors"
    holds_codes = True

    def stored_bits(self, weight: QuantizedWeight) -> float:
        """Return the bits that a file has for a weight, scales and zero-points included."""
        return sum(8 * tensor.element_size() * tensor.numel() for tensor in _tensors_of(weight).values())

    def write(self, weights: Mapping[str, QuantizedWeight], rest: Mapping[str, Tensor], folder: Path) -> None:
        """Write all into ``folder``."""
        tensors, layers = dict(rest), {}
        for name, weight in weights.items():
            tensors.update({f"{name}.{key}": tensor for key, tensor in _tensors_of(weight).items()})
            layers[name] = {"shape": list(weight.codes.shape), "scheme": weight.scheme.to_dict()}
        metadata = {"layout": LAYOUT, "layers": json.dumps(layers)}
        save_tensors(tensors, folder, metadata)

    def read(self, folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return the quantized weights by layer, and everything else by name.

        Raises:
            ValueError: If the file is of another kind.
        """
        from safetensors import safe_open

        with safe_open(folder / FILE, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("layout") != LAYOUT:
            raise ValueError(f"{folder / FILE} has not the layout {LAYOUT!r}: it was not written by this format.")
        weights = {}
        for name, layer in json.loads(metadata["layers"]).items():
            scheme = QuantScheme.parse(layer["scheme"])
            codes = unpack(
                tensors.pop(f"{name}.codes"), _qmin(scheme), storage_bits(scheme.num_bits), layer["shape"][1]
            )
            zero_point = tensors.pop(f"{name}.zero_point", None)
            params = QuantParams(
                tensors.pop(f"{name}.scale").float(), None if zero_point is None else zero_point.float()
            )
            weights[name] = QuantizedWeight(codes, params, scheme, tensors.pop(f"{name}.input_scale", None))
        return weights, tensors


def _qmin(scheme: QuantScheme) -> int:
    return int(scheme.levels().qmin)


def _tensors_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return what a file holds of a weight."""
    scheme, params = weight.scheme, weight.params
    found = {
        "codes": pack(weight.codes.cpu(), _qmin(scheme), storage_bits(scheme.num_bits)),
        "scale": params.scale.cpu().to(scheme.torch_scale_dtype),
    }
    if params.zero_point is not None:
        found["zero_point"] = params.zero_point.cpu().to(torch.int8)
    if weight.input_scale is not None:
        found["input_scale"] = weight.input_scale.cpu()
    return found
