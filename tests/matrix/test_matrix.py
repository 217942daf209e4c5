"""Both callbacks with everything that a Trainer and a module can be: each alone, and every two together."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch

from lightning_qat import quantized_weights
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.nn import quantized_layers, weight_fake_quants
from tests.matrix.axes import AXES, allowed, make_ptq, make_qat, make_setup, refusal
from tests.matrix.covering import covering_array
from tests.matrix.models import Task, loaders

pytestmark = pytest.mark.filterwarnings("ignore")

DEFAULTS = {axis: next(iter(values)) for axis, values in AXES.items()}
SINGLES = [DEFAULTS] + [{**DEFAULTS, axis: value} for axis, values in AXES.items() for value in list(values)[1:]]
PAIRS = covering_array({axis: list(values) for axis, values in AXES.items()}, allowed)


def describe(combination):
    changes = [value for axis, value in combination.items() if value != DEFAULTS[axis]]
    return ", ".join(changes) or "defaults"


def run(combination, folder):
    """Fit, and return Trainer, module and callback."""
    setup = make_setup(combination, folder)
    qat = make_qat(combination)
    companions = [make_ptq(combination, folder)] if combination["ptq"] == "on" else []
    bars = any("ProgressBar" in type(callback).__name__ for callback in setup.callbacks)
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": bars,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, pl.callbacks.ModelCheckpoint) for each in setup.callbacks),
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        **setup.trainer,
    }
    if arguments.get("barebones"):
        arguments = {key: value for key, value in arguments.items() if key not in ("num_sanity_val_steps",)}
    trainer = pl.Trainer(callbacks=[qat, *companions, *setup.callbacks], **arguments)
    task = Task(**setup.task)
    trainer.fit(task, *loaders())
    return trainer, task, qat


def check(combination, folder):
    message = refusal(combination)
    if message is not None:
        with pytest.raises(QATConfigurationError, match=message):
            run(combination, folder)
        return
    trainer, task, _ = run(combination, folder)
    assert all(torch.tensor(task.losses).isfinite())
    assert quantized_layers(task)
    has_reached_the_end = not trainer.fast_dev_run
    for name, layer in weight_fake_quants(task):
        quantizer = layer.weight_fake_quant
        if has_reached_the_end:
            assert quantizer.num_bits == quantizer.scheme.num_bits, name
        assert quantizer.scale.dtype == torch.float32
    weights = quantized_weights(task)
    for name, layer in quantized_layers(task).items():
        expected = layer.fake_quantized_weight()
        assert torch.equal(layer.from_matrix(weights[name].dequantize(), expected).to(expected.dtype), expected), name
    copied = pickle.loads(pickle.dumps(copy.deepcopy(task).cpu()))
    assert set(copied.state_dict()) == set(task.state_dict())


@pytest.mark.parametrize("combination", SINGLES, ids=describe)
def test_each_alone(combination, tmp_path):
    check(combination, tmp_path)


@pytest.mark.parametrize("combination", PAIRS, ids=describe)
def test_every_two_together(combination, tmp_path):
    check(combination, tmp_path)
