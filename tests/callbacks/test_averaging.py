"""Weight averaging beside QATCallback: grids are never averaged, checkpoints stay portable."""

import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks

from lightning_qat import QATCallback, load_qat
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from tests.callbacks.test_checkpoints import RUNS, STEPS, assert_same, state_of
from tests.helpers import TinyTask, fit, loader, make_trainer

EMA = getattr(pl_callbacks, "EMAWeightAveraging", None)
pytestmark = pytest.mark.skipif(EMA is None, reason="this Lightning has no EMAWeightAveraging")


class Scales(pl_callbacks.Callback):
    """Records the observed scales of the first layer while the step is computed."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append(pl_module.net[0].weight_fake_quant.scale.clone())


@pytest.mark.parametrize("name", RUNS)
def test_averaging_leaves_the_live_grid_alone(name):
    with_ema, without = TinyTask(), TinyTask()
    scales, expected = Scales(), Scales()
    fit(with_ema, QATCallback(**RUNS[name]), EMA(decay=0.9), scales, max_steps=STEPS)
    fit(without, QATCallback(**RUNS[name]), expected, max_steps=STEPS)
    assert with_ema.losses == without.losses
    assert torch.equal(torch.stack(scales.seen), torch.stack(expected.seen))
    averaged, last = with_ema.net[0].weight_fake_quant, without.net[0].weight_fake_quant
    assert not torch.equal(with_ema.net[0].weight, without.net[0].weight)
    assert torch.equal(averaged.scale, last.scale)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", RUNS)
def test_checkpoint_of_the_average_is_portable(name, tmp_path):
    task, path = TinyTask(), tmp_path / f"step{STEPS}.ckpt"
    fit(task, QATCallback(**RUNS[name]), EMA(decay=0.9), StepCheckpoint(tmp_path, [STEPS]), max_steps=STEPS)
    plain = TinyTask.load_from_checkpoint(path, strict=True)
    assert torch.equal(plain.net[0].weight, task.net[0].weight)  # the average was copied at the end of training
    expected = make_trainer().validate(task, loader(2), verbose=False)
    assert make_trainer().validate(load_qat(TinyTask(seed=99), path), loader(2), verbose=False) == expected
    trainer = make_trainer(QATCallback(**RUNS[name]))
    assert trainer.validate(TinyTask(seed=99), loader(2), ckpt_path=path, verbose=False) == expected


@pytest.mark.parametrize("at", [5, 14, 22])
@pytest.mark.parametrize("name", RUNS)
def test_resuming_with_an_average_is_bit_exact(name, at, tmp_path):
    whole, resumed = TinyTask(), TinyTask(seed=99)
    fit(whole, QATCallback(**RUNS[name]), EMA(decay=0.9), StepCheckpoint(tmp_path, [at]), max_steps=STEPS)
    path = tmp_path / f"step{at}.ckpt"
    fit(resumed, QATCallback(**RUNS[name]), EMA(decay=0.9), max_steps=STEPS, ckpt_path=path)
    assert resumed.losses == whole.losses[at:]
    assert_same(state_of(whole), state_of(resumed))
