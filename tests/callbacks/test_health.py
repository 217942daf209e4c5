"""Health of the quantized weights: each figure by its definition, in aggregate and layer by layer."""

import csv
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qat import QATCallback
from lightning_qat.callbacks.health import HealthMonitor, print_layer_table
from lightning_qat.nn import prepare, quantized_layers, quantized_weights, set_num_bits, weight_fake_quants
from lightning_qat.nn.health import gradient_to_scale_ratio, layer_health, weight_sums
from lightning_qat.nn.oscillation import OscillationState, current_codes
from tests.helpers import TinyTask, fit

SCHEMES = ["w2", "w3g8", "w4-asym", "w8", "w2g8-nozero", "w4-tensor", "w4-signed_max", "w3g5-pad", "w1", "w1.58"]


def make_model(scheme="w4", seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.Conv1d(4, 6, 4), nn.Linear(16, 5))
    prepare(model, scheme, **options)
    return model


def by_definition(layer):
    """SQNR, clipped share and dead levels of one layer, in float64 and by Python."""
    quantized = layer.quantized_weight()
    matrix = layer.to_matrix(layer.weight).detach().double()
    error = quantized.dequantize().double() - matrix
    scheme = quantized.scheme
    scales = quantized.params.scale.double().abs()
    if scheme.granularity != "tensor":
        scales = scales.repeat_interleave(scheme.group_size or matrix.shape[1], 1)[:, : matrix.shape[1]]
    qmin, qmax = scheme.levels()[:2]
    reachable = min(qmax - qmin + 1, matrix.numel())
    return {
        "sqnr_db": 10 * math.log10(matrix.square().sum() / error.square().sum()),
        "clipped_fraction": (error.abs() > 0.5005 * scales).double().mean().item(),
        "dead_levels": 1 - len(set(quantized.codes.flatten().tolist())) / reachable,
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_figures_of_layers_and_their_aggregate_follow_the_definitions(scheme):
    model = make_model(scheme)
    with torch.no_grad():
        model[0].weight[0, 0] *= 20  # an outlier leaves levels of its group, or of the tensor, unused
    rows = {row.name: row for row in layer_health(model)}
    expected = {name: by_definition(layer) for name, layer in quantized_layers(model).items()}
    for name, figures in expected.items():
        for figure, value in figures.items():
            assert getattr(rows[name], figure) == pytest.approx(value, rel=1e-4, abs=1e-9), (name, figure)
    found = HealthMonitor().measure(model)
    assert found["dead_levels"] == pytest.approx(sum(each["dead_levels"] for each in expected.values()) / 3)
    sizes = {name: layer.weight.numel() for name, layer in quantized_layers(model).items()}
    clipped = sum(expected[name]["clipped_fraction"] * sizes[name] for name in sizes) / sum(sizes.values())
    assert found["clipped_fraction"] == pytest.approx(clipped)


def test_levels_are_dead_if_no_weight_of_the_layer_uses_them():
    model = nn.Sequential(nn.Linear(16, 2, bias=False))
    prepare(model, "w4")
    quantizer = model[0].weight_fake_quant
    quantizer.freeze(model[0].weight)
    quantizer.scale.fill_(1.0)
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(32).view(2, 16) % 4)  # codes 0 to 3 in both rows
    assert HealthMonitor().measure(model)["dead_levels"] == 12 / 16
    with torch.no_grad():
        model[0].weight[1] = -5.0  # another row uses a level more
    assert HealthMonitor().measure(model)["dead_levels"] == 11 / 16


def test_levels_that_cannot_be_used_are_not_dead():
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    prepare(model, "w8-tensor")
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, 8))  # 8 weights on 8 of 256 levels
    assert HealthMonitor().measure(model)["dead_levels"] == 0


@pytest.mark.parametrize("scheme", ["w4", "w3g8-asym", "w4-tensor"])
def test_of_a_large_layer_evenly_spaced_rows_are_looked_at(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False))
    prepare(model, scheme)
    found = HealthMonitor(most=256).measure(model)
    weight, codes = model[0].weight[::4].detach(), model[0].quantized_weight().codes[::4]
    error = model[0].fake_quantized_weight()[::4].detach() - weight
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(weight.square().sum() / error.square().sum()), rel=1e-5)
    qmin, qmax = model[0].weight_fake_quant.rung_scheme.levels()[:2]
    assert found["dead_levels"] == pytest.approx(1 - codes.unique().numel() / (qmax - qmin + 1))


def test_figures_of_a_weight_without_an_error_and_of_one_that_is_zero():
    model = make_model("w4-tensor")
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.zero_()
        model[1].weight.fill_(7.5)
        model[1].weight.view(-1)[0] = 0.0
    assert [row.sqnr_db for row in layer_health(model)][1] > 20
    assert math.isnan(layer_health(model)[0].sqnr_db)
    with torch.no_grad():
        model[1].weight.zero_()
    assert "sqnr_db" not in HealthMonitor().measure(model)


# ---------------------------------------------------------------------------------------------------- gradients


def test_the_ratio_is_that_of_the_relative_changes_of_one_step():
    """By LSQ's definition it is (ds / s) / (||dw|| / ||w||) of one small step of SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False)).double()
    prepare(model, "w4-tensor", learn_scales=True)
    layer, quantizer = model[0], model[0].weight_fake_quant
    x = torch.randn(64, 16, dtype=torch.float64)
    (model(x) - torch.randn(64, 8, dtype=torch.float64)).square().mean().backward()
    ratio = gradient_to_scale_ratio(layer).item()
    scale, weight = quantizer.qparams(layer.weight).scale.clone(), layer.weight.detach().clone()
    torch.optim.SGD(model.parameters(), 1e-2).step()
    of_scale = ((quantizer.qparams(layer.weight).scale - scale) / scale).abs().item()
    of_weight = ((layer.weight - weight).norm() / weight.norm()).item()
    assert ratio == pytest.approx(of_scale / of_weight, rel=1e-2)


def test_the_ratio_of_several_scales_and_layers():
    model = make_model("w4", learn_scales=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    model[2].weight.grad = None  # a layer that took no part in the loss
    ratios = []
    for layer in (model[0], model[1]):
        of_scales = layer.weight_fake_quant.log_scale_ratio.grad.square().mean().sqrt()
        ratios.append((of_scales * layer.weight.norm() / layer.weight.grad.norm()).item())
    monitor = HealthMonitor()
    monitor.see_gradients(model)
    assert monitor.measure(model)["gradient_to_scale_ratio"] == pytest.approx(math.sqrt(math.prod(ratios)))
    assert "gradient_to_scale_ratio" not in monitor.measure(model)  # of gradients that are gone
    model[1].weight.grad.zero_()
    monitor.see_gradients(model)
    assert monitor.measure(model)["gradient_to_scale_ratio"] == pytest.approx(ratios[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"scale_lr": 1e-2}, [3, 7, 11]), ({"scale_lr": 1e-2, "freeze_at": 6}, [3]), ({}, [])],
)
def test_the_ratio_is_logged_as_long_as_scales_are_learned(arguments, expected, tmp_path):
    logger = CSVLogger(tmp_path)
    fit(TinyTask(), QATCallback("w4", **arguments), max_steps=12, logger=logger, log_every_n_steps=4)
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["qat/num_bits"]]
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    assert [int(row["step"]) for row in rows if row.get("qat/gradient_to_scale_ratio")] == expected


class NoDoubles(TorchDispatchMode):
    """As on an accelerator that has no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert all(leaf.dtype != torch.float64 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)), func
        return result


def test_what_is_computed_on_the_device_of_the_weights_is_not_float64():
    model = make_model("w4", learn_scales=True)
    model[0](torch.ones(3, 16)).square().sum().backward()
    monitor, matrix, quantizer = HealthMonitor(), model[0].weight, model[0].weight_fake_quant
    with NoDoubles():
        monitor.see_gradients(model)
        sums = weight_sums(matrix, quantizer.qparams(matrix), quantizer.rung_scheme)
        counts = OscillationState.begin(current_codes(model[0]), can_freeze=True).counts(0.1)
    assert sums.counts.dtype == counts.dtype == torch.int64  # exact, however large
    assert monitor.measure(model)["gradient_to_scale_ratio"] > 0


def test_looking_at_gradients_changes_nothing():
    losses = []
    for every in (1, 1000):
        task = TinyTask()
        fit(task, QATCallback("w3", scale_lr=1e-2, health_every_n_steps=every), max_steps=10)
        losses.append(task.losses)
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------------------------- table


def test_the_table_has_a_row_for_each_quantized_weight(capsys):
    class Tied(TinyTask):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
            self.net[2].weight = self.net[0].weight

    callback = QATCallback("w3g8", oscillation={"momentum": 0.2, "freeze_threshold": 0.1, "start": 5})
    task = Tied()
    fit(task, callback, max_steps=40)
    capsys.readouterr()
    callback.layer_table(task)
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    rows = [line for line in lines if line.startswith("│ net.")]
    assert [row.split()[1] for row in rows] == ["net.0", "net.4"]
    for column in ("SQNR", "clipped", "dead", "scale", "oscillati", "frozen"):
        assert column in text
    first = next(row for row in layer_health(task) if row.name == "net.0")
    assert f"{first.sqnr_db:.1f}" in rows[0]
    share = callback.techniques[0].layer_figures()["net.0"]["frozen_fraction"]
    assert share > 0
    assert f"{share:.1%}" in rows[0]


def test_the_table_needs_no_trainer_and_leaves_out_what_is_not_quantized(capsys):
    model = make_model("w4")
    set_num_bits(model, 16)
    assert layer_health(model) == []
    set_num_bits(model, 4)
    print_layer_table(model)
    assert capsys.readouterr().out.count("w4") == 3
    assert {row.name for row in layer_health(model)} == {name for name, _ in weight_fake_quants(model)}
    scales = quantized_weights(model)["0"].params.scale.abs()
    assert layer_health(model)[0].scales == (scales.min().item(), scales.median().item(), scales.max().item())
