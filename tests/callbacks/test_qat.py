"""Real Trainer runs of QATCallback."""

import copy
import csv
import functools
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_qat import QATCallback, prepare, restore_float
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.health import HealthMonitor
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.nn import QATLinear, quantized_layers
from lightning_qat.observers import MinMaxObserver
from lightning_qat.schedules import Staircase
from tests.helpers import StopAt, TinyTask, batch_at, fit, loader, make_trainer


class Watch(pl.Callback):
    """Writes down what the quantizers look like in every batch."""

    def __init__(self):
        self.bits, self.scales, self.frozen = [], [], []

    def on_before_backward(self, trainer, pl_module, loss):
        quantizers = [layer.weight_fake_quant for layer in quantized_layers(pl_module).values()]
        weights = [layer.weight for layer in quantized_layers(pl_module).values()]
        self.bits.append(quantizers[0].num_bits)
        self.frozen.append(quantizers[0].frozen)
        self.scales.append([q.qparams(w).scale.detach().clone() for q, w in zip(quantizers, weights, strict=True)])


def test_one_argument_is_enough():
    task = TinyTask()
    fit(task, QATCallback("w4"), max_steps=20)
    assert [type(module) for module in task.net] == [QATLinear, nn.ReLU, QATLinear]
    assert task.losses[-1] < task.losses[0]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ([8, 4, 3, 2], [8] * 6 + [4] * 6 + [3] * 6 + [2] * 6),
        ({0.0: 8, 0.25: 4, 0.5: 2}, [8] * 6 + [4] * 6 + [2] * 12),
        ({0: 16, 5: 8, 7: 2}, [16] * 5 + [8] * 2 + [2] * 17),
        (None, [2] * 24),
        (Staircase([3, 2]), [3] * 12 + [2] * 12),
        ({"name": "staircase", "bits": [4, 2]}, [4] * 12 + [2] * 12),
    ],
)
def test_annealing_reaches_each_rung_at_the_stated_step(schedule, steps):
    watch = Watch()
    callback = QATCallback("w2", schedule=schedule)
    fit(TinyTask(), callback, watch, max_steps=24)
    assert watch.bits == steps
    assert callback.timeline.rungs[-1][1] == 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_rungs_count_optimizer_steps(accumulate):
    watch = Watch()
    fit(
        TinyTask(),
        QATCallback("w2", schedule={0: 8, 2: 4, 5: 2}, freeze_at=6),
        watch,
        max_steps=8,
        accumulate_grad_batches=accumulate,
    )
    expected = [8] * 2 + [4] * 3 + [2] * 3
    assert watch.bits == [bits for bits in expected for _ in range(accumulate)]
    assert watch.frozen == [step >= 6 for step in range(8) for _ in range(accumulate)]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_last_rung_is_reached_on_the_shortest_run(steps):
    watch = Watch()
    fit(TinyTask(), QATCallback("w2", schedule=[8, 4, 3, 2]), watch, max_steps=steps)
    assert watch.bits[-1] == 2


def test_a_mixed_model_uses_the_wider_of_rung_and_own_width():
    rules = [{"target": "net.0", "scheme": "w4"}, {"target": "net.2", "scheme": "w2"}]
    task, seen = TinyTask(), []

    class See(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append([layer.weight_fake_quant.num_bits for layer in quantized_layers(pl_module).values()])

    fit(task, QATCallback(rules, schedule=[8, 3, 2]), See(), max_steps=6)
    assert seen == [[8, 8]] * 2 + [[4, 3]] * 2 + [[4, 2]] * 2


def test_fake_quantization_starts_late_and_the_model_trains_in_float_until_then():
    plain, late = TinyTask(), TinyTask()
    fit(plain, max_steps=10)
    fit(late, QATCallback("w2", fake_quant_after_n_steps=6), max_steps=10)
    assert late.losses[:6] == plain.losses[:6]
    assert late.losses[6] > plain.losses[6]
    fraction = TinyTask()
    fit(fraction, QATCallback("w2", fake_quant_after_n_steps=0.6), max_steps=10)
    assert fraction.losses == late.losses


@pytest.mark.parametrize("scheme", ["w2g16", "w3g16-asym", "w4g16-bf16"])
@pytest.mark.parametrize("options", [{}, {"scale_lr": 0.5}, {"observer": {"name": "mse", "refresh_every_n_steps": 2}}])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_scales_do_not_move_by_a_bit(scheme, options, optimizer):
    watch, task = Watch(), TinyTask(optimizer=optimizer)
    fit(task, QATCallback(scheme, freeze_at=6, **options), watch, max_steps=12)
    assert watch.frozen == [False] * 6 + [True] * 6
    for later in watch.scales[7:]:
        assert all(torch.equal(a, b) for a, b in zip(watch.scales[6], later, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(watch.scales[0], watch.scales[6], strict=True))
    assert task.losses[6:] != sorted(task.losses[6:])[::-1] or len(set(task.losses[6:])) > 1  # the weights still train


def test_observed_scales_follow_the_weight():
    watch = Watch()
    fit(TinyTask(), QATCallback("w4"), watch, max_steps=4)
    assert not torch.equal(watch.scales[0][0], watch.scales[1][0])


def test_a_costly_observer_looks_again_when_it_said_it_would():
    watch = Watch()
    observer = {"name": "mse", "num_steps": 5, "refresh_every_n_steps": 3}
    fit(TinyTask(), QATCallback("w2", schedule={0: 4, 4: 2}, observer=observer), watch, max_steps=10)
    changed = [not torch.equal(a[0], b[0]) for a, b in zip(watch.scales, watch.scales[1:], strict=False)]
    # After 3 steps on the first rung, at the rung of step 4, then after 3 and 6 steps on it would be 7 and 10.
    assert [step for step, moved in enumerate(changed, start=1) if moved] == [3, 4, 7]


# --------------------------------------------------------------------------------------------- learned scales


def groups_of(trainer):
    return [(len(g["params"]), g["lr"], g["weight_decay"]) for g in trainer.optimizers[0].param_groups]


def test_learned_scales_have_a_group_of_their_own():
    task = TinyTask()
    trainer = fit(task, QATCallback("w4g16", scale_lr=3e-3), max_steps=3)
    assert groups_of(trainer) == [(4, 1e-2, 1e-2), (2, 3e-3, 0.0)]
    assert "configure_optimizers" not in vars(task)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [1e-2, 1e-3], total_steps=10),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
    ids=["lambda", "cosine", "onecycle", "sequential"],
)
def test_learning_rate_schedulers_know_the_group(make_scheduler, named):
    class Task(TinyTask):
        def configure_optimizers(self):
            members = self.named_parameters() if named else self.parameters()
            optimizer = torch.optim.AdamW(members, 1e-2)
            scheduler = {"scheduler": make_scheduler(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    trainer = fit(Task(), QATCallback("w4g16", scale_lr=1e-3), max_steps=6)
    assert [count for count, _, _ in groups_of(trainer)] == [4, 2]


class Scheduled(TinyTask):
    def __init__(self, make_scheduler):
        super().__init__()
        self.make_scheduler = make_scheduler

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-2, 1e-1),
    ],
    ids=["onecycle", "cyclic"],
)
def test_a_scheduler_that_overrides_the_learning_rate_of_scales_is_told(make_scheduler):
    with pytest.warns(UserWarning, match="learning rate of the scales to .*, not to scale_lr=0.001"):
        fit(Scheduled(make_scheduler), QATCallback("w4g16", scale_lr=1e-3), max_steps=2)


def test_a_scheduler_that_counts_the_groups_is_explained():
    task = Scheduled(lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda step: 1.0]))
    with pytest.raises(QATConfigurationError, match=r"Expected 2 lr_lambdas.*scale_lr, each parameter group"):
        fit(task, QATCallback("w4g16", scale_lr=1e-3), max_steps=2)
    assert torch.optim.Optimizer.add_param_group.__name__ == "add_param_group"


@pytest.mark.parametrize("schedule", [None, [8, 4]])
@pytest.mark.parametrize("options", [{}, {"save_last": True}, {"save_top_k": 0}])
def test_keeping_the_best_of_several_rungs_is_warned_of(schedule, options, tmp_path, recwarn):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", **options)
    trainer = make_trainer(QATCallback("w4", schedule=schedule), checkpoint, max_steps=4, enable_checkpointing=True)
    trainer.fit(TinyTask(), loader(), loader(2))
    told = [w for w in recwarn if "ModelCheckpoint monitors 'val/loss', whose best value" in str(w.message)]
    assert len(told) == (schedule is not None and not options)


def test_early_stopping_over_several_rungs_is_warned_of():
    with pytest.warns(UserWarning, match="EarlyStopping monitors 'val/loss'.*give it patience"):
        fit(TinyTask(), QATCallback("w4", schedule=[8, 4]), EarlyStopping("val/loss"), limit_train_batches=4)


def test_groups_of_the_user_are_split_one_by_one():
    class Task(TinyTask):
        def configure_optimizers(self):
            first = {"params": self.net[0].parameters(), "lr": 1e-2}
            second = {"params": list(self.net[2].parameters()), "lr": 1e-3, "weight_decay": 0.5}
            return torch.optim.AdamW([first, second], lr=1.0)

    trainer = fit(Task(), QATCallback("w4g16", scale_lr=1e-4), max_steps=2)
    assert groups_of(trainer) == [(2, 1e-2, 1e-2), (1, 1e-4, 0.0), (2, 1e-3, 0.5), (1, 1e-4, 0.0)]


def test_scales_are_learned_and_refitted_on_each_rung():
    task, callback = TinyTask(), QATCallback("w2", schedule={0: 4, 5: 2}, scale_lr=1e-2)
    ratios = []

    class See(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            ratio = pl_module.net[0].weight_fake_quant.log_scale_ratio
            ratios.append(ratio.detach().clone())
            if trainer.global_step == 5:
                assert ratio not in trainer.optimizers[0].state  # what the moments knew was another grid

    fit(task, callback, See(), max_steps=8)
    assert torch.count_nonzero(ratios[0]) == 0
    assert torch.count_nonzero(ratios[4]) == len(ratios[4])
    assert torch.count_nonzero(ratios[5]) == 0
    assert torch.count_nonzero(ratios[7]) == len(ratios[7])


# --------------------------------------------------------------------------------------- models that come late


class BuiltInSetup(TinyTask):
    def __init__(self):
        super().__init__()
        del self.net

    def setup(self, stage):
        if not hasattr(self, "net"):
            self.build()

    def build(self):
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


class BuiltInConfigureModel(BuiltInSetup):
    def setup(self, stage):
        pass

    def configure_model(self):
        if not hasattr(self, "net"):
            self.build()


@pytest.mark.parametrize("task_class", [BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("options", [{}, {"scale_lr": 1e-3}])
def test_models_that_are_built_late_are_quantized(task_class, options):
    task = task_class()
    trainer = fit(task, QATCallback("w4", **options), max_steps=4)
    assert len(quantized_layers(task)) == 2
    assert not {"setup", "configure_model", "configure_optimizers"} & set(vars(task))
    copy.deepcopy(task)
    trainer.validate(task, loader(2), verbose=False)
    assert len(quantized_layers(task)) == 2


def test_a_rule_that_matches_nothing_in_a_late_model_is_still_an_error():
    with pytest.raises(ValueError, match="rule target 'nett' matches no module"):
        fit(BuiltInConfigureModel(), QATCallback([{"target": "nett", "scheme": "w4"}]), max_steps=4)


# ---------------------------------------------------------------------------------------------------- logging


def test_bits_and_health_are_logged_in_aggregate(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = QATCallback("w2", schedule={0: 16, 4: 4, 8: 2})
    trainer = fit(TinyTask(), callback, max_steps=12, logger=logger, log_every_n_steps=2)
    with open(logger.experiment.metrics_file_path) as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    logged = {row["step"]: row for row in rows if "qat/num_bits" in row}
    assert sorted(logged) == [1, 3, 5, 7, 9, 11]
    assert [logged[step]["qat/num_bits"] for step in sorted(logged)] == [16, 16, 4, 4, 2, 2]
    assert "qat/sqnr_db" not in logged[3]
    assert 12 < logged[5]["qat/sqnr_db"] < 26  # a normal weight per channel: about 6 dB per bit, less the peak
    assert logged[11]["qat/sqnr_db"] < logged[7]["qat/sqnr_db"] - 6
    assert 0 <= logged[11]["qat/clipped_fraction"] < 0.2
    assert 0 < logged[11]["qat/scale_drift"] < 0.5
    assert "qat/scale_drift" not in logged[9]  # the first look at a new grid
    names = {name for row in rows for name in row if name.startswith("qat/")}
    figures = ("num_bits", "sqnr_db", "clipped_fraction", "dead_levels", "scale_drift")
    assert names == {f"qat/{name}" for name in figures}
    assert trainer.callback_metrics["qat/num_bits"] == 2


def test_sqnr_is_that_of_the_definition():
    task = TinyTask()
    trainer = fit(task, QATCallback("w3", health_every_n_steps=1), max_steps=1)
    layers = quantized_layers(task).values()
    signal = sum(layer.weight.double().square().sum() for layer in layers)
    noise = sum((layer.fake_quantized_weight() - layer.weight).double().square().sum() for layer in layers)
    assert trainer.callback_metrics["qat/sqnr_db"] == pytest.approx(10 * (signal / noise).log10().item(), rel=1e-5)


def test_the_summary_says_what_is_done_and_why(capsys):
    class Task(TinyTask):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 4)

    fit(Task(), QATCallback("w2g16", schedule=[8, 4, 2], freeze_at=0.9, ignore=["net.2"]), max_steps=30)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1 layer at w2g16" in text
    assert "net.2: ignored" in text
    assert "embed: embeddings stay in float" in text
    assert "4.00 in the quantized layers" in text
    assert "8 bits from step 0, 4 bits from step 10, 2 bits from step 20 of 30; scales frozen from step 27" in text


def test_rules_without_effect_are_in_the_summary(capsys):
    rules = [{"target": "net.0", "scheme": "w8"}, {"target": "Linear", "scheme": "w4"}]
    fit(TinyTask(), QATCallback(rules), max_steps=2)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2 layers at w4 Rules without effect net.0" in text


def test_a_run_that_stops_before_its_last_rung_warns():
    with pytest.warns(UserWarning, match="on the rung of 8 bits, before the last rung"):
        fit(TinyTask(), QATCallback("w2", schedule=[8, 2]), StopAt(5), max_steps=20)


def test_steps_that_jump_over_the_last_rung_warn():
    """Two optimizer steps per batch: the rung that begins at the second of them is never trained on."""

    class TwoSteps(TinyTask):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            self.optimizers().step()

    with pytest.warns(UserWarning, match=r"stopped at optimizer step 8, on the rung of 8 bits.*Train on from"):
        fit(TwoSteps(), QATCallback("w2", schedule={0: 8, 7: 2}), max_steps=8)


@pytest.mark.parametrize(("steps", "warns"), [(5, True), (6, False)])
def test_the_last_rung_is_reached_by_its_first_step(steps, warns, recwarn):
    fit(TinyTask(), QATCallback("w2", schedule={0: 8, 5: 2}), StopAt(steps), max_steps=20)
    assert any("before the last rung" in str(w.message) for w in recwarn) == warns


def test_scales_may_freeze_with_the_first_step_of_the_last_rung():
    watch = Watch()
    fit(TinyTask(), QATCallback("w2", schedule={0: 8, 5: 2}, freeze_at=5), watch, max_steps=8)
    assert watch.frozen == [False] * 5 + [True] * 3


def test_the_sanity_check_is_done_on_the_first_rung():
    class Task(TinyTask):
        def validation_step(self, batch, batch_idx):
            bits.append(self.net[0].weight_fake_quant.num_bits)

    bits = []
    fit(Task(), QATCallback("w2", schedule=[8, 2]), max_steps=4, num_sanity_val_steps=2, limit_val_batches=2)
    assert bits[:2] == [8, 8]


class Copied(TinyTask):
    """Is copied where others do it: weight averaging in setup, users when they save."""

    def setup(self, stage):
        copy.deepcopy(self)

    def configure_optimizers(self):
        pickle.dumps(self)
        return super().configure_optimizers()

    def on_save_checkpoint(self, checkpoint):
        pickle.dumps(self)


def test_the_module_can_be_copied_and_pickled_in_its_hooks(tmp_path):
    task = Copied()
    fit(task, QATCallback("w4", scale_lr=1e-3), StepCheckpoint(tmp_path, [2]), max_steps=2)
    assert not any(hook in vars(task) for hook in ("setup", "configure_optimizers", "on_save_checkpoint"))


@pytest.mark.parametrize("scale_lr", [None, 1e-3])
def test_hooks_that_others_put_into_the_instance_stay(scale_lr):
    """As LightningCLI does with configure_optimizers."""
    task = TinyTask()
    hook = functools.partial(lambda module: torch.optim.SGD(module.parameters(), 0.1), task)
    functools.update_wrapper(hook, TinyTask.configure_optimizers)
    task.configure_optimizers = hook
    make_trainer(QATCallback("w4", scale_lr=scale_lr)).validate(task, loader(2), verbose=False)
    for _ in range(2):
        trainer = fit(task, QATCallback("w4", scale_lr=scale_lr), max_steps=2)
        assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert task.configure_optimizers is hook


def test_clipped_fraction_is_the_share_beyond_half_a_step_after_the_last_level():
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    prepare(model, "w4")
    quantizer = model[0].weight_fake_quant
    quantizer.freeze(model[0].weight)
    quantizer.scale.fill_(1.0)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7.0, 7.4, 7.6, 8.9, -8.0, -8.4, -8.6, 0.0]]))
    assert HealthMonitor().measure(model)["clipped_fraction"] == 3 / 8


def test_scale_drift_goes_on_after_a_resume(tmp_path):
    logged = []
    for folder, stop in (("whole", None), ("first", 6), ("second", None)):
        logger = CSVLogger(tmp_path, folder)
        callbacks = [QATCallback("w4"), *([StepCheckpoint(tmp_path, [6]), StopAt(6)] if stop else [])]
        path = tmp_path / "step6.ckpt" if folder == "second" else None
        fit(TinyTask(), *callbacks, max_steps=12, logger=logger, log_every_n_steps=3, ckpt_path=path)
        with open(logger.experiment.metrics_file_path) as file:
            logged.append({row["step"]: row["qat/scale_drift"] for row in csv.DictReader(file)})
    assert logged[2] == {step: drift for step, drift in logged[0].items() if int(step) >= 6}


def test_a_second_fit_after_a_frozen_one_finds_new_scales():
    task = TinyTask()
    fit(task, QATCallback("w4", observer="mse", freeze_at=2), max_steps=4)
    frozen = task.net[0].weight_fake_quant.scale.clone()
    with torch.no_grad():
        task.net[0].weight *= 3
    fit(task, QATCallback("w4", observer="mse"), max_steps=1)
    assert (task.net[0].weight_fake_quant.scale > 1.5 * frozen).all()


def test_a_copy_of_the_model_keeps_its_grid_for_observers_without_equality():
    class Observer(MinMaxObserver):
        __eq__ = object.__eq__
        __hash__ = object.__hash__

    task = TinyTask()
    fit(task, QATCallback("w2", observer=Observer(), freeze_at=3), max_steps=6)
    twin = copy.deepcopy(task)
    fresh = QATCallback("w2", observer=Observer())
    fresh.prepare(twin)
    assert torch.equal(twin.net[0].weight_fake_quant.scale, task.net[0].weight_fake_quant.scale)
    assert twin.net[0].weight_fake_quant.frozen


def test_layers_whose_forward_is_bypassed_are_reported():
    class Task(TinyTask):
        def forward(self, x):
            return self.net[2](torch.relu(nn.functional.linear(x, self.net[0].weight)))

    with pytest.warns(UserWarning, match=r"did not call 1 of the quantized layers: net.0"):
        fit(Task(), QATCallback("w4"), max_steps=2)
    fit(TinyTask(), QATCallback("w4"), max_steps=2)  # a warning would be an error


# -------------------------------------------------------------------------------------------- life of a module


def test_fit_twice_starts_the_schedule_again():
    task, watch = TinyTask(), Watch()
    fit(task, QATCallback("w2", schedule=[8, 2], freeze_at=0.8), max_steps=10)
    fit(task, QATCallback("w2", schedule=[8, 2], freeze_at=0.8), watch, max_steps=10)
    assert watch.bits == [8] * 5 + [2] * 5
    assert watch.frozen == [False] * 8 + [True] * 2


def test_fit_again_with_another_scheme():
    task = TinyTask()
    fit(task, QATCallback("w4"), max_steps=2)
    fit(task, QATCallback("w3g16-asym"), max_steps=2)
    assert str(task.net[0].weight_fake_quant.scheme) == "w3g16-asym"


def test_continuing_a_fit_keeps_frozen_scales():
    task, callback = TinyTask(), QATCallback("w2", freeze_at=4)
    trainer = fit(task, callback, num_batches=6)
    frozen = task.net[0].weight_fake_quant.scale.clone()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(task, loader(6), loader(2))
    assert trainer.global_step == 12
    assert torch.equal(task.net[0].weight_fake_quant.scale, frozen)


def test_every_stage_sees_the_quantized_model():
    task, callback = TinyTask(), QATCallback("w2")
    before_fit = make_trainer(callback).validate(task, loader(2), verbose=False)
    assert len(quantized_layers(task)) == 2
    trainer = fit(task, callback, max_steps=10)
    validated = trainer.validate(task, loader(2), verbose=False)
    tested = trainer.test(task, loader(2), verbose=False)
    predicted = trainer.predict(task, loader(2))
    assert validated[0]["val/loss"] == tested[0]["test/loss"] != before_fit[0]["val/loss"]
    assert torch.equal(predicted[0], task(batch_at(10_000)))
    restore_float(task)
    assert trainer.test(task, loader(2), verbose=False) == tested  # setup puts the quantizers back in


def test_an_exception_in_training_leaves_no_patch():
    class Fails(BuiltInConfigureModel):
        def configure_model(self):
            raise RuntimeError("no model today")

    task = Fails()
    with pytest.raises(RuntimeError, match="no model today"):
        fit(task, QATCallback("w4", scale_lr=1e-3), max_steps=2)
    assert not {"setup", "configure_model", "configure_optimizers"} & set(vars(task))


def test_activations_are_quantized_in_training():
    task = TinyTask()
    fit(task, QATCallback("w8a4"), max_steps=5)
    assert task.net[0].input_fake_quant.num_bits == 4
    with torch.no_grad():
        outputs = task.net[0].input_fake_quant(torch.randn(3, 16))
    assert all(len(row.unique()) <= 16 for row in outputs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_grid_is_float32_under_reduced_precision(precision):
    class Task(TinyTask):
        def loss(self, x):
            x = x.to(self.net[0].weight.dtype)
            return nn.functional.mse_loss(self(x), torch.tanh(x @ self.target.to(x.dtype)))

    task = Task()
    fit(task, QATCallback("w4g16", scale_lr=1e-3), max_steps=3, precision=precision)
    assert task.net[0].weight_fake_quant.scale.dtype == torch.float32
    assert task.net[0].weight_fake_quant.log_scale_ratio.dtype == torch.float32
    assert task.net[0].weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_learned_scales_may_have_the_learning_rate_of_the_weights():
    task = TinyTask(lr=3e-3)
    trainer = fit(task, QATCallback("w4", scale_lr="same"), max_steps=3)
    weights, scales = trainer.optimizers[0].param_groups
    assert weights["lr"] == scales["lr"] == 3e-3
    assert scales["weight_decay"] == 0 < weights["weight_decay"]
    with pytest.raises(TypeError, match="scale_lr"):
        QATCallback("w4", scale_lr="sane")


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_clipping_leaves_learned_scales_out(scheme):
    """Their gradients grow with the number of levels, and would take the whole norm."""

    class Norms(pl.Callback):
        def __init__(self):
            self.before, self.after = {}, {}

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = {name: p.grad.clone() for name, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.after = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}

    norms = Norms()
    fit(TinyTask(), QATCallback(scheme, scale_lr=1e-3), norms, max_steps=1, gradient_clip_val=1e-3)
    scales = {name for name in norms.before if name.endswith("log_scale_ratio")}
    assert scales
    assert all(torch.equal(norms.after[name], norms.before[name]) for name in scales)
    rest = [gradient.flatten() for name, gradient in norms.after.items() if name not in scales]
    assert torch.cat(rest).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_longer_run_goes_on_with_scales_that_were_learned_and_frozen(tmp_path):
    task = TinyTask()
    fit(task, QATCallback("w4", scale_lr=1e-2, freeze_at=0.5), max_steps=20).save_checkpoint(tmp_path / "frozen.ckpt")
    expected = task.net[0].weight_fake_quant.log_scale_ratio.detach().clone()
    assert expected.abs().max() > 0
    seen = []

    class See(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(pl_module.net[0].weight_fake_quant.log_scale_ratio.detach().clone())

    longer = QATCallback("w4", scale_lr=1e-2, freeze_at=0.9)
    fit(TinyTask(), longer, See(), max_steps=40, max_epochs=2, ckpt_path=tmp_path / "frozen.ckpt")
    assert torch.equal(seen[0], expected)
    assert not torch.equal(seen[-1], expected)


def test_loading_a_part_of_a_state_dict_leaves_other_layers_grids_alone():
    task = TinyTask()
    fit(task, QATCallback("w4a8-static", scale_lr=1e-2, activation_calibration_steps=2), max_steps=6)
    before = copy.deepcopy(task.state_dict())
    task.load_state_dict({"net.2.bias": torch.zeros(8)}, strict=False)
    after = task.state_dict()
    assert torch.equal(
        after["net.0.weight_fake_quant.log_scale_ratio"], before["net.0.weight_fake_quant.log_scale_ratio"]
    )
    assert not task.net[0].weight_fake_quant.is_stale
    assert task.net[0].input_fake_quant.is_calibrated
    task.load_state_dict({"net.0.weight": torch.randn(32, 16)}, strict=False)
    assert task.net[0].weight_fake_quant.is_stale
    assert not task.net[0].input_fake_quant.is_calibrated


def test_parameters_without_an_order_are_refused_as_by_torch():
    class Unordered(TinyTask):
        def configure_optimizers(self):
            return torch.optim.AdamW([{"params": set(self.parameters())}], 1e-3)

    with pytest.raises(TypeError, match="order"):
        fit(Unordered(), QATCallback("w4", scale_lr=1e-2), max_steps=1)


@pytest.mark.parametrize("scale_lr", ["same", 1e-2])
def test_the_rate_of_the_weights_is_that_of_the_weights_whatever_group_the_scales_are_put_into(scale_lr):
    class ByShape(TinyTask):
        def configure_optimizers(self):
            matrices = [p for p in self.parameters() if p.dim() > 1]
            vectors = [p for p in self.parameters() if p.dim() <= 1]
            return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "lr": 1e-5}], 1e-2)

    if scale_lr == "same":
        with pytest.raises(QATConfigurationError, match=r"which is 0.01 for net.0; .* a group with 1e-05"):
            fit(ByShape(), QATCallback("w4", scale_lr=scale_lr), max_steps=1)
    else:
        fit(ByShape(), QATCallback("w4", scale_lr=scale_lr), max_steps=1)


def test_a_table_of_a_model_without_quantizers_is_refused():
    with pytest.raises(ValueError, match=r"has no fake-quantized layer. Fit it"):
        QATCallback("w4").layer_table(TinyTask())


def test_going_on_without_a_technique_is_warned_of(tmp_path):
    first = QATCallback("w4", oscillation=True)
    fit(TinyTask(), first, max_steps=4).save_checkpoint(tmp_path / "with.ckpt")
    with pytest.warns(UserWarning, match="a run with oscillation, and this one goes on without"):
        fit(TinyTask(), QATCallback("w4"), max_steps=6, max_epochs=2, ckpt_path=tmp_path / "with.ckpt")
