"""Grids and weights that come from quantization after training."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, quantize_model
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.callbacks.techniques import Initialization
from lightning_qat.core import QuantScheme, dequantize
from lightning_qat.nn import weight_fake_quants
from tests.helpers import TinyTask, batch_at, fit, make_trainer

CALIBRATION = [batch_at(index) for index in range(50, 54)]


class Grids(pl.Callback):
    """Keeps scales and weights as the first batch of every rung finds them."""

    def __init__(self):
        self.found = {}

    def on_before_backward(self, trainer, pl_module, loss):
        for name, layer in weight_fake_quants(pl_module):
            key = (name, layer.weight_fake_quant.num_bits)
            grid = layer.weight_fake_quant.qparams(layer.weight).scale.detach().clone()
            self.found.setdefault(key, (grid, layer.weight.detach().clone()))


@pytest.mark.parametrize("method", ["gptq", "imatrix", "rtn"])
@pytest.mark.parametrize("weights", [False, True])
def test_the_first_step_sees_what_the_method_finds(method, weights):
    task, grids = TinyTask(), Grids()
    expected = quantize_model(copy.deepcopy(task), CALIBRATION, methods=(method,), scheme="w3", observer="mse")
    init = {"method": method, "weights": weights, "calibration_data": CALIBRATION}
    before = {
        name: module.weight.detach().clone() for name, module in task.named_modules() if hasattr(module, "weight")
    }
    fit(task, QATCallback("w3", scale_lr=1e-3, init=init), grids, max_steps=2)
    for (name, _), (scale, weight) in grids.found.items():
        quantized = expected.weights[method, 3][name]
        assert torch.equal(scale, quantized.params.scale)
        assert torch.equal(weight, quantized.dequantize() if weights else before[name])


def test_every_rung_begins_with_a_grid_of_its_own():
    task, grids = TinyTask(), Grids()
    init = Initialization("gptq", calibration_data=CALIBRATION)
    snapshots = {}

    class Keep(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            snapshots[trainer.global_step] = copy.deepcopy(pl_module.net)

    fit(task, Keep(), QATCallback("w2", scale_lr=1e-3, schedule={0: 4, 3: 2}, init=init), grids, max_steps=6)
    assert {bits for _, bits in grids.found} == {4, 2}
    from lightning_qat import restore_float

    net = snapshots[3]
    restore_float(net)
    expected = quantize_model(net, CALIBRATION, methods=("gptq",), scheme="w2", observer="mse").weights["gptq", 2]
    for name, quantized in expected.items():
        assert torch.equal(grids.found[f"net.{name}", 2][0], quantized.params.scale)


def test_frozen_scales_may_be_initialised_without_being_learned():
    task, grids = TinyTask(), Grids()
    expected = quantize_model(copy.deepcopy(task), CALIBRATION, methods=("imatrix",), scheme="w3", observer="mse")
    callback = QATCallback("w3", freeze_at=0, init={"calibration_data": CALIBRATION})
    fit(task, callback, grids, max_steps=5)
    for name, layer in weight_fake_quants(task):
        scale = layer.weight_fake_quant.qparams(layer.weight).scale
        assert torch.equal(scale, expected.weights["imatrix", 3][name].params.scale)


def test_scales_that_would_be_observed_again_are_refused():
    with pytest.raises(QATConfigurationError, match=r"scale_lr=.*freeze_at=0"):
        fit(TinyTask(), QATCallback("w3", init="rtn"), max_steps=2)
    with pytest.raises(QATConfigurationError, match="scale_lr="):
        fit(TinyTask(), QATCallback("w3", init="rtn", freeze_at=1), max_steps=2)


@pytest.mark.parametrize("spec", ["awq", {"method": "gtpq"}, {"methods": "gptq"}, {"calibration_data": []}])
def test_what_cannot_be_is_refused_at_once(spec):
    with pytest.raises((ValueError, TypeError), match=r"awq|gptq|methods|no batches"):
        QATCallback("w3", scale_lr=1e-3, init=spec)


def test_a_loader_that_cannot_be_sampled_is_refused_with_the_remedy():
    with pytest.raises(QATConfigurationError, match="calibration_data="):
        fit(TinyTask(), QATCallback("w3", scale_lr=1e-3, init="gptq"), max_steps=2)


class Noisy(pl.LightningModule):
    """Draws random numbers in its dataset, its loader and itself; keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0].clone(), torch.rand(1)))
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class NoisyData(TensorDataset):
    def __getitem__(self, index):
        (x,) = super().__getitem__(index)
        return (x + torch.rand(16),)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sampling_calibration_batches_leaves_training_data_as_they_were(num_workers):
    def seen(init):
        pl.seed_everything(3)
        task = Noisy()
        loader = DataLoader(
            NoisyData(torch.randn(64, 16)), 8, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
        )
        callback = QATCallback("w4", scale_lr=1e-3, init=init)
        make_trainer(callback, max_steps=6).fit(task, loader)
        return task.seen

    for (x, drawn), (y, other) in zip(seen(None), seen({"method": "gptq", "num_samples": 20}), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(drawn, other)


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_resuming_is_exact_to_the_bit(stop, tmp_path):
    def callback():
        init = {"method": "gptq", "weights": True, "calibration_data": CALIBRATION}
        return QATCallback("w2", scale_lr=1e-3, schedule={0: 4, 5: 2}, init=init)

    whole = TinyTask()
    saver = StepCheckpoint(tmp_path, [stop])
    fit(whole, callback(), saver, max_steps=10)
    resumed = TinyTask(seed=5)
    fit(resumed, callback(), ckpt_path=saver.path(stop), max_steps=10)
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs), name


def test_tied_layers_take_one_grid():
    class Tied(TinyTask):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 8))
            self.net[2].weight = self.net[0].weight

    task = Tied()
    callback = QATCallback(
        "w3", scale_lr=1e-3, init={"method": "gptq", "weights": True, "calibration_data": CALIBRATION}
    )
    grids = Grids()
    fit(task, callback, grids, max_steps=1)
    scheme = QuantScheme.parse("w3")
    scale, weight = grids.found["net.0", 3]
    quantized = task.net[0].weight_fake_quant
    assert quantized is task.net[2].weight_fake_quant
    from lightning_qat.core import QuantParams, quantize

    params = QuantParams(scale)
    assert torch.allclose(dequantize(quantize(weight, params, scheme), params, scheme), weight)


class Ratios(pl.Callback):
    """Keeps, for every step, the learned ratio of a layer and whether the optimizer remembers anything of it."""

    def __init__(self, index):
        self.index, self.ratios, self.remembered = index, [], []

    def on_before_backward(self, trainer, pl_module, loss):
        ratio = pl_module.net[self.index].weight_fake_quant.log_scale_ratio
        self.ratios.append(ratio.detach().abs().max().item())
        self.remembered.append(bool(trainer.optimizers[0].state.get(ratio)))


INIT = {"method": "gptq", "weights": True, "calibration_data": CALIBRATION}


def test_a_layer_whose_width_stays_learns_on_and_keeps_its_weights():
    rules = [{"target": "*", "scheme": "w2"}, {"target": "net.0", "scheme": "w8"}]
    wide, narrow = Ratios(0), Ratios(2)
    fit(TinyTask(), QATCallback(rules, schedule={0: 8, 5: 2}, scale_lr=1e-2, init=INIT), wide, narrow, max_steps=8)
    assert all(ratio > 0 for ratio in wide.ratios[1:])
    assert all(wide.remembered[1:])
    assert narrow.ratios[5] == 0
    assert not narrow.remembered[5]
    assert narrow.remembered[6]


def test_a_rung_of_inputs_alone_leaves_weights_as_they_are():
    schedule = {"name": "staggered", "weights": [4], "activations": {0: 16, 5: 8}}
    seen = Ratios(0)
    fit(TinyTask(), QATCallback("w4a8", schedule=schedule, scale_lr=1e-2, init=INIT), seen, max_steps=8)
    assert all(ratio > 0 for ratio in seen.ratios[1:])


def test_a_second_fit_goes_on_from_what_was_learned():
    task, seen = TinyTask(), Ratios(0)
    callback = QATCallback("w4", scale_lr=1e-2, init=INIT)
    fit(task, callback, max_steps=5)
    fit(task, callback, seen, max_steps=5)
    assert seen.ratios[0] > 0


def test_layers_that_are_only_rounded_are_told_of():
    class Partial(TinyTask):
        def forward(self, x):
            return self.net[2](x.new_ones(len(x), 32)) + 0 * self.net[0](x[:0]).sum()

    with pytest.warns(UserWarning, match=r"init: .*layers begin as rounded to nearest: .*net\.0"):
        fit(Partial(), QATCallback("w4", scale_lr=1e-2, init=INIT), max_steps=2)
