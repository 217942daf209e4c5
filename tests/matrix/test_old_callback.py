"""What sank QuantizationAwareTraining, which Lightning had until 1.9; the numbers are of Lightning's issues."""

import io

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as pl_callbacks
from torch import nn

from lightning_qat import QATCallback, quantized_weights
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.nn import static_inputs
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.helpers import TinyTask, batch_at, fit, loader, make_trainer


class Keywords(TinyTask):
    """Takes and gives more than one tensor."""

    def forward(self, x, *factors, shift=None, **scales):
        for factor in (*factors, *scales.values()):
            x = x * factor
        return self.net(x if shift is None else x + shift)

    def loss(self, x):
        return F.mse_loss(self(x, 2.0, shift=torch.ones(16), scale=0.5), torch.tanh(x @ self.target))


def test_7926_and_15862_forward_takes_any_arguments():
    task = Keywords()
    fit(task, QATCallback("w4a8"), max_steps=3)
    assert task.net[0].input_fake_quant is not None
    assert len(task.losses) == 3


def test_6457_load_from_checkpoint_finds_no_unexpected_keys(tmp_path):
    task = TinyTask()
    fit(task, QATCallback("w4", scale_lr=1e-3), StepCheckpoint(tmp_path, [3]), max_steps=3)
    loaded = TinyTask.load_from_checkpoint(tmp_path / "step3.ckpt", strict=True)
    assert_same(loaded.state_dict(), {key: task.state_dict()[key] for key in loaded.state_dict()})


def test_7427_fit_is_called_twice():
    task, callback = TinyTask(), QATCallback("w2", schedule=[8, 2])
    for _ in range(2):
        trainer = fit(task, callback, max_steps=6)
        assert trainer.global_step == 6
        assert task.net[0].weight_fake_quant.num_bits == 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_7552_the_model_can_be_traced_and_exported():
    """TorchScript's successor is torch.export; scripting itself is deprecated."""
    task = TinyTask()
    fit(task, QATCallback("w4a8", scale_lr=1e-3, freeze_at=0.5), max_steps=4)
    task.eval()
    x = batch_at(1)
    with torch.no_grad():
        expected = task(x)
        assert torch.equal(torch.jit.trace(task.net, (x,))(x), expected)
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(task.net, (x,)), buffer)
        buffer.seek(0)
        assert torch.equal(torch.export.load(buffer).module()(x), expected)


def test_8485_a_run_is_resumed_in_the_middle(tmp_path):
    options = {"scheme": "w2", "schedule": [8, 4, 2], "scale_lr": 1e-3}
    whole, resumed = TinyTask(), TinyTask(seed=5)
    fit(whole, QATCallback(**options), StepCheckpoint(tmp_path, [7]), max_steps=12)
    fit(resumed, QATCallback(**options), max_steps=12, ckpt_path=tmp_path / "step7.ckpt")
    assert_same(state_of(whole), state_of(resumed))


@pytest.mark.parametrize("learn", [None, 1e-3])
def test_8507_observers_see_no_validation_data(learn):
    class Loud(TinyTask):
        """Validates on inputs a thousand times as large."""

        factor = 1000.0

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(self.factor * batch_at(batch_idx)))

    class Quiet(Loud):
        factor = 1.0

    grids = []
    for kind in (Loud, Quiet):
        task = kind()
        callback = QATCallback("w8a8-static", scale_lr=learn, activation_calibration_steps=8)
        fit(task, callback, max_steps=20, val_check_interval=2, num_sanity_val_steps=2)
        grids.append([each.qparams().scale for each in static_inputs(task).values()])
    assert len(grids[0]) == 2
    assert all(torch.equal(*pair) for pair in zip(*grids, strict=True))


def test_11047_pruning_and_quantization_in_one_run():
    task = TinyTask()
    pruning = pl_callbacks.ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False)
    fit(task, QATCallback("w4"), pruning, max_epochs=1, num_batches=6)
    for weight in quantized_weights(task).values():
        values = weight.dequantize()
        assert (values == 0).float().mean() >= 0.3
        assert len(weight.codes.unique()) <= 16


class Convolutional(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x.view(-1, 1, 4, 4)))).flatten(1))

    def training_step(self, batch, batch_idx):
        return self(batch_at(batch_idx)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_12890_batch_normalization_trains_beside_a_quantized_convolution():
    """Nothing is fused: at 8 bits statistics and gradients stay near those of the float run."""
    quantized, plain = Convolutional(), Convolutional()
    make_trainer(QATCallback("w8"), max_steps=5).fit(quantized, loader(5))
    make_trainer(max_steps=5).fit(plain, loader(5))
    assert quantized.norm.num_batches_tracked == 5
    torch.testing.assert_close(quantized.norm.running_var, plain.norm.running_var, rtol=0.02, atol=1e-3)
    assert not torch.equal(quantized.norm.weight, torch.ones(4))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("ckpt_path", ["best", "last", "file"])
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_12896_every_stage_takes_a_checkpoint_after_the_fit(stage, ckpt_path, tmp_path):
    task = TinyTask()
    saver = pl_callbacks.ModelCheckpoint(tmp_path, monitor="val/loss", mode="max", save_last=True)  # the first is best
    trainer = make_trainer(QATCallback("w2", scale_lr=1e-3), saver, max_epochs=3, enable_checkpointing=True)
    trainer.fit(task, loader(6), loader(4))
    saved = {"best": saver.best_model_path, "last": saver.last_model_path, "file": saver.last_model_path}[ckpt_path]
    path = saved if ckpt_path == "file" else ckpt_path
    found = getattr(trainer, stage)(task, loader(4), ckpt_path=path)
    fresh = getattr(make_trainer(QATCallback("w2", scale_lr=1e-3)), stage)(TinyTask(seed=9), loader(4), ckpt_path=saved)
    assert all(map(torch.equal, found, fresh)) if stage == "predict" else found == fresh
    assert len(quantized_weights(task)) == 2
