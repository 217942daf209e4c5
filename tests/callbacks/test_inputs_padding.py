"""Tokens of padding have no say in the grids of static inputs."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import QATCallback, quantize_model
from lightning_qat.nn import prepare, quantized_inputs
from lightning_qat.nn.input_calibration import calibrate_inputs
from tests.helpers import TinyTask, make_trainer


def padded_batch(seed: int, padding: float = 100.0) -> dict[str, torch.Tensor]:
    """Four rows of five tokens of which one to four count; the others have values out of the ordinary."""
    mask = torch.arange(5) < torch.tensor([[1], [2], [3], [4]])
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(seed))
    return {"x": torch.where(mask[..., None], x, torch.full_like(x, padding)), "attention_mask": mask.long()}


class Padded(TinyTask):
    """A task whose batches are padded."""

    def forward(self, x, attention_mask=None):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        outputs = self(**batch)
        return (outputs * batch["attention_mask"][..., None]).square().mean()


def ranges(model: nn.Module) -> dict[str, float]:
    return {name: grid.scale.item() for name, grid in quantized_inputs(model).items()}


def in_training(padding: float) -> nn.Module:
    task = Padded()
    data = [padded_batch(seed, padding) for seed in range(8)]
    callback = QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=3)
    make_trainer(callback, max_steps=len(data)).fit(
        task, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None)
    )
    return task


def without_trainer(padding: float) -> nn.Module:
    task = Padded().eval()
    prepare(task, "w8a8-static")
    calibrate_inputs(task, [padded_batch(seed, padding) for seed in range(3)])
    return task


def after_training(padding: float) -> nn.Module:
    task = Padded().eval()
    batches = [padded_batch(seed, padding) for seed in range(3)]
    return quantize_model(task, batches, methods=("rtn",), scheme="w8a8-static").apply(task, "rtn", 8)


@pytest.mark.parametrize("calibrated", [in_training, without_trainer, after_training])
def test_what_padding_holds_changes_no_grid(calibrated):
    expected = ranges(calibrated(padding=0.0))
    assert expected
    assert ranges(calibrated(padding=100.0)) == expected


@pytest.mark.parametrize("calibrated", [in_training, without_trainer, after_training])
def test_without_a_mask_it_would(calibrated, monkeypatch):
    for module in ("nn.input_calibration", "callbacks.techniques.inputs", "nn.calibrate"):
        monkeypatch.setattr(f"lightning_qat.{module}.find_mask", lambda batch: None)
    assert ranges(calibrated(padding=100.0)) != ranges(calibrated(padding=0.0))
