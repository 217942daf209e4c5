"""Schedules in real Trainer runs: curves, widths of weights and inputs apart, and bits that follow a metric."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lightning_qat import QATCallback, load_qat
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.callbacks.techniques import Technique
from lightning_qat.cli.contest import check_rungs
from lightning_qat.nn import quantized_layers
from lightning_qat.schedules import Plateau
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.helpers import StopAt, TinyTask, batch_at, loader, make_trainer


def val_loader():
    return DataLoader(torch.zeros(2, 1))


def fit(task, *callbacks, ckpt_path=None, num_batches=100, **kwargs):
    """Fit ``task`` with a validation loader that gives its batches every time, and return the Trainer."""
    trainer = make_trainer(*callbacks, **kwargs)
    trainer.fit(task, train_loader(num_batches), val_loader(), ckpt_path=ckpt_path)
    return trainer


class train_loader(loader):
    """Begins every epoch anew, also if the last batch of the one before was not followed by a look for more."""

    def __iter__(self):
        self.position %= self.num_batches
        return super().__iter__()


class Widths(pl.Callback):
    """Writes down the widths of weights and inputs in every batch."""

    def __init__(self):
        self.weights, self.inputs = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        layer = pl_module.net[0]
        self.weights.append(layer.weight_fake_quant.num_bits)
        self.inputs.append(layer.input_fake_quant and layer.input_fake_quant.num_bits)


class Scripted(TinyTask):
    """Validates to what a function of the optimizer step returns."""

    def __init__(self, script, seed=0, **kwargs):
        super().__init__(seed, **kwargs)
        self.script = script

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(float(self.script(self.trainer.global_step))))


def runs(bits):
    """Return [width, number of batches] of a list of widths."""
    found = []
    for width in bits:
        if found and found[-1][0] == width:
            found[-1][1] += 1
        else:
            found.append([width, 1])
    return found


# ------------------------------------------------------------------------------------- linear, cosine, staggered


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [[8, 2], [7, 2], [6, 2], [5, 2], [4, 2], [3, 2], [2, 12]]),
        ({"name": "cosine", "start_bits": 4, "end": 0.75}, [[4, 9], [3, 9], [2, 6]]),
        ({"name": "linear", "start_bits": 16, "end": 7}, [[16, 4], [8, 1], [6, 1], [4, 1], [2, 17]]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ramps_count_optimizer_steps(schedule, expected, accumulate):
    widths = Widths()
    fit(TinyTask(), QATCallback("w2", schedule=schedule), widths, max_steps=24, accumulate_grad_batches=accumulate)
    assert runs(widths.weights) == [[bits, steps * accumulate] for bits, steps in expected]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_ramps_reach_the_final_width_on_the_shortest_run(steps):
    widths = Widths()
    fit(TinyTask(), QATCallback("w2", schedule="cosine"), widths, max_steps=steps)
    assert widths.weights[-1] == 2


STAGGERED = {
    "weights first": ({"weights": [8, 4], "activations": {0: 16, 9: 8}}, [[8, 6], [4, 6]], [[16, 9], [8, 3]]),
    "activations first": ({"weights": {0.0: 16, 0.5: 4}, "activations": [8]}, [[16, 6], [4, 6]], [[8, 12]]),
}


@pytest.mark.parametrize("name", STAGGERED)
def test_weights_and_inputs_have_widths_of_their_own(name, capsys):
    parts, weights, inputs = STAGGERED[name]
    widths, task = Widths(), TinyTask()
    callback = QATCallback("w4a8", schedule={"name": "staggered", **parts}, freeze_at=0.8)
    fit(task, callback, widths, max_steps=12)
    assert runs(widths.weights) == weights
    assert runs(widths.inputs) == inputs
    assert task.net[0].weight_fake_quant.frozen
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    first = {"weights first": "16 bits from step 0, 8 bits from step 9", "activations first": "8 bits from step 0"}
    assert f"of 12; inputs: {first[name]}; scales frozen from step 9" in text


INPUTS_LAST = {"name": "staggered", "weights": [4], "activations": {0: 8, 9: 4}}


def test_scales_do_not_freeze_before_the_last_rung_of_inputs():
    with pytest.raises(QATConfigurationError, match=r"at step 8, before the last rung \(inputs at 4 bits\).*step 9"):
        fit(TinyTask(), QATCallback("w4a4", schedule=INPUTS_LAST, freeze_at=8), max_steps=12)
    drift = {"drift_below": 100.0, "every_n_steps": 2}
    with pytest.raises(QATConfigurationError, match="from step 9 to step 11"):
        fit(TinyTask(), QATCallback("w4a4", schedule=INPUTS_LAST, freeze_at=drift), max_steps=11)
    callback = QATCallback("w4a4", schedule=INPUTS_LAST, freeze_at=drift)
    fit(TinyTask(), callback, max_steps=14)
    assert callback.timeline.freeze_step == 11
    assert [callback.timeline.is_frozen(step) for step in (10, 11)] == [False, True]


def test_the_rungs_of_inputs_count_when_the_best_checkpoint_is_kept(tmp_path):
    callback, checkpoint = QATCallback("w4a4", schedule=INPUTS_LAST), ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(UserWarning, match="whose best value an annealed run"):
        fit(TinyTask(), callback, checkpoint, max_steps=12, val_check_interval=4, enable_checkpointing=True)


def test_a_run_that_stops_before_the_last_rung_of_inputs_warns():
    schedule = {"name": "staggered", "weights": [4], "activations": {0: 16, 9: 8}}
    with pytest.warns(UserWarning, match=r"on the rung of 16 bits, before the last rung \(8 bits from step 9\)"):
        fit(TinyTask(), QATCallback("w4a8", schedule=schedule), StopAt(8), max_steps=12)


class Rungs(Technique):
    """Writes down when a rung begins."""

    name = "rungs"

    def __init__(self):
        self.steps = []

    def on_new_rung(self, trainer, pl_module):
        self.steps.append(trainer.global_step)

    def on_rung_restored(self, trainer, pl_module):
        self.steps.append(-trainer.global_step)

    def state_dict(self):
        return {"steps": list(self.steps)}

    def load_state_dict(self, state):
        self.steps = list(state["steps"])


@pytest.mark.parametrize("at", [5, 6, 9, 10])
def test_techniques_are_told_of_the_rungs_of_inputs_and_resuming_is_exact(at, tmp_path):
    parts, rungs, resumed_rungs = STAGGERED["weights first"][0], Rungs(), Rungs()
    options = {"scheme": "w4a8", "schedule": {"name": "staggered", **parts}, "scale_lr": 1e-2}
    whole, resumed = TinyTask(), TinyTask(seed=9)
    fit(whole, QATCallback(**options, techniques=[rungs]), StepCheckpoint(tmp_path, [at]), max_steps=12)
    callback = QATCallback(**options, techniques=[resumed_rungs])
    fit(resumed, callback, max_steps=12, ckpt_path=tmp_path / f"step{at}.ckpt")
    assert rungs.steps == resumed_rungs.steps == [0, 6, 9]
    assert resumed.losses == whole.losses[at:]
    assert_same(state_of(whole), state_of(resumed))


# ---------------------------------------------------------------------------------------------------- plateau


def plateau(bits=(8, 4, 2), **options):
    return {"name": "plateau", "bits": list(bits), "patience": 1, **options}


def test_bits_follow_the_metric():
    """Better until step 12, then never again; and no rung takes longer than its share of the time until step 30."""
    widths = Widths()
    callback = QATCallback("w2", schedule=plateau())
    fit(Scripted(lambda step: max(-step, -12)), callback, widths, max_steps=60, val_check_interval=4)
    assert runs(widths.weights) == [[8, 15], [4, 5], [2, 40]]  # the first rung ran out of time at 15 of 30
    callback, widths = QATCallback("w2", schedule=plateau()), Widths()
    fit(Scripted(lambda step: 1.0), callback, widths, max_steps=60, val_check_interval=4)
    assert runs(widths.weights) == [[8, 8], [4, 8], [2, 44]]
    assert callback.timeline.rungs == ((0, 8), (8, 4), (16, 2))


@pytest.mark.parametrize("end", [0.5, None])
def test_a_real_metric_leads_to_the_final_width(end):
    task, callback = TinyTask(lr=3e-2), QATCallback("w3", schedule=plateau([8, 4, 3], end=end, patience=2))
    fit(task, callback, max_steps=120, val_check_interval=5, num_batches=50, max_epochs=3)
    assert callback.timeline.rungs[-1][1] == 3
    assert all(layer.weight_fake_quant.num_bits == 3 for layer in quantized_layers(task).values())


def test_a_metric_of_training_can_be_followed():
    class Task(TinyTask):
        def training_step(self, batch, batch_idx):
            self.log("train/loss", 1.0)
            return super().training_step(batch, batch_idx)

    callback = QATCallback("w4", schedule=plateau([8, 4], monitor="train/loss", end=None))
    fit(Task(), callback, max_steps=20, val_check_interval=5)
    assert callback.timeline.rungs == ((0, 8), (10, 4))


@pytest.mark.parametrize(("interval", "expected"), [(6, 4), (5, 4)])
def test_a_rung_never_begins_in_the_middle_of_an_accumulation(interval, expected):
    """Validations after 5 and 10 batches lie in steps 1 and 3: the rung begins with step 4."""
    widths = Widths()
    callback = QATCallback("w4", schedule=plateau([8, 4], end=None))
    task = Scripted(lambda step: 1.0)
    fit(task, callback, widths, max_steps=10, val_check_interval=interval, accumulate_grad_batches=3)
    assert callback.timeline.rungs == ((0, 8), (expected, 4))
    assert runs(widths.weights)[0] == [8, 3 * expected]


def test_validations_before_fake_quantization_and_during_a_blend_do_not_count():
    callback = QATCallback(
        "w4", schedule=plateau([8, 4], end=None), fake_quant_after_n_steps=6, blend_until=12, freeze_at=13
    )
    fit(Scripted(lambda step: 1.0), callback, max_steps=40, val_check_interval=2)
    assert callback.timeline.rungs == ((6, 8), (16, 4))  # 14 is the first after a step in full, 16 the second


def test_scales_freeze_on_the_last_rung_only(capsys):
    class Frozen(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(pl_module.net[0].weight_fake_quant.frozen)

    seen = []
    callback = QATCallback("w4", schedule=plateau([8, 4]), freeze_at=3)
    fit(Scripted(lambda step: -step), callback, Frozen(), max_steps=20, val_check_interval=2)
    assert seen == [False] * 10 + [True] * 10
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "8 bits from step 0, 4 bits from step 10 of 20, at the latest, earlier where val/loss stops improving" in text
    )
    assert "scales frozen from step 3, or from the last rung on if that begins later" in text


def test_a_run_that_never_reached_its_last_rung_warns():
    callback = QATCallback("w4", schedule=plateau([8, 4], end=None))
    with pytest.warns(UserWarning, match=r"on the rung of 8 bits, before the last rung \(4 bits\)"):
        fit(Scripted(lambda step: -step), callback, max_steps=10, val_check_interval=2)


def test_keeping_the_best_of_a_plateau_is_warned_of(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer = make_trainer(
        QATCallback("w4", schedule=plateau([8, 4])),
        checkpoint,
        max_steps=8,
        val_check_interval=2,
        enable_checkpointing=True,
    )
    with pytest.warns(UserWarning, match="whose best value an annealed run"):
        trainer.fit(TinyTask(), loader(), val_loader())


def test_a_metric_that_does_not_exist_is_an_error_at_the_first_validation():
    callback = QATCallback("w4", schedule=plateau([8, 4], monitor="val/los"))
    for options in ({"val_check_interval": 5, "max_steps": 20}, {"fast_dev_run": 2}):
        with pytest.raises(QATConfigurationError, match=r"'val/los', which was not logged. Logged metrics: val/loss"):
            fit(TinyTask(), callback, **options)


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"task": "without"}, {"loader": None}])
def test_a_run_without_validation_is_refused(options):
    class NeverTrains(TinyTask):
        def training_step(self, batch, batch_idx):
            pytest.fail("a batch was trained")

    class Without(NeverTrains):
        validation_step = pl.LightningModule.validation_step

    trainer = make_trainer(
        QATCallback("w4", schedule=plateau([8, 4])),
        max_steps=4,
        limit_val_batches=options.get("limit_val_batches", 1.0),
    )
    task = Without() if "task" in options else NeverTrains()
    with pytest.raises(QATConfigurationError, match="'val/loss' after each validation, and this run has none"):
        trainer.fit(task, loader(), *([] if "loader" in options else [val_loader()]))


@pytest.mark.parametrize("trainer", [{"max_epochs": -1}, {"max_time": "00:00:01:00", "max_epochs": None}])
def test_its_end_is_a_position_like_others(trainer):
    with pytest.raises(QATConfigurationError, match=r"no known end.*Give schedule \(as in .*, or its end\)"):
        fit(TinyTask(), QATCallback("w4", schedule=plateau([8, 4])), **trainer)
    with pytest.raises(QATConfigurationError, match="as late as step 10, but the run has only 10"):
        fit(TinyTask(), QATCallback("w4", schedule=plateau([8, 4], end=10)), max_steps=10)


def test_fast_dev_run_goes_through_the_final_grid():
    task = TinyTask()
    fit(task, QATCallback("w2", schedule=plateau(), freeze_at={"drift_below": 1e-3}, blend_until=0.5), fast_dev_run=3)
    assert task.net[0].weight_fake_quant.num_bits == 2
    assert task.net[0].weight_fake_quant.frozen
    assert task.net[0].weight_fake_quant.blend == 1


def test_the_sanity_check_does_not_count_and_neither_does_validate():
    callback = QATCallback("w4", schedule=plateau([8, 4], end=None))
    task = Scripted(lambda step: 1.0)
    trainer = fit(task, callback, max_steps=20, val_check_interval=5, num_sanity_val_steps=2)
    assert callback.timeline.rungs == ((0, 8), (10, 4))
    state = callback.schedule.state_dict()
    trainer.validate(task, val_loader(), verbose=False)
    assert callback.schedule.state_dict() == state


def test_fit_twice_starts_again_and_a_continued_fit_goes_on():
    callback, widths = QATCallback("w4", schedule=plateau([8, 4], end=None)), Widths()
    task = Scripted(lambda step: 1.0)
    for _ in range(2):
        trainer = fit(task, callback, widths, max_steps=20, val_check_interval=5)
        assert callback.timeline.rungs == ((0, 8), (10, 4))
    assert runs(widths.weights) == [[8, 10], [4, 10], [8, 10], [4, 10]]
    trainer.fit_loop.epoch_loop.max_steps = 30
    trainer.fit_loop.max_epochs = 3
    trainer.fit(task, loader(), val_loader())
    assert callback.timeline.rungs == ((0, 8), (10, 4))
    assert runs(widths.weights)[-1] == [4, 20]


# --------------------------------------------------------------------------------------------------- going back


def diverges_at(*steps):
    return lambda step: 9.0 if step in steps else 1.0


class Snapshots(pl.Callback):
    """Keeps the state of module and optimizers as the first batch of a step finds it."""

    def __init__(self, *steps):
        self.steps, self.kept = steps, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            state = {
                name: value if value is None else value.detach().clone() for name, value in state_of(pl_module).items()
            }
            optimizers = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]
            self.kept[trainer.global_step] = state, optimizers


def assert_equal_optimizers(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert all(torch.equal(torch.as_tensor(a[key][name]), torch.as_tensor(b[key][name])) for name in a[key])


RUNS = {
    "observed": {"scheme": "w2g16"},
    "learned": {"scheme": "w2g16", "scale_lr": 1e-3},
    "costly": {"scheme": "w2-asym", "observer": {"name": "mse", "refresh_every_n_steps": 3}},
    "inputs": {"scheme": "w4a2", "freeze_at": 4},
    "static inputs": {"scheme": "w4a2-static", "scale_lr": 1e-3, "activation_calibration_steps": 3},
    "static inputs in calibration": {"scheme": "w4a2-static", "activation_calibration_steps": 12},
    "initialised": {
        "scheme": "w2g16",
        "scale_lr": 1e-3,
        "init": {"method": "gptq", "calibration_data": [batch_at(20_000), batch_at(20_001)]},
    },
}


class Normalized(Scripted):
    """Has buffers that training moves, and a learning rate that changes with every step."""

    def __init__(self, script, seed=0, **kwargs):
        super().__init__(script, seed, **kwargs)
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.net(x))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("sgd", 1e-3)])
def test_going_back_restores_everything_to_the_bit(name, optimizer, lr):
    """Down at 10 since the metric rests, back at 15 since it diverged: step 15 finds what step 10 would have found."""
    options = {**RUNS[name], "techniques": [rungs := Rungs()]}
    snapshots, control = Snapshots(10, 15), Snapshots(10)
    with pytest.warns(UserWarning, match="before the last rung"):  # never goes down, so that step 10 is on 8 bits
        fit(
            Normalized(lambda step: -step, optimizer=optimizer, lr=lr),
            QATCallback(**RUNS[name], schedule=plateau([8, 2], end=None)),
            control,
            max_steps=20,
            val_check_interval=5,
        )
    task = Normalized(diverges_at(15), optimizer=optimizer, lr=lr)
    callback = QATCallback(**options, schedule=plateau([8, 2], end=None))
    trainer = fit(task, callback, snapshots, max_steps=30, val_check_interval=5)
    assert callback.timeline.rungs == ((0, 8), (10, 2), (15, 8), (20, 2))
    expected, expected_optimizers = control.kept[10]
    found, found_optimizers = snapshots.kept[15]
    assert_same(expected, found)
    assert_equal_optimizers(expected_optimizers, found_optimizers)
    assert rungs.steps == [0, 10, -15, 20]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr * 0.98**30)  # time goes on


def test_a_run_whose_weights_became_nan_recovers():
    class Explodes(TinyTask):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (float("nan") if self.trainer.global_step == 12 else 1.0)

    task = Explodes()
    callback = QATCallback("w2", schedule=plateau([8, 2], min_delta=10.0, end=None))
    fit(task, callback, max_steps=40, val_check_interval=5)
    assert callback.timeline.rungs == ((0, 8), (10, 2), (15, 8), (20, 2))
    assert all(torch.isfinite(p).all() for p in task.parameters())
    task = Explodes()
    fit(task, QATCallback("w2", schedule=plateau([8, 2], min_delta=10.0, end=None, roll_back=False)), max_steps=40,
        val_check_interval=5)  # fmt: skip
    assert not torch.isfinite(task.net[0].weight).all()


def test_gradients_of_the_weights_that_are_gone_are_dropped():
    """The validation that leads back comes in the middle of an accumulation; the rung begins after it."""
    callback, widths = QATCallback("w2", schedule=plateau([8, 2], end=None)), Widths()
    task = Scripted(diverges_at(6))
    fit(task, callback, widths, max_steps=12, val_check_interval=5, accumulate_grad_batches=3)
    assert callback.timeline.rungs[:3] == ((0, 8), (4, 2), (7, 8))
    assert runs(widths.weights)[:2] == [[8, 12], [2, 9]]


def test_a_second_validation_in_the_same_accumulation_leaves_it_at_going_back():
    """Before step 2 a validation finds that 2 bits diverged, and another one finds it again."""
    callback = QATCallback("w2", schedule=plateau([8, 2], end=None))
    options = {"max_steps": 12, "val_check_interval": 2, "accumulate_grad_batches": 4}
    fit(Scripted(diverges_at(1, 2)), callback, **options)
    assert callback.timeline.rungs[:3] == ((0, 8), (1, 2), (2, 8))


class Look(pl.Callback):
    """Keeps width and weight of the first layer as a step finds them."""

    def __init__(self, step):
        self.step = step

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.step:
            layer = pl_module.net[0]
            self.bits, self.weight = layer.weight_fake_quant.num_bits, layer.weight.detach().clone()


@pytest.mark.filterwarnings("ignore:The checkpoint was trained at 4 bits")
@pytest.mark.parametrize(
    ("script", "steps", "rungs"),
    [
        (lambda step: -step, 36, ((0, 8), (16, 4), (32, 2))),
        (lambda step: {2: 1, 4: 1, 6: 9}.get(step, -step), 30, ((0, 8), (4, 4), (6, 8), (16, 4), (27, 2))),
    ],
    ids=["never", "before"],
)
def test_a_longer_run_whose_plan_is_wider_goes_on_with_its_weights(script, steps, rungs, tmp_path):
    """At 4 bits since its time had come at step 16, and resumed with more time: not the same as going back.

    There was no validation since, so that the plan for the longer run has that rung later.
    """
    schedule, options = plateau([8, 4, 2], end=0.9, max_rollbacks=2), {"val_check_interval": 2}
    first, at_first, then = QATCallback("w2", schedule=schedule), Look(17), Look(17)
    fit(Scripted(script), first, StepCheckpoint(tmp_path, [17]), at_first, max_steps=steps, **options)
    second = QATCallback("w2", schedule=schedule)
    fit(Scripted(script, seed=9), second, then, max_steps=90, ckpt_path=tmp_path / "step17.ckpt", **options)
    assert first.timeline.rungs == rungs
    assert (at_first.bits, then.bits) == (4, 8)
    assert torch.equal(at_first.weight, then.weight)


class Moments(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class KeepsNamedTuples(torch.optim.SGD):
    """Remembers more than tensors and lists."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                weight = parameter.detach().clone()
                self.state[parameter]["moments"] = Moments(weight, weight**2)
        return loss


def test_the_state_of_any_optimizer_is_kept():
    class Task(Scripted):
        def configure_optimizers(self):
            return KeepsNamedTuples(self.parameters(), 1e-3)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 12:
                kept.extend(callback._closed_loop.state_dict()["memory"]["optimizers"])

    kept, callback = [], QATCallback("w2", schedule=plateau([8, 2], end=None))
    fit(Task(lambda step: 1.0), callback, Watch(), max_steps=14, val_check_interval=5)
    assert isinstance(kept[0][0]["moments"], Moments)


def test_what_is_kept_is_given_up_after_the_trial():
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            kept.append(bool(callback._closed_loop.state_dict()["memory"]))

    kept = []
    callback = QATCallback("w2", schedule=plateau([8, 4, 2], patience=3, trial=2, end=None))
    fit(Scripted(lambda step: 1.0), callback, Watch(), max_steps=40, val_check_interval=4)
    assert callback.timeline.rungs == ((0, 8), (16, 4), (32, 2))
    assert kept == [False] * 16 + [True] * 8 + [False] * 8 + [True] * 8


# ----------------------------------------------------------------------------------------------------- resuming


def resume(make_task, options, at, tmp_path, **trainer):
    """Return the tasks and callbacks of a whole run and of one that was resumed after optimizer step ``at``."""
    whole, resumed = make_task(0), make_task(99)
    first, second = QATCallback(**options), QATCallback(**options)
    fit(whole, first, StepCheckpoint(tmp_path, [at]), **trainer)
    fit(resumed, second, ckpt_path=tmp_path / f"step{at}.ckpt", **trainer)
    return whole, resumed, first, second


@pytest.mark.parametrize("at", [6, 13, 17, 19, 22, 26, 33])
@pytest.mark.parametrize("name", RUNS)
def test_resuming_a_plateau_anywhere_is_bit_exact(name, at, tmp_path):
    """In the middle of patience, in a trial, after going back, in the second trial, and on the last rung."""
    schedule = plateau([8, 4, 2], patience=2, end=None)
    whole, resumed, first, second = resume(
        lambda seed: Normalized(diverges_at(20), seed),
        {**RUNS[name], "schedule": schedule},
        at,
        tmp_path,
        max_steps=52,
        val_check_interval=5,
    )
    assert first.timeline.rungs[:4] == ((0, 8), (15, 4), (20, 8), (30, 4))
    assert second.timeline.rungs == first.timeline.rungs
    assert second.schedule.state_dict() == first.schedule.state_dict()
    assert resumed.losses == whole.losses[at:]
    assert_same(state_of(whole), state_of(resumed))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("at", [10, 15, 20, 30])
def test_resuming_from_a_checkpoint_of_a_validation_is_bit_exact(at, tmp_path):
    """What was decided in it is in the file already, and not decided again."""
    whole, resumed = (Normalized(diverges_at(20), seed) for seed in (0, 99))
    options = {"scheme": "w2g16", "scale_lr": 1e-2, "schedule": plateau([8, 4, 2], patience=2, end=None)}
    first, second = QATCallback(**options), QATCallback(**options)
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1, save_last=True)
    trainer = {"max_steps": 52, "val_check_interval": 5, "enable_checkpointing": True}
    fit(whole, first, saver, **trainer)
    fit(resumed, second, ckpt_path=tmp_path / f"step={at}.ckpt", max_steps=52, val_check_interval=5)
    assert first.timeline.rungs[:4] == ((0, 8), (15, 4), (20, 8), (30, 4))
    assert second.timeline.rungs == first.timeline.rungs
    assert resumed.losses == whole.losses[at:]
    assert_same(state_of(whole), state_of(resumed))


def test_resuming_in_the_middle_of_an_epoch_with_accumulation(tmp_path):
    whole, resumed, first, second = resume(
        lambda seed: Normalized(diverges_at(7), seed, optimizer="sgd"),
        {"scheme": "w2g16", "scale_lr": 1e-2, "schedule": plateau([8, 2], end=None)},
        9,
        tmp_path,
        max_steps=24,
        accumulate_grad_batches=2,
        max_epochs=4,
        num_batches=20,
        val_check_interval=5,
    )
    assert first.timeline.rungs[:3] == ((0, 8), (5, 2), (8, 8))
    assert second.timeline.rungs == first.timeline.rungs
    assert resumed.losses == whole.losses[18:]
    assert_same(state_of(whole), state_of(resumed))


def test_the_checkpoint_of_a_plateau_is_safe_to_load_and_portable(tmp_path):
    task = Scripted(diverges_at(15))
    options = {"scheme": "w2g16", "scale_lr": 1e-2, "schedule": plateau([8, 2], end=None)}
    fit(task, QATCallback(**options), StepCheckpoint(tmp_path, [12]), max_steps=30, val_check_interval=5)
    checkpoint = torch.load(tmp_path / "step12.ckpt", weights_only=True)  # in the trial: it holds the rung before
    assert checkpoint["lightning_qat"]["closed_loop"]["memory"]
    TinyTask(seed=9).load_state_dict(checkpoint["state_dict"], strict=True)
    assert load_qat(TinyTask(seed=9), checkpoint).net[0].weight_fake_quant.num_bits == 2


def test_a_checkpoint_of_other_widths_is_refused(tmp_path):
    options = {"max_steps": 20, "val_check_interval": 5}
    fit(TinyTask(), QATCallback("w2", schedule=plateau([8, 2])), StepCheckpoint(tmp_path, [12]), **options)
    with pytest.raises(QATConfigurationError, match=r"widths \[8, 2\], and the schedule now has \[8, 4, 2\]"):
        fit(TinyTask(), QATCallback("w2", schedule=plateau()), ckpt_path=tmp_path / "step12.ckpt", **options)


def test_copies_of_the_callback_are_independent():
    callback = QATCallback("w4", schedule=Plateau([8, 4], patience=1, end=None))
    twin = copy.deepcopy(callback)
    fit(Scripted(lambda step: 1.0), callback, max_steps=20, val_check_interval=5)
    assert twin.schedule.rungs(0, None) == [(0, 8)]
    fit(Scripted(lambda step: 1.0), twin, max_steps=20, val_check_interval=4)
    assert twin.timeline.rungs == ((0, 8), (8, 4))


# -------------------------------------------------------------------------------------------------- other callers


def test_under_ddp_all_ranks_follow_the_first(tmp_path):
    """The metric of the second one says otherwise."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.ddp_schedules", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["rungs"] == second["rungs"] == ((0, 8), (10, 2), (15, 8), (20, 2))
    assert first["freeze_step"] == second["freeze_step"] == 23
    assert torch.equal(first["weight"], second["weight"])
    assert torch.equal(first["scale"], second["scale"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": plateau([8, 4])}, "must be known before training"),
        ({"scheme": "w4a8", "schedule": {"name": "staggered", "weights": [8, 4], "activations": [8]}}, "the same for"),
        ({"schedule": [8, 4], "blend_until": 5}, "in the first 4 optimizer steps"),
    ],
)
def test_compare_refuses_rungs_that_it_cannot_score(options, message):
    timeline = QATCallback(**{"scheme": "w4", **options}).resolve(10)
    with pytest.raises(ValueError, match=message):
        check_rungs(timeline, 5)
    check_rungs(QATCallback("w4", schedule="linear", blend_until=2).resolve(10), 5)


def test_arguments_from_a_configuration_file():
    schedule = OmegaConf.create({"name": "plateau", "bits": [8, 4], "patience": 5})
    freeze_at = OmegaConf.create({"drift_below": 0.01, "not_before": 0.9})
    callback = QATCallback("w4", schedule=schedule, freeze_at=freeze_at)
    assert callback.schedule == Plateau([8, 4], patience=5)
    assert callback.resolve(1000).rungs == ((0, 8), (500, 4))
    assert callback.resolve(1000).drift_step == 900


def test_a_metric_that_is_not_logged_is_found_in_the_sanity_check():
    task = TinyTask()
    schedule = {"name": "plateau", "bits": [8, 4], "monitor": "val_loss"}
    with pytest.raises(QATConfigurationError, match="looks at 'val_loss', which was not logged"):
        fit(task, QATCallback("w4", schedule=schedule), max_steps=8, num_sanity_val_steps=1)
    assert not task.losses
