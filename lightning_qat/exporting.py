"""From a model under fake quantization to a folder that is deployed, and back into a plain model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_qat.core import QuantizedWeight
from lightning_qat.core.protocols import Exporter
from lightning_qat.core.registry import build
from lightning_qat.exporters import EXPORTERS
from lightning_qat.exporters.manifest import check_manifest, hash_file, write_manifest
from lightning_qat.nn import quantized_layers, quantized_weights, restore_float, weight_fake_quants
from lightning_qat.nn.bits import bit_report
from lightning_qat.nn.layers import QATLayer
from lightning_qat.nn.plan import find_qat_class
from lightning_qat.records import package_versions

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def export(
    module: nn.Module,
    path: str | Path,
    format: str | Exporter = "safetensors",
    *,
    metrics: Mapping[str, float] | None = None,
    source: str | Path | None = None,
) -> dict[str, Any]:
    """Write a model under fake quantization, which is left as it is, to a folder.

    Codes, scales and zero-points are written as they were trained; nothing is rounded again.

    Args:
        module: The model: after ``load_qat``, at the end of a fit, or after ``PTQResults.apply``.
        path: A folder that is new or empty.
        format: ``"safetensors"``, packed codes (``lightning_qat.exporters.packed`` says how), or ``"dequantized"``, an
            ordinary float checkpoint with the quantized values.
        metrics: What the model scored, for the manifest.
        source: The checkpoint that it came from; its hash is in the manifest.

    Returns:
        The manifest.

    Raises:
        ValueError: If nothing is quantized, the format cannot hold a scheme, or adapters are not merged yet.
        FileExistsError: If the folder is not empty.
    """
    exporter: Exporter = build(format, EXPORTERS, "format")
    layers = quantized_layers(module)
    _check(exporter, layers)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Give a new folder.")
    distinct = {name for name, _ in weight_fake_quants(module)}  # of layers that share a weight, the first
    weights = {name: weight for name, weight in quantized_weights(module).items() if name in distinct}
    exporter.write(weights, _plain_state(module, weights, without_weights=exporter.holds_codes), folder)
    bits = bit_report(module)
    numel = sum(weight.codes.numel() for weight in weights.values())
    stored = sum(exporter.stored_bits(weight) for weight in weights.values())
    facts = {
        "format": exporter.name,
        "schemes": dict(Counter(str(weight.scheme) for weight in weights.values())),
        "effective_bits": bits.quantized,
        "model_bits": bits.model,
        "stored_bits": stored / numel,
        "metrics": dict(metrics or {}),
        "source_sha256": None if source is None else hash_file(Path(source)),
        "versions": package_versions(),
    }
    return write_manifest(folder, facts)


def load_exported(
    module: ModuleT,
    path: str | Path,
    *,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
) -> ModuleT:
    """Load what :func:`export` wrote into a plain float ``module``, in place: its weights are the quantized ones.

    Args:
        module: The model in float, of the same architecture.
        path: The folder.
        mapping: The ``mapping`` of the run, if it had one.

    Returns:
        ``module``, whose layers compute what they did under fake quantization, to the bit.

    Raises:
        FileNotFoundError: If the folder was not written by :func:`export`.
        ValueError: If a file is damaged or does not fit the module, which is then left as it was.
    """
    folder = Path(path)
    manifest = check_manifest(folder)
    weights, state = EXPORTERS[manifest["format"]]().read(folder)
    own, modules = module.state_dict(), dict(module.named_modules())
    for name, weight in weights.items():
        layer = modules.get(name)
        qat_class = None if layer is None else find_qat_class(layer, mapping)
        if qat_class is None:
            raise ValueError(f"The module has no layer {name!r} like the one that was exported. Build the same model.")
        stored = own[f"{name}.weight"]
        state[f"{name}.weight"] = qat_class.from_matrix(weight.dequantize(), stored).to(stored.dtype)
    state = _with_aliases(own, state)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    misshapen = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{folder} does not fit: missing {missing}, unexpected {unexpected}, other shapes {misshapen}."
        )
    module.load_state_dict(state)
    return module


def _check(exporter: Exporter, layers: Mapping[str, QATLayer]) -> None:
    if not layers:
        raise ValueError("Nothing in the model is quantized: load the checkpoint with load_qat, or apply a PTQ result.")
    if adapted := [name for name, layer in layers.items() if layer.inner]:
        raise ValueError(f"{adapted[0]} has adapters: call merge_and_unload() first, which keeps the codes.")
    for name, layer in layers.items():
        scheme = layer.weight_fake_quant.scheme
        if layer.input_fake_quant is not None:
            scheme = replace(scheme, activation=layer.input_fake_quant.scheme)
        if reason := exporter.explain(scheme):
            raise ValueError(f"The format {exporter.name!r} cannot hold {scheme} of {name}: {reason}.")


@torch.no_grad()
def _plain_state(module: nn.Module, weights: Mapping[str, QuantizedWeight], without_weights: bool) -> dict[str, Tensor]:
    """Return the state of the model in float, quantized weights dequantized or left out, each tensor once."""
    plain = copy.deepcopy(module)
    for name, layer in weight_fake_quants(plain):
        layer.set_matrix(weights[name].dequantize())
    left_out = {id(layer.weight) for layer in quantized_layers(plain).values()} if without_weights else set()
    restore_float(plain)
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in plain.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"The state {name!r} of the model is no tensor: these formats cannot hold it.")
        key = (tensor.data_ptr(), tensor.shape)
        if id(tensor) in left_out or (tensor.numel() and key in seen):
            continue
        seen.add(key)
        found[name] = tensor.detach()
    return found


def _with_aliases(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the other names of tensors that the module shares."""
    by_storage = {(tensor.data_ptr(), tensor.shape): state[name] for name, tensor in own.items() if name in state}
    shared = {
        name: by_storage[key]
        for name, tensor in own.items()
        if name not in state and tensor.numel() and (key := (tensor.data_ptr(), tensor.shape)) in by_storage
    }
    return {**state, **shared}
