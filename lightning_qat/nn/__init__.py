"""Fake quantization as modules, and how they get into a model and out again."""

from lightning_qat.nn.convert import (
    apply_plan,
    check_finite,
    load_quantized_weights,
    prepare,
    quantized_inputs,
    quantized_layers,
    quantized_weights,
    restore_float,
    set_num_bits,
    static_inputs,
    weight_fake_quants,
)
from lightning_qat.nn.fake_quantize import FakeQuantizeConfig, WeightFakeQuantize
from lightning_qat.nn.input_calibration import calibrate_inputs
from lightning_qat.nn.input_fake_quantize import InputFakeQuantize
from lightning_qat.nn.layers import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATEmbedding,
    QATLayer,
    QATLinear,
)
from lightning_qat.nn.plan import Plan, PlannedLayer, check_mapping
from lightning_qat.nn.rules import PatternsLike, Rule, RulesLike, find_final_bits, parse_patterns, parse_rules
from lightning_qat.nn.selection import make_plan
from lightning_qat.nn.static_input import StaticInputConfig, StaticInputFakeQuantize

__all__ = [
    "FakeQuantizeConfig",
    "InputFakeQuantize",
    "PatternsLike",
    "Plan",
    "PlannedLayer",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATEmbedding",
    "QATLayer",
    "QATLinear",
    "Rule",
    "RulesLike",
    "StaticInputConfig",
    "StaticInputFakeQuantize",
    "WeightFakeQuantize",
    "apply_plan",
    "calibrate_inputs",
    "check_finite",
    "check_mapping",
    "find_final_bits",
    "load_quantized_weights",
    "make_plan",
    "parse_patterns",
    "parse_rules",
    "prepare",
    "quantized_inputs",
    "quantized_layers",
    "quantized_weights",
    "restore_float",
    "set_num_bits",
    "static_inputs",
    "weight_fake_quants",
]
