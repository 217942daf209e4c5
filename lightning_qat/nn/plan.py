"""A plan: which layers turn into what, by which scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.core import QuantScheme
from lightning_qat.nn.adapters import find_adapter_class, is_adapter_layer
from lightning_qat.nn.layers import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATEmbedding,
    QATLayer,
    QATLinear,
    float_type,
    is_hf_conv1d,
)
from lightning_qat.nn.static_input import InputStatistics

QAT_CLASSES: dict[type[nn.Module], type[QATLayer]] = {
    qat_class.float_class: qat_class for qat_class in (QATLinear, QATConv1d, QATConv2d, QATConv3d, QATEmbedding)
}


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that is to be quantized.

    Attributes:
        name: Its name.
        module: The layer.
        qat_class: What it turns into.
        scheme: By which scheme.
        input_statistics: What calibration has seen of its inputs, if that is done and they get a static grid.
    """

    name: str
    module: nn.Module
    qat_class: type[QATLayer]
    scheme: QuantScheme
    input_statistics: InputStatistics | None = None

    def __post_init__(self) -> None:
        """Leave activations out where the input is an index."""
        if self.takes_index:
            object.__setattr__(self, "scheme", replace(self.scheme, activation=None))

    @property
    def takes_index(self) -> bool:
        """Whether the input says which rows to look up, and is no features to quantize or to calibrate on."""
        return issubclass(self.qat_class.float_class, nn.Embedding)

    @property
    def has_static_input(self) -> bool:
        """Whether its inputs get a static grid, which calibration has to find."""
        return self.scheme.has_static_activation

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All parameters that make up the weight; see :meth:`QATLayer.parameters_of`."""
        return self.qat_class.parameters_of(self.module)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return self.parameters[0]

    @property
    def matrix_shape(self) -> torch.Size:
        """``(O, I)`` of the weight."""
        return self.qat_class.to_matrix(self.weight.detach()).shape

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Return the float weight that is quantized, ``[O, I]``."""
        return self.qat_class.to_matrix(self.qat_class.weight_of(self.module))

    def __repr__(self) -> str:
        """Describe the layer in one line, without its module."""
        return f"PlannedLayer({self.name!r}, {float_type(self.module).__name__}, {self.scheme})"


@dataclass(frozen=True)
class Plan:
    """What is quantized and what is not.

    Attributes:
        layers: The layers to quantize, in the order of ``named_modules``.
        skipped: Why every other module that holds a matrix stays in float, by name.
        idle_targets: Targets of the rules that decide for no layer, since a later rule does.
    """

    layers: tuple[PlannedLayer, ...]
    skipped: dict[str, str]
    idle_targets: tuple[str, ...] = ()


def plan_exactly(
    root: nn.Module,
    schemes: Mapping[str, Mapping[str, Any]],
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
) -> Plan:
    """Return the plan that gives each named layer its scheme and quantizes nothing else.

    Raises:
        ValueError: If a layer does not exist or has no quantized form.
    """
    modules = dict(root.named_modules())
    layers = []
    for name, scheme in schemes.items():
        qat_class = find_qat_class(modules[name], mapping) if name in modules else None
        if qat_class is None:
            raise ValueError(
                f"The checkpoint quantizes '{name}', which is not a quantizable layer of this model. Build the model "
                "as in that run (and pass mapping= if it had one)."
            )
        layers.append(PlannedLayer(name, modules[name], qat_class, QuantScheme.parse(scheme)))
    return Plan(tuple(layers), {})


def plan_as_prepared(root: nn.Module, num_bits: float) -> Plan:
    """Return the plan by which a prepared ``root`` was prepared.

    Args:
        root: The model.
        num_bits: If this is below all widths, the layers with the smallest get it instead, on its own grid.
    """
    layers = []
    for name, module in root.named_modules():
        if isinstance(module, QATLayer):
            activation = None if module.input_fake_quant is None else module.input_fake_quant.scheme
            scheme = replace(module.weight_fake_quant.scheme, activation=activation)
            layers.append(PlannedLayer(name, module, type(module), scheme))
    smallest = min(layer.scheme.num_bits for layer in layers)
    if num_bits < smallest:
        layers = [
            replace(layer, scheme=layer.scheme.with_bits(num_bits)) if layer.scheme.num_bits == smallest else layer
            for layer in layers
        ]
    return Plan(tuple(layers), {})


def find_qat_class(
    module: nn.Module, mapping: Mapping[type[nn.Module], type[QATLayer]] | None
) -> type[QATLayer] | None:
    """Return what a layer turns into, by its exact class in float, or None."""
    layer_type = float_type(module)
    if is_adapter_layer(module):
        return (mapping or {}).get(layer_type) or find_adapter_class(module)
    if is_hf_conv1d(module):
        from lightning_qat.nn.hf_conv1d import QATConv1D

        return QATConv1D
    return {**QAT_CLASSES, **(mapping or {})}.get(layer_type)


def check_mapping(mapping: Mapping[type[nn.Module], type[QATLayer]] | None) -> dict[type[nn.Module], type[QATLayer]]:
    """Return ``mapping`` as a dict.

    Raises:
        TypeError: If it does not map layer classes to subclasses of both QATLayer and the layer, whose
            ``float_class`` is the layer and whose ``forward`` computes what the layer's does.
    """
    if not isinstance(mapping, (Mapping, type(None))):
        raise TypeError(f"mapping={mapping!r} must map layer classes to classes made for them.")
    for layer, qat_class in (mapping or {}).items():
        is_qat = isinstance(qat_class, type) and issubclass(qat_class, QATLayer)
        if not isinstance(layer, type) or not is_qat or vars(qat_class).get("float_class") is not layer:
            raise TypeError(
                f"mapping: {layer!r} cannot become {qat_class!r}. Map a layer class to a class made for it: class "
                "QATMyLinear(QATLinear, MyLinear): float_class = MyLinear; mapping={MyLinear: QATMyLinear}."
            )
        if not issubclass(qat_class, layer):
            raise TypeError(f"mapping: {qat_class.__name__} must be a subclass of {layer.__name__}, which it replaces.")
        if not _forward_fits(layer, qat_class):
            raise TypeError(
                f"mapping: {layer.__name__} has a forward of its own, which {qat_class.__name__} does not follow. Give "
                f"{qat_class.__name__} a forward that does the same with self.fake_quantized_weight() in place of "
                "self.weight, and self._input(x) in place of x."
            )
    return dict(mapping or {})


def _forward_fits(layer: type[nn.Module], qat_class: type[QATLayer]) -> bool:
    """Return whether the forward of ``qat_class`` was written for ``layer``, or for a base whose forward that has."""
    owner = next(base for base in qat_class.__mro__ if "forward" in vars(base))
    if issubclass(owner, layer):
        return owner is not layer
    return any(layer.forward is base.forward for base in layer.__mro__ if base in QAT_CLASSES)
