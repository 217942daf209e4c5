"""Bad input is an error before the first batch, and the message names the remedy."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from torch import nn

from lightning_qat import QATCallback
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.nn import QATLinear
from tests.helpers import TinyTask, fit, loader, make_trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "w4g"}, "Cannot read the scheme 'w4g'. Write for example"),
        ({"scheme": "w12"}, "num_bits=12 is not one of"),
        ({"scheme": []}, "list of rules is empty"),
        ({"scheme": [{"target": "Linear", "scheme": None}]}, "nothing would be quantized"),
        ({"scheme": "w4", "observer": "mimmax"}, "no observer 'mimmax'. Did you mean 'minmax'"),
        ({"scheme": "w4", "estimator": "lsqq"}, "no estimator 'lsqq'.* Known: ste"),
        ({"scheme": "w4", "schedule": "staircases"}, "no schedule 'staircases'. Did you mean 'staircase'"),
        ({"scheme": "w4", "schedule": [8, 4, 2]}, "schedule ends at 2 bits, but the scheme is 4 bits wide"),
        ({"scheme": "w2", "schedule": [8, 4, 3]}, "schedule ends at 3 bits, but the scheme is 2 bits wide"),
        ({"scheme": "w4", "schedule": [4, 8]}, "must go down"),
        ({"scheme": "w4", "freeze_at": 1.0}, "freeze_at: .*training ends before 1.0 is reached"),
        ({"scheme": "w4", "freeze_at": -1}, "freeze_at: .*cannot be negative"),
        ({"scheme": "w4", "freeze_at": True}, "must be a number of optimizer steps"),
        ({"scheme": "w4", "fake_quant_after_n_steps": "late"}, "must be a number of optimizer steps"),
        ({"scheme": "w4", "fake_quant_after_n_steps": 1.5}, "fake_quant_after_n_steps: .*in \\[0, 1\\)"),
        ({"scheme": "w4", "scale_lr": 0.0}, "scale_lr=0.0 must be positive"),
        ({"scheme": "w4", "scale_lr": float("inf")}, "scale_lr=inf must be positive and finite"),
        ({"scheme": "w4", "health_every_n_steps": 0}, "health_every_n_steps=0 must be positive"),
        ({"scheme": "w4", "schedule": [9, 4]}, "9 is not a width in bits"),
        ({"scheme": "w4", "schedule": ["8", 4]}, "'8' is not a width in bits"),
        ({"scheme": "w4", "schedule": {"0": 8, "5": 4}}, "'0' must be a number of optimizer steps"),
        ({"scheme": "w4", "schedule": {False: 8, True: 4}}, "False must be a number of optimizer steps"),
        ({"scheme": "w4a1"}, "activations have 2 bits or more"),
        ({"scheme": {"num_bits": 4, "activation": {"num_bits": 16}}}, "activations of 16 bits are not quantized"),
        ({"scheme": "w4g32-bf16-fp16"}, "flags bf16 and fp16 of .* contradict"),
        ({"scheme": "w4", "ignore": [""]}, "pattern for module names is empty"),
        ({"scheme": "w4-actsym"}, "actsym .* is for activations"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        QATCallback(**arguments)


class OtherLinear(nn.Linear):
    pass


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class QATOwnForward(QATLinear, OwnForward):
    float_class = OwnForward


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": 4}, "Expected a QuantScheme or its shorthand"),
        (
            {"scheme": "w4", "observer": {"name": "mse", "steps": 3}},
            "'mse' takes the arguments num_steps, .* got {'steps': 3}",
        ),
        ({"scheme": "w4", "observer": dict}, "Expected one of absmean, minmax, mse or an object as observer"),
        ({"scheme": "w4", "schedule": "staircase"}, "schedule 'staircase' takes the arguments bits"),
        ({"scheme": "w4", "schedule": 4}, "schedule=4 must be a list of widths"),
        ({"scheme": "w4", "schedule": True}, "schedule=True must be a list of widths"),
        ({"scheme": "w4", "scale_lr": "1e-3"}, "scale_lr='1e-3' must be a learning rate, 'same'"),
        ({"scheme": "w4", "scale_lr": True}, "scale_lr=True must be a number"),
        ({"scheme": "w4", "health_every_n_steps": 2.5}, "must be a whole number"),
        ({"scheme": "w4", "target_module": ["net"]}, "must be the name of one submodule"),
        ({"scheme": "w4", "mapping": {OwnForward: QATOwnForward}}, "OwnForward has a forward of its own.*self._input"),
        ({"scheme": "w4", "ignore": [3]}, "Expected a pattern for module names"),
        ({"scheme": [{"target": 3, "scheme": "w4"}]}, "Expected a pattern for module names"),
        ({"scheme": {"target": "Linear", "bits": 4}}, "keys 'target' and 'scheme'"),
        ({"scheme": "w4", "mapping": {"OtherLinear": QATLinear}}, "mapping: 'OtherLinear' cannot become"),
        ({"scheme": "w4", "mapping": {OtherLinear: nn.Linear}}, "class made for it: class QATMyLinear"),
        ({"scheme": "w4", "mapping": {OtherLinear: QATLinear}}, "class made for it: class QATMyLinear"),
    ],
)
def test_wrong_types_are_refused_at_once(arguments, message):
    with pytest.raises(TypeError, match=message):
        QATCallback(**arguments)


class NeverTrains(TinyTask):
    def training_step(self, batch, batch_idx):
        pytest.fail("a batch was trained")


def refused(message, *callbacks, task=None, **trainer):
    with pytest.raises(QATConfigurationError, match=message) as caught:
        fit(task or NeverTrains(), *callbacks, **trainer)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: QATCallback("w4g24"), r"does not divide .*net.0 \(in_features=16.*divide them all: \[16, 8\].*-pad"),
        (lambda: QATCallback([{"target": "lin", "scheme": "w4"}]), "rule target 'lin' matches no module"),
        (lambda: QATCallback("w4", ignore=["head"]), "ignore pattern 'head' matches no module"),
        (lambda: QATCallback("w4", ignore="net"), "no layer to quantize. Left in float: 2 x ignored"),
        (lambda: QATCallback("w4", target_module="model"), "target_module='model' does not exist"),
        (
            lambda: QATCallback("w2", schedule=[8, 2], freeze_at=4),
            "before the last rung .* at step 5. Freeze at step 5",
        ),
        (lambda: QATCallback("w2", schedule=[8, 2], freeze_at=0.4), "freezes the scales at step 4, before"),
        (lambda: QATCallback("w2", schedule={0: 8, 90: 2}), "begins at step 90, but the run has only 10"),
        (lambda: QATCallback("w2", freeze_at=10), "freeze the scales after the last of 10 optimizer steps"),
        (lambda: QATCallback("w2", fake_quant_after_n_steps=10), "would start after 10 steps, but the run has only 10"),
        (lambda: QATCallback("w2", schedule={0: 8, 3: 2}, fake_quant_after_n_steps=4), "starts only after step 4"),
    ],
)
def test_what_does_not_fit_model_or_run_is_refused(callback, message):
    refused(message, callback(), max_steps=10)


@pytest.mark.parametrize("options", [{"schedule": {0: 8, 90: 2}}, {"fake_quant_after_n_steps": 90}, {"freeze_at": 90}])
def test_steps_beyond_the_end_of_the_last_epoch_are_refused(options):
    refused(
        "only 10 optimizer steps|last of 10 optimizer steps", QATCallback("w2", **options), num_batches=5, max_epochs=2
    )


@pytest.mark.parametrize("trainer", [{"max_steps": 0}, {"max_epochs": 0}])
def test_a_run_of_no_steps_is_refused(trainer):
    refused("no optimizer step. Raise max_steps or max_epochs", QATCallback("w2", schedule=[8, 2]), **trainer)


def test_fast_dev_run_goes_through_the_final_grid():
    task = TinyTask()
    fit(task, QATCallback("w2", schedule={0: 8, 500: 2}, freeze_at=600), fast_dev_run=3)
    assert task.net[0].weight_fake_quant.num_bits == 2
    assert task.net[0].weight_fake_quant.frozen


def test_two_qat_callbacks_are_refused():
    refused(
        "several QATCallbacks. Use one; it takes a list of rules", QATCallback("w4"), QATCallback("w8"), max_steps=2
    )


AVERAGING = {
    "swa": lambda: pl_callbacks.StochasticWeightAveraging(swa_lrs=1e-3),
    "ema": lambda: pl_callbacks.EMAWeightAveraging(),
}


@pytest.mark.parametrize("kind", AVERAGING)
def test_weight_averaging_listed_before_qat_is_refused(kind):
    if kind == "ema" and not hasattr(pl_callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    refused("List QATCallback first", AVERAGING[kind](), QATCallback("w4"), max_steps=2)
    fit(TinyTask(), QATCallback("w4"), AVERAGING[kind](), max_steps=2)


def test_a_learned_scale_in_no_optimizer_is_refused():
    class Forgets(NeverTrains):
        def configure_optimizers(self):
            return torch.optim.SGD([self.net[0].weight, self.net[2].weight], 0.1)

    message = (
        r"2 learned scales are in no optimizer, among them net.0.weight_fake_quant.log_scale_ratio.*parameters\(\)"
    )
    refused(message, QATCallback("w4", scale_lr=1e-3), task=Forgets(), max_steps=2)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1)


@pytest.mark.parametrize("options", [{"schedule": [8, 2]}, {"freeze_at": 0.5}, {"fake_quant_after_n_steps": 0.5}])
@pytest.mark.parametrize("trainer", [{"max_epochs": -1}, {"max_time": "00:00:01:00", "max_epochs": None}])
def test_fractions_of_a_run_without_a_known_end_are_refused(options, trainer):
    refused("no known end.*max_steps", QATCallback("w2", **options), **trainer)


def test_fractions_need_a_loader_with_a_length():
    trainer = make_trainer(QATCallback("w2", schedule=[8, 2]), max_epochs=2)
    with pytest.raises(QATConfigurationError, match="no known end"):
        trainer.fit(NeverTrains(), torch.utils.data.DataLoader(Endless()), loader(1))


def test_fractions_under_manual_optimization_are_refused_and_steps_work():
    class Manual(TinyTask):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()

    refused("manual optimization. Give schedule", QATCallback("w2", schedule=[8, 2]), task=Manual(), max_steps=4)
    task = Manual()
    fit(task, QATCallback("w2", schedule={0: 8, 2: 2}, freeze_at=3, scale_lr=1e-3), max_steps=6)
    assert task.net[0].weight_fake_quant.frozen


@pytest.mark.parametrize("options", [{"schedule": [8, 2]}, {"freeze_at": 0.5}])
def test_fractions_beside_an_accumulation_schedule_are_refused(options):
    accumulation = pl_callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    refused("beside GradientAccumulationScheduler", QATCallback("w2", **options), accumulation, max_epochs=3)
    task = TinyTask()
    fit(task, QATCallback("w2", schedule={0: 8, 3: 2}), accumulation, max_epochs=2, num_batches=4)
    assert task.net[0].weight_fake_quant.num_bits == 2


def test_a_callback_that_freezes_layers_must_come_after():
    class Freeze(pl_callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            pass

    refused("freeze layers before the quantizers are in.*List QATCallback first", Freeze(), QATCallback("w4"))
    task = TinyTask()
    fit(task, QATCallback("w4"), Freeze(), max_steps=2)
    assert isinstance(task.net[0], QATLinear)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_named(bad):
    task = NeverTrains()
    with torch.no_grad():
        task.net[2].weight[1, 1] = bad
    refused("NaN or infinite weights in net.2", QATCallback("w4"), task=task, max_steps=2)


def test_weights_that_a_checkpoint_made_not_finite_are_refused(tmp_path):
    task = TinyTask()
    trainer = fit(task, QATCallback("w4"), max_steps=2)
    with torch.no_grad():
        task.net[0].weight[0, 0] = float("nan")
    trainer.save_checkpoint(tmp_path / "bad.ckpt")
    refused("NaN or infinite weights in net.0", QATCallback("w4"), max_steps=4, ckpt_path=tmp_path / "bad.ckpt")


def test_a_model_with_nothing_to_quantize_is_refused():
    class Empty(NeverTrains):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LayerNorm(16))

    refused("There is no layer to quantize", QATCallback("w4"), task=Empty(), max_steps=2)


def test_the_error_is_lightnings_too():
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    assert issubclass(QATConfigurationError, MisconfigurationException)
    assert issubclass(QATCallback, pl.Callback)
