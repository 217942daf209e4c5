"""Scales that freeze when they have come to rest, in real Trainer runs."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_qat import QATCallback
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.scale_drift import DriftBound
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.nn import weight_fake_quants
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.callbacks.test_schedules_in_fit import Scripted, diverges_at, plateau
from tests.callbacks.test_schedules_in_fit import fit as fit_and_validate
from tests.helpers import StopAt, TinyTask, fit


class Scales(pl.Callback):
    """Writes down scales and whether they are frozen, as each step is computed."""

    def __init__(self):
        self.log_scales, self.frozen = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        layers = [layer for _, layer in weight_fake_quants(pl_module)]
        scales = [layer.weight_fake_quant.qparams(layer.weight).scale for layer in layers]
        self.log_scales.append([scale.detach().abs().log() for scale in scales])
        self.frozen.append(layers[0].weight_fake_quant.frozen)

    def drift(self, first, last):
        pairs = zip(self.log_scales[first], self.log_scales[last], strict=True)
        return torch.stack([(a - b).abs().mean() for a, b in pairs]).mean().item()


class Decays(TinyTask):
    """Comes to rest: its learning rate goes down geometrically."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


RUNS = {
    "observed": {"scheme": "w2g16"},
    "learned": {"scheme": "w2g16", "scale_lr": "same"},
    "costly": {"scheme": "w2", "observer": {"name": "mse", "refresh_every_n_steps": 2}},
    "annealed": {"scheme": "w2g16-bf16", "schedule": {0: 8, 3: 4, 7: 2}},
}
BOUND = {"drift_below": 5e-3, "every_n_steps": 4}


@pytest.mark.parametrize("name", RUNS)
def test_they_freeze_at_the_first_window_below_the_bound(name):
    free, scales = Scales(), Scales()
    fit(Decays(), QATCallback(**RUNS[name]), free, max_steps=60)
    callback = QATCallback(**RUNS[name], freeze_at=BOUND)
    fit(Decays(), callback, scales, max_steps=60)
    first = 7 if name == "annealed" else 0
    expected = next(step for step in range(first + 4, 60, 4) if free.drift(step - 4, step) < 5e-3)
    assert 8 < expected < 50
    assert scales.frozen == [step >= expected for step in range(60)]
    assert callback.timeline.freeze_step == expected
    for later in scales.log_scales[expected:]:
        assert all(torch.equal(a, b) for a, b in zip(later, scales.log_scales[expected], strict=True))


def test_accumulation_counts_optimizer_steps():
    scales = Scales()
    fit(Decays(), QATCallback("w2g16", freeze_at={"drift_below": 10.0, "every_n_steps": 3}), scales, max_steps=8,
        accumulate_grad_batches=2)  # fmt: skip
    assert scales.frozen == [False] * 6 + [True] * 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"not_before": 6}, 9),
        ({"not_before": 0.5}, 13),
        ({}, 3),
    ],
)
def test_nothing_is_measured_before_its_position(options, expected):
    scales = Scales()
    fit(
        Decays(),
        QATCallback("w4", freeze_at={"drift_below": 10.0, "every_n_steps": 3, **options}),
        scales,
        max_steps=20,
    )
    assert scales.frozen.index(True) == expected


def test_nothing_is_measured_during_a_blend():
    scales = Scales()
    callback = QATCallback("w4", freeze_at={"drift_below": 10.0, "every_n_steps": 3}, blend_until=7)
    fit(Decays(), callback, scales, max_steps=20)
    assert scales.frozen.index(True) == 10


@pytest.mark.parametrize("at", [5, 7, 8, 9, 12, 13, 35])
@pytest.mark.parametrize("name", RUNS)
def test_resuming_in_the_middle_of_a_window_is_bit_exact(name, at, tmp_path):
    options = {**RUNS[name], "freeze_at": BOUND}
    whole, resumed, scales = Decays(), Decays(seed=99), Scales()
    first, second = QATCallback(**options), QATCallback(**options)
    fit(whole, first, StepCheckpoint(tmp_path, [at]), max_steps=50)
    fit(resumed, second, scales, max_steps=50, ckpt_path=tmp_path / f"step{at}.ckpt")
    assert first.timeline.freeze_step == second.timeline.freeze_step is not None
    assert resumed.losses == whole.losses[at:]
    assert_same(state_of(whole), state_of(resumed))
    assert scales.frozen == [step >= first.timeline.freeze_step for step in range(at, 50)]


def test_a_run_whose_scales_never_rest_warns():
    callback = QATCallback("w2g16", freeze_at={"drift_below": 1e-9, "every_n_steps": 3})
    with pytest.warns(UserWarning, match=r"not frozen: their drift in 3 steps of the last rung was never below 1e-09"):
        fit(TinyTask(), callback, max_steps=10)


def test_a_run_that_did_not_reach_its_last_rung_is_warned_of_that_alone():
    callback = QATCallback("w2", schedule=[8, 2], freeze_at={"drift_below": 1e-9, "every_n_steps": 3})
    with pytest.warns(UserWarning, match="before the last rung") as caught:
        fit(TinyTask(), callback, StopAt(4), max_steps=20)
    assert sum("not frozen" in str(warning.message) for warning in caught) == 0


def test_fit_twice_measures_again():
    callback, scales = QATCallback("w4", freeze_at={"drift_below": 10.0, "every_n_steps": 3}), Scales()
    task = Decays()
    for _ in range(2):
        fit(task, callback, scales, max_steps=6)
    assert scales.frozen == ([False] * 3 + [True] * 3) * 2


def test_going_back_from_the_last_rung_thaws_the_scales():
    """Frozen at 12 on 2 bits, back at 15, on 2 bits again at 20 and frozen 2 steps later."""
    scales = Scales()
    callback = QATCallback(
        "w2", schedule=plateau([8, 2], end=None), freeze_at={"drift_below": 10.0, "every_n_steps": 2}
    )
    fit_and_validate(Scripted(diverges_at(15)), callback, scales, max_steps=30, val_check_interval=5)
    assert callback.timeline.rungs == ((0, 8), (10, 2), (15, 8), (20, 2))
    assert [step for step in range(30) if scales.frozen[step]] == [12, 13, 14, *range(22, 30)]


def test_the_summary_says_at_which_drift(capsys):
    fit(Decays(), QATCallback("w4", freeze_at=DriftBound(10.0, every_n_steps=3)), max_steps=10)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "scales frozen once they drift by less than 10 in 3 steps" in text


@pytest.mark.parametrize(
    ("freeze_at", "error", "message"),
    [
        ({}, TypeError, "freeze_at={}: .*drift_below"),
        ({"drift_below": 1e-3, "window": 5}, TypeError, "takes drift_below, every_n_steps and not_before"),
        ({"drift_below": 0.0}, ValueError, "drift_below=0.0 must be positive"),
        ({"drift_below": 1e-3, "every_n_steps": 0}, ValueError, "every_n_steps=0 must be positive"),
        ({"drift_below": 1e-3, "every_n_steps": 1.5}, TypeError, "every_n_steps=1.5 must be a whole number"),
        ({"drift_below": 1e-3, "not_before": 1.0}, ValueError, "training ends before 1.0"),
    ],
)
def test_bad_bounds_are_refused(freeze_at, error, message):
    with pytest.raises(error, match=message):
        QATCallback("w4", freeze_at=freeze_at)


def test_a_window_within_which_no_scale_can_move_is_refused():
    observer = {"name": "mse", "refresh_every_n_steps": 100}
    with pytest.raises(ValueError, match=r"looks at the weights every 100 steps.*Give every_n_steps=100 or more"):
        QATCallback("w4", observer=observer, freeze_at={"drift_below": 1e-3})
    QATCallback("w4", observer=observer, scale_lr=1e-3, freeze_at={"drift_below": 1e-3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_at": {"drift_below": 1.0, "every_n_steps": 20}}, "from step 0 to step 20.*only 20 optimizer steps"),
        ({"freeze_at": {"drift_below": 1.0, "not_before": 0.9, "every_n_steps": 3}}, "from step 18 to step 21"),
        ({"freeze_at": {"drift_below": 1.0, "every_n_steps": 5}, "schedule": {0: 8, 16: 4}}, "from step 16 to step 21"),
    ],
)
def test_a_run_too_short_for_a_window_is_refused(options, message):
    with pytest.raises(QATConfigurationError, match=message):
        fit(TinyTask(), QATCallback("w4", **options), max_steps=20)
