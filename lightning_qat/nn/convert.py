"""Swap float layers for fake-quantized ones in place, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_qat.core import (
    PASS_THROUGH_BITS,
    ActivationObserver,
    GradientEstimator,
    Observer,
    QuantizedWeight,
    QuantParams,
)
from lightning_qat.core.registry import build
from lightning_qat.estimators import ESTIMATORS, ClippedSTE
from lightning_qat.nn.fake_quantize import FakeQuantizeConfig, WeightFakeQuantize
from lightning_qat.nn.input_fake_quantize import InputFakeQuantize
from lightning_qat.nn.layers import QATLayer
from lightning_qat.nn.plan import Plan, PlannedLayer, check_mapping
from lightning_qat.nn.rules import PatternsLike, RulesLike, parse_patterns, parse_rules
from lightning_qat.nn.selection import make_plan
from lightning_qat.nn.static_input import StaticInputConfig, StaticInputFakeQuantize
from lightning_qat.observers import ACTIVATION_OBSERVERS, OBSERVERS, MinMaxObserver


def prepare(
    root: nn.Module,
    scheme: RulesLike,
    *,
    ignore: PatternsLike = (),
    observer: str | Mapping[str, Any] | Observer = "minmax",
    estimator: str | Mapping[str, Any] | GradientEstimator = "ste",
    learn_scales: bool = False,
    activation_observer: str | Mapping[str, Any] | ActivationObserver = "mse",
    learn_activations: bool = False,
    target_module: str | None = None,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
) -> Plan:
    """Put fake quantization into ``root``, in place; a layer that already has what is asked for keeps its state.

    Args:
        root: The model.
        scheme: A scheme or its shorthand, or a list of rules; see :func:`lightning_qat.nn.rules.parse_rules`.
        ignore: Patterns of modules that stay in float, or classes.
        observer: Where ranges come from: name, mapping with ``name`` and arguments, or object.
        estimator: How gradients pass the rounding, likewise.
        learn_scales: Whether scales become parameters.
        activation_observer: Where the ranges of static inputs come from, likewise; they are found by
            :func:`lightning_qat.nn.calibrate_inputs`, or in training.
        learn_activations: Whether the grids of static inputs become parameters.
        target_module: Name of the submodule outside which nothing is quantized.
        mapping: Further layer classes, each with the class that it turns into.

    Returns:
        What was quantized, and why the rest was not.

    Raises:
        ValueError: If the request does not fit the model (see :func:`~lightning_qat.nn.selection.make_plan`),
            or a weight is NaN or infinite.
    """
    observer = build(observer, OBSERVERS, "observer")
    estimator = build(estimator, ESTIMATORS, "estimator")
    plan = make_plan(root, parse_rules(scheme), parse_patterns(ignore), target_module, check_mapping(mapping))
    inputs = StaticInputConfig(
        build(activation_observer, ACTIVATION_OBSERVERS, "activation observer"), learn_activations
    )
    apply_plan(root, plan, observer, estimator, learn_scales, inputs)
    return plan


def apply_plan(
    root: nn.Module,
    plan: Plan,
    observer: Observer,
    estimator: GradientEstimator,
    learn_scales: bool = False,
    inputs: StaticInputConfig | None = None,
) -> None:
    """Carry out ``plan`` on ``root``, whose modules it refers to."""
    check_finite(plan.layers)
    planned = {layer.module for layer in plan.layers}
    for module in quantized_layers(root).values():
        if module not in planned:
            _restore_layer(module)
    by_weight: dict[nn.Parameter, WeightFakeQuantize] = {}
    for layer in plan.layers:
        config = FakeQuantizeConfig(replace(layer.scheme, activation=None), observer, estimator, learn_scales)
        if layer.weight not in by_weight:
            by_weight[layer.weight] = _weight_fake_quant(layer, config)
        _swap(layer, by_weight[layer.weight], estimator, inputs or StaticInputConfig())
    _set_fast_paths(root)


def check_finite(layers: Iterable[PlannedLayer]) -> None:
    """Check that no weight is NaN or infinite, one at a time: with adapters, each is a sum that takes memory.

    Raises:
        ValueError: If one is; the message names all such layers.
    """
    bad = [layer.name for layer in layers if not (layer.weight.is_meta or torch.isfinite(layer.matrix()).all())]
    if bad:
        raise ValueError(
            f"NaN or infinite weights in {', '.join(bad)}. Load a sound checkpoint, or lower the learning rate of "
            "the run that made it."
        )


def _weight_fake_quant(layer: PlannedLayer, config: FakeQuantizeConfig) -> WeightFakeQuantize:
    present = getattr(layer.module, "weight_fake_quant", None)
    if isinstance(present, WeightFakeQuantize):
        fields = ("scheme", "observer", "estimator", "learn_scales")
        if all(_is_same(getattr(present.config, field), getattr(config, field)) for field in fields):
            return present
    out_features, in_features = layer.matrix_shape
    return WeightFakeQuantize(config, out_features, in_features, layer.weight.device)


def _is_same(first: object, second: object) -> bool:
    """Return whether two components do the same; a copy of one without ``__eq__`` does."""
    is_one_class = type(first) is type(second)
    return first == second or (is_one_class and getattr(first, "__dict__", 0) == getattr(second, "__dict__", 1))


def _swap(
    layer: PlannedLayer, weight_fake_quant: WeightFakeQuantize, estimator: GradientEstimator, inputs: StaticInputConfig
) -> None:
    module = layer.module
    input_fake_quant = _input_fake_quant(layer, estimator, inputs)
    module.__class__ = layer.qat_class
    holder = module.get_submodule(layer.qat_class.inner)
    holder.register_module("weight_fake_quant", weight_fake_quant)
    holder.register_module("input_fake_quant", input_fake_quant)
    module.train(module.training)


def _input_fake_quant(
    layer: PlannedLayer, estimator: GradientEstimator, inputs: StaticInputConfig
) -> InputFakeQuantize | None:
    """Return the quantizer that the layer has already, if it is what is asked for, or a new one."""
    if layer.scheme.activation is None:
        return None
    arguments = (layer.scheme.activation, estimator, layer.qat_class.sample_dims, layer.weight.device)
    if not layer.has_static_input:
        made = InputFakeQuantize(*arguments)
    elif layer.input_statistics is None:
        made = StaticInputFakeQuantize(*arguments, inputs)
    else:
        calibrated = StaticInputFakeQuantize(*arguments, replace(inputs, observer=layer.input_statistics.observer))
        calibrated.adopt(layer.input_statistics.seen)
        return calibrated
    present = getattr(layer.module, "input_fake_quant", None)
    return present if isinstance(present, InputFakeQuantize) and _quantize_alike(present, made) else made


def _quantize_alike(first: InputFakeQuantize, second: InputFakeQuantize) -> bool:
    if type(first) is not type(second) or first.scheme != second.scheme:
        return False
    if isinstance(first, StaticInputFakeQuantize) and isinstance(second, StaticInputFakeQuantize):
        same_observer = _is_same(first.config.observer, second.config.observer)
        if not same_observer or first.config.learn != second.config.learn:
            return False
    return _is_same(first.estimator, second.estimator)


def restore_float(root: nn.Module) -> None:
    """Take all fake quantization out of ``root``, in place: every module has its original class again.

    What is left after training are the float weights underneath, not the levels that training rounded them to; see
    :func:`quantized_weights` for those. After ``PTQResults.apply`` there are no others: the quantized ones stay.
    """
    for layer in quantized_layers(root).values():
        _restore_layer(layer)
    _set_fast_paths(root)


def _restore_layer(layer: QATLayer) -> None:
    holder = layer.get_submodule(layer.inner)
    del holder._modules["weight_fake_quant"], holder._modules["input_fake_quant"]
    layer.__class__ = layer.float_class  # type: ignore[assignment]


def _set_fast_paths(root: nn.Module) -> None:
    """Turn off the fused inference path of encoder layers that hold quantized ones: it would bypass them."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            holds_quantized = any(isinstance(child, QATLayer) for child in module.modules())
            if holds_quantized and "_float_activation_kind" not in vars(module):
                module._float_activation_kind = module.activation_relu_or_gelu  # type: ignore[assignment]
                module.activation_relu_or_gelu = 0
            elif not holds_quantized and "_float_activation_kind" in vars(module):
                module.activation_relu_or_gelu = vars(module).pop("_float_activation_kind")


def quantized_layers(root: nn.Module) -> dict[str, QATLayer]:
    """Return the fake-quantized layers of ``root`` by name."""
    return {name: module for name, module in root.named_modules() if isinstance(module, QATLayer)}


def weight_fake_quants(root: nn.Module) -> Iterator[tuple[str, QATLayer]]:
    """Yield name and layer of each distinct quantized weight: of layers that share one, the first."""
    seen = set()
    for name, layer in quantized_layers(root).items():
        if layer.weight_fake_quant not in seen:
            seen.add(layer.weight_fake_quant)
            yield name, layer


def static_inputs(root: nn.Module) -> dict[str, StaticInputFakeQuantize]:
    """Return the quantizers of static inputs by the names of their layers."""
    quantizers = {name: layer.input_fake_quant for name, layer in quantized_layers(root).items()}
    return {name: each for name, each in quantizers.items() if isinstance(each, StaticInputFakeQuantize)}


def quantized_inputs(root: nn.Module) -> dict[str, QuantParams]:
    """Return the static grid of the inputs of every layer that has one, on the current rung.

    A layer with dynamic inputs, or inputs in float, has no entry. Levels are ``(code - zero_point) * scale`` for the
    codes of ``layer.input_fake_quant.rung_scheme``.

    Raises:
        ValueError: If a grid is not calibrated yet, or its rung is the pass-through; layers are named.
    """
    quantizers = static_inputs(root)
    if waiting := [name for name, each in quantizers.items() if each.pass_through or not each.is_calibrated]:
        raise ValueError(
            f"The inputs of {', '.join(waiting)} have no grid yet: train until their calibration, or call "
            "lightning_qat.nn.calibrate_inputs(model, batches)."
        )
    with torch.no_grad():
        found = {name: each.qparams() for name, each in quantizers.items()}
    return {
        name: QuantParams(params.scale.clone(), None if params.zero_point is None else params.zero_point.clone())
        for name, params in found.items()
    }


def set_num_bits(root: nn.Module, num_bits: float, activation_bits: float | None = None) -> None:
    """Bring all weights and inputs of ``root`` to a rung: each to ``max(num_bits, its own width)``.

    Args:
        root: The model.
        num_bits: The rung.
        activation_bits: The rung of inputs, if it is another.
    """
    for layer in quantized_layers(root).values():
        layer.weight_fake_quant.set_num_bits(num_bits)
        if layer.input_fake_quant is not None:
            layer.input_fake_quant.set_num_bits(num_bits if activation_bits is None else activation_bits)


def quantized_weights(root: nn.Module) -> dict[str, QuantizedWeight]:
    """Return codes and grid of every quantized layer of ``root`` on its current rung.

    Raises:
        ValueError: If a weight is NaN or infinite, or a layer is still at its pass-through; it is named. If
            ``root`` has no quantized layer.
    """
    if not quantized_layers(root):
        raise ValueError(
            "The model has no fake-quantized layers. Load a checkpoint of a run with QATCallback by load_qat, or put "
            "quantizers in with prepare."
        )
    weights = {}
    for name, layer in quantized_layers(root).items():
        try:
            weights[name] = layer.quantized_weight()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return weights


@torch.no_grad()
def load_quantized_weights(
    root: nn.Module, plan: Plan, weights: Mapping[str, QuantizedWeight], num_bits: float
) -> None:
    """Put quantized weights into a float ``root``, in place.

    The weights become their dequantized values and pass unchanged from then on; inputs are fake-quantized as
    the schemes say.

    Args:
        root: The model, or a copy of the one that ``plan`` was made for.
        plan: Its layers.
        weights: Quantized weights by layer name.
        num_bits: The rung of the schedule that they are on.
    """
    prepare_passing(root, plan)
    for name, layer in quantized_layers(root).items():
        load_quantized_weight(layer, weights[name], num_bits)


def prepare_passing(root: nn.Module, plan: Plan) -> None:
    """Put fake quantization into a float ``root``, in place, with all weights and inputs passing unchanged.

    Args:
        root: The model, or a copy of the one that ``plan`` was made for.
        plan: Its layers.
    """
    modules = dict(root.named_modules())
    own = Plan(tuple(replace(layer, module=modules[layer.name]) for layer in plan.layers), plan.skipped)
    apply_plan(root, own, MinMaxObserver(), ClippedSTE())
    set_num_bits(root, PASS_THROUGH_BITS)


@torch.no_grad()
def load_quantized_weight(layer: QATLayer, quantized: QuantizedWeight, num_bits: float) -> None:
    """Give a layer whose weight passes unchanged dequantized values, and quantize its input at ``num_bits``."""
    layer.set_matrix(quantized.dequantize())
    layer.weight_fake_quant.loaded = quantized
    if layer.input_fake_quant is not None:
        layer.input_fake_quant.set_num_bits(num_bits)
