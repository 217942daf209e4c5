"""Fake quantization that is blended in, in real Trainer runs."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_qat import QATCallback, load_qat
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.helpers import StopAt, TinyTask, fit, loader, make_trainer


class Blends(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(pl_module.net[0].weight_fake_quant.blend)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blend_until": 0.5}, [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
        ({"blend_until": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ({"blend_until": 6, "fake_quant_after_n_steps": 2}, [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"blend_until": 6, "schedule": {0: 16, 2: 8, 5: 2}}, [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"blend_until": 0}, [1] * 10),
        ({}, [1] * 10),
    ],
)
def test_the_share_grows_linearly_from_the_start_of_fake_quantization(options, expected, accumulate):
    blends = Blends()
    fit(TinyTask(), QATCallback("w2", **options), blends, max_steps=10, accumulate_grad_batches=accumulate)
    assert blends.seen == pytest.approx([share for share in expected for _ in range(accumulate)])


def test_the_first_step_is_a_float_one_and_the_last_ones_are_quantized():
    plain, blended = TinyTask(), TinyTask()
    fit(plain, max_steps=10)
    fit(blended, QATCallback("w2", blend_until=5), max_steps=10)
    assert blended.losses[0] == plain.losses[0]
    assert blended.losses[1] == pytest.approx(plain.losses[1], abs=0.2)
    layer = blended.net[0]
    assert torch.equal(layer.fake_quantized_weight(), layer.quantized_weight().dequantize())


OPTIONS = {
    "observed": {"scheme": "w2g16", "blend_until": 12, "freeze_at": 20},
    "learned": {"scheme": "w2g16", "blend_until": 0.5, "scale_lr": 1e-2, "schedule": [4, 2]},
    "late": {"scheme": "w4a8", "blend_until": 12, "fake_quant_after_n_steps": 5},
}


@pytest.mark.parametrize("at", [4, 5, 6, 11, 12, 13])
@pytest.mark.parametrize("name", OPTIONS)
def test_resuming_in_the_middle_of_a_blend_is_bit_exact(name, at, tmp_path):
    whole, resumed = TinyTask(), TinyTask(seed=99)
    fit(whole, QATCallback(**OPTIONS[name]), StepCheckpoint(tmp_path, [at]), max_steps=24)
    fit(resumed, QATCallback(**OPTIONS[name]), max_steps=24, ckpt_path=tmp_path / f"step{at}.ckpt")
    assert resumed.losses == whole.losses[at:]
    assert_same(state_of(whole), state_of(resumed))


@pytest.mark.parametrize("name", OPTIONS)
def test_validating_a_checkpoint_in_the_middle_of_a_blend_gives_the_metric_of_the_run(name, tmp_path):
    task = TinyTask()
    with pytest.warns(UserWarning, match="before (its weights were fake-quantized in full|the last rung)"):
        trainer = fit(task, QATCallback(**OPTIONS[name]), StopAt(9), max_steps=24)
    expected = trainer.validate(task, loader(2), verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = make_trainer(QATCallback(**OPTIONS[name]))
    assert fresh.validate(TinyTask(seed=9), loader(2), ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected
    rebuilt = load_qat(TinyTask(seed=9), tmp_path / "last.ckpt")
    assert make_trainer().validate(rebuilt, loader(2), verbose=False) == expected


def test_a_second_fit_without_a_blend_quantizes_in_full():
    task = TinyTask()
    with pytest.warns(UserWarning, match="step 3, before its weights were fake-quantized in full \\(from step 8\\)"):
        fit(task, QATCallback("w2", blend_until=8), StopAt(3), max_steps=10)
    assert task.net[0].weight_fake_quant.blend == pytest.approx(2 / 8)
    blends = Blends()
    fit(task, QATCallback("w2"), blends, max_steps=3)
    assert blends.seen == [1] * 3


def test_the_share_and_the_width_of_inputs_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    schedule = {"name": "staggered", "weights": [4], "activations": {0: 16, 4: 8}}
    fit(TinyTask(), QATCallback("w4a8", schedule=schedule, blend_until=4), max_steps=8, logger=logger,
        log_every_n_steps=2)  # fmt: skip
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["qat/num_bits"]]
    assert [float(row["qat/blend"]) for row in rows] == [0.25, 0.75, 1, 1]  # of steps 1, 3, 5 and 7
    assert [float(row["qat/activation_bits"]) for row in rows] == [16, 16, 8, 8]


def test_the_summary_says_until_when(capsys):
    fit(TinyTask(), QATCallback("w2", blend_until=0.4), max_steps=10)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2 bits from step 0 of 10; blended in until step 4; scales never frozen" in text


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_fraction_works_on_the_shortest_run(steps):
    blends = Blends()
    fit(TinyTask(), QATCallback("w2", blend_until=0.5), blends, max_steps=steps)
    assert blends.seen[-1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blend_until": 10}, "blend_until=10 leaves none of 10 optimizer steps at full fake quantization"),
        (
            {"blend_until": 2, "fake_quant_after_n_steps": 3},
            "ends at step 2, but fake quantization starts only at step 3",
        ),
        ({"blend_until": 2, "schedule": {0: 16, 3: 2}}, "ends at step 2, but fake quantization starts only at step 3"),
        ({"blend_until": 5, "freeze_at": 4}, "freeze_at=4 freezes the scales at step 4, before the weights are fake-q"),
        ({"blend_until": 0.5, "freeze_at": 0.4}, "before the weights are fake-quantized in full at step 5"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(options, message):
    with pytest.raises(QATConfigurationError, match=message):
        fit(TinyTask(), QATCallback("w2", **options), max_steps=10)


def test_bad_positions_are_refused_at_once():
    with pytest.raises(ValueError, match=r"blend_until: .*training ends before 1.0"):
        QATCallback("w2", blend_until=1.0)
    with pytest.raises(QATConfigurationError, match=r"no known end.*blend_until"):
        fit(TinyTask(), QATCallback("w2", blend_until=0.5), max_epochs=-1)
