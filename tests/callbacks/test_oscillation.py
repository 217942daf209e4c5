"""Oscillating weights in real runs: counted as by hand, dampened by the gradient of the loss, and frozen for good."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_qat import QATCallback
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.nn import quantized_layers, quantized_weights
from tests.helpers import TinyTask, fit

STEPS = 40
FREEZING = {"freeze_threshold": (0.2, 0.1), "momentum": 0.2, "start": 0.25}
SCALES = {
    "observed": {"scheme": "w3g8"},
    "learned": {"scheme": "w3g8", "scale_lr": 1e-2},
    "costly": {"scheme": "w3", "observer": {"name": "mse", "refresh_every_n_steps": 7}},
    "asymmetric": {"scheme": "w3-asym"},
    "without zero": {"scheme": "w2g8-nozero", "scale_lr": 1e-2},
    "later frozen": {"scheme": "w3g8", "freeze_at": 0.6},
}


class Record(pl.Callback):
    """Keeps weights and codes after every optimizer step."""

    def __init__(self):
        self.weights, self.codes, self.figures = {}, {}, {}

    def on_train_start(self, trainer, pl_module):
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._keep(trainer, pl_module)

    def _keep(self, trainer, pl_module):
        layers, step = quantized_layers(pl_module), trainer.global_step
        self.weights[step] = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self.codes[step] = {name: each.codes for name, each in quantized_weights(pl_module).items()}
        metrics = trainer.callback_metrics.items()
        self.figures[step] = {name: float(value) for name, value in metrics if name.endswith("_fraction")}


def qat(oscillation, scheme="w3g8", **options):
    return QATCallback(scheme, oscillation=oscillation, health_every_n_steps=1, **options)


def all_of(tensors):
    return torch.cat([each.flatten() for each in tensors.values()])


def frozen_of(callback):
    return {name: state.frozen.clone() for name, state in technique(callback)._states.items()}


def technique(callback):
    return next(each for each in callback.techniques if each.name == "oscillation")


# --------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "max_epochs": 5, "num_batches": 50}])
def test_the_logged_share_is_that_of_a_loop_over_the_codes(options):
    record = Record()
    fit(TinyTask(lr=5e-2), qat({"momentum": 0.1, "threshold": 0.05}), record, max_steps=STEPS, **options)
    histories = torch.stack([all_of(record.codes[step]) for step in range(STEPS + 1)]).T.tolist()
    frequencies = [[0.0] * (STEPS + 1) for _ in histories]
    for codes, frequency in zip(histories, frequencies, strict=True):
        last = 0
        for step, (before, after) in enumerate(itertools.pairwise(codes), start=1):
            frequency[step] = 0.1 * ((after - before) * last < 0) + 0.9 * frequency[step - 1]
            last = (after - before) or last
    for step in range(1, STEPS + 1):
        share = sum(frequency[step] > 0.05 for frequency in frequencies) / len(frequencies)
        assert record.figures[step]["qat/oscillating_fraction"] == pytest.approx(share, abs=1e-6)
    assert 0.01 < share < 0.9


@pytest.mark.parametrize("name", SCALES)
def test_measuring_changes_nothing(name):
    plain, task = TinyTask(), TinyTask()
    fit(plain, QATCallback(**SCALES[name]), max_steps=12)
    fit(task, QATCallback(**SCALES[name], oscillation=True), max_steps=12)
    assert task.losses == plain.losses


def test_a_new_rung_begins_from_nothing_where_the_width_changes():
    callback = QATCallback(
        [{"target": "net.0", "scheme": "w8"}, {"target": "net.2", "scheme": "w2"}],
        schedule={0: 16, 4: 8, 20: 2},
        oscillation={**FREEZING, "start": 8, "freeze_threshold": 0.1, "max_bits": 8},
    )
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen[trainer.global_step] = {name: state.frozen.any().item() for name, state in states().items()}
            seen[-trainer.global_step] = {name: state.frequency.max().item() for name, state in states().items()}

    def states():
        return technique(callback)._states

    fit(TinyTask(lr=5e-2), callback, Look(), max_steps=24)
    assert seen[4] == {}
    assert all(seen[20].values())
    assert seen[21] == {"net.0": True, "net.2": False}
    assert seen[-21]["net.0"] > 0
    assert seen[-21]["net.2"] == 0


def test_tied_weights_are_measured_once():
    class Tied(TinyTask):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
            self.net[2].weight = self.net[0].weight

    callback = qat(FREEZING)
    fit(Tied(), callback, max_steps=STEPS)
    assert set(technique(callback)._states) == {"net.0", "net.4"}
    assert frozen_of(callback)["net.0"].any()


# --------------------------------------------------------------------------------------------------- dampening


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_dampening_adds_the_gradient_of_its_loss_once_for_each_step(options):
    """After one step of SGD without momentum; the loss is that of the source, by autograd."""

    class Plain(TinyTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    plain, task = Plain(), Plain()
    fit(plain, qat(None), max_steps=1, **options)
    fit(task, qat({"dampening": (0.3, 0.3), "start": 0, "measure": False}), max_steps=1, **options)
    initial = Plain()
    QATCallback("w3g8").prepare(initial)
    for name, layer in quantized_layers(initial).items():
        target = layer.fake_quantized_weight().detach()
        scale = layer.weight_fake_quant.qparams(layer.weight).scale.repeat_interleave(8, 1)
        clipped = torch.clamp(layer.weight, -4 * scale, 3 * scale)
        (0.3 * (target - clipped).square().sum()).backward()
        moved = plain.get_submodule(name).weight - task.get_submodule(name).weight
        torch.testing.assert_close(moved, 0.1 * layer.weight.grad, rtol=1e-4, atol=1e-7)
        assert layer.weight.grad.any()


def test_dampening_rises_by_half_a_cosine_and_brings_weights_to_the_middle_of_their_bins():
    callback = qat({"dampening": 0.5, "start": 0.25})
    plain, task, record = TinyTask(lr=1e-3), TinyTask(lr=1e-3), Record()
    fit(plain, qat(True), max_steps=STEPS)
    fit(task, callback, record, max_steps=STEPS)
    values = [technique(callback)._value((0.0, 0.5), step) for step in (10, 20, 25, 40)]
    assert values == pytest.approx([0.0, 0.125, 0.25, 0.5])
    untouched = TinyTask(lr=1e-3)
    fit(untouched, qat(None), max_steps=STEPS)
    assert plain.losses == untouched.losses
    assert task.losses[:12] == plain.losses[:12]  # the weight is zero at step 10, and felt in the loss two later
    assert task.losses[12:] != plain.losses[12:]
    assert distance_to_levels(task) < 0.9 * distance_to_levels(plain)


def distance_to_levels(task):
    layers = quantized_layers(task).values()
    distances = [(layer.fake_quantized_weight() - layer.weight).abs() for layer in layers]
    return torch.cat([each.flatten() for each in distances]).mean().item()


def test_each_optimizer_is_dampened_for_its_own_weights():
    class TwoOptimizers(TinyTask):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[2])]

    class OneOptimizer(TinyTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    settings = {"dampening": (0.3, 0.3), "start": 0}
    two, one = TwoOptimizers(), OneOptimizer()
    fit(two, qat(settings), max_steps=6)
    fit(one, qat(settings), max_steps=3)
    assert torch.equal(two.net[0].weight, one.net[0].weight)
    assert torch.equal(two.net[2].weight, one.net[2].weight)


# ---------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCALES)
def test_frozen_weights_never_move_again(name, optimizer):
    """Their value stays to the bit where scales follow the weights, and their code where these do not."""
    callback, record, frozen = qat(FREEZING, **SCALES[name]), Record(), {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            for name, layer in quantized_layers(pl_module).items():
                quantized, state = layer.quantized_weight(), technique(callback)._states[name]
                if holds is record.codes:  # what the forward pass computes with
                    level = quantized.dequantize()[state.frozen]
                    torch.testing.assert_close(layer.weight[state.frozen], level, rtol=1e-6, atol=1e-7)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, layer in quantized_layers(pl_module).items():
                assert not layer.weight.grad[technique(callback)._states[name].frozen].any()
                assert layer.weight.grad.any()

        def on_train_batch_end(self, trainer, pl_module, *_):
            frozen[trainer.global_step] = frozen_of(callback)

    task = TinyTask(optimizer=optimizer, lr=0.2 if optimizer == "sgd" else 3e-2)
    holds = record.codes if name in ("learned", "costly", "without zero") else record.weights
    fit(task, callback, record, Look(), max_steps=STEPS)
    for step in range(2, STEPS + 1):
        before = all_of(frozen[step - 1])
        assert torch.equal(all_of(holds[step])[before], all_of(holds[step - 1])[before])
        assert (all_of(frozen[step]) >= before).all()
    free = ~all_of(frozen[STEPS])
    assert not all_of(frozen[9]).any()
    assert 0.02 < 1 - free.float().mean() < 0.98
    assert not torch.equal(all_of(record.weights[STEPS])[free], all_of(record.weights[STEPS - 1])[free])
    assert record.figures[STEPS]["qat/frozen_fraction"] == pytest.approx(1 - free.double().mean().item())


def test_a_weight_is_frozen_at_a_level():
    callback, record = qat(FREEZING, scale_lr=1e-2), Record()
    task = TinyTask(lr=3e-2)
    fit(task, callback, record, max_steps=STEPS)
    for name, layer in quantized_layers(task).items():
        frozen = frozen_of(callback)[name]
        assert frozen.any()
        torch.testing.assert_close(layer.fake_quantized_weight()[frozen], layer.weight[frozen], rtol=1e-6, atol=1e-7)


def test_oscillation_goes_down():
    shares = []
    for settings in ({"momentum": 0.2}, FREEZING):
        record = Record()
        fit(TinyTask(lr=3e-2), qat(settings), record, max_steps=STEPS)
        shares.append(record.figures[STEPS]["qat/oscillating_fraction"])
    assert shares[1] < 0.2 * shares[0]


# ---------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("at", [3, 10, 21, 33])
@pytest.mark.parametrize("name", SCALES)
def test_resuming_anywhere_is_bit_exact(name, at, tmp_path):
    """Before anything is frozen, when freezing begins, after a refresh of a costly grid, and late."""
    settings = {**FREEZING, "dampening": 0.1}
    whole, resumed = TinyTask(lr=3e-2), TinyTask(seed=99, lr=3e-2)
    first, second = qat(settings, **SCALES[name]), qat(settings, **SCALES[name])
    fit(whole, first, StepCheckpoint(tmp_path, [at]), max_steps=STEPS)
    fit(resumed, second, max_steps=STEPS, ckpt_path=tmp_path / f"step{at}.ckpt")
    assert resumed.losses == whole.losses[at:]
    for name, state in technique(first)._states.items():
        for key, value in state.state_dict().items():
            assert torch.equal(value, technique(second)._states[name].state_dict()[key])
    assert all_of(frozen_of(first)).any()


def test_resuming_in_the_middle_of_an_accumulation_counts_no_step_twice(tmp_path):
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 30:  # the first of three batches of step 11
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    options = {"max_steps": 20, "accumulate_grad_batches": 3}
    first, second = qat({"momentum": 0.2}), qat({"momentum": 0.2})
    fit(TinyTask(), first, SaveAt(), **options)
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["lightning_qat"]["techniques"]["oscillation"]
    assert saved["step"] == 10

    class Look(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, *_):
            states = technique(second)._states.items()
            self.seen.append((trainer.global_step, {name: state.frequency.clone() for name, state in states}))

    look = Look()
    fit(TinyTask(), second, look, ckpt_path=tmp_path / "middle.ckpt", **options)
    step, frequencies = look.seen[0]
    assert step == 10
    for name, frequency in frequencies.items():
        assert torch.equal(frequency, saved["layers"][name]["frequency"])
        assert not torch.equal(frequency, look.seen[-1][1][name])


def test_it_can_be_switched_on_in_a_resumed_run(tmp_path):
    fit(TinyTask(), qat(None), StepCheckpoint(tmp_path, [5]), max_steps=STEPS)
    fit(
        TinyTask(),
        qat({"momentum": 0.2}),
        StepCheckpoint(tmp_path, [20]),
        max_steps=STEPS,
        ckpt_path=tmp_path / "step5.ckpt",
    )
    callback = qat(FREEZING)
    fit(TinyTask(lr=3e-2), callback, max_steps=STEPS, ckpt_path=tmp_path / "step20.ckpt")
    assert technique(callback)._states["net.0"].frozen is not None


def test_each_fit_begins_anew():
    callback = qat(FREEZING)
    losses = []
    for _ in range(2):
        task = TinyTask(lr=3e-2)
        fit(task, callback, max_steps=STEPS)
        losses.append(task.losses)
    assert losses[0] == losses[1]


def test_a_copied_callback_works():
    callback = copy.deepcopy(qat(FREEZING))
    fit(TinyTask(lr=3e-2), callback, max_steps=STEPS)
    assert all_of(frozen_of(callback)).any()


class Diverging(TinyTask):
    """Diverges on the second rung, in the eyes of its validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(1e3 if 20 <= self.trainer.global_step < 28 else 1.0), batch_size=1)


def test_going_back_a_rung_begins_from_nothing():
    schedule = {"name": "plateau", "bits": [4, 2], "monitor": "val/loss", "patience": 3, "trial": 4}
    rules = [{"target": "net.0", "scheme": "w4"}, {"target": "net.2", "scheme": "w2"}]
    callback, states, widths = qat(FREEZING, scheme=rules, schedule=schedule), {}, {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            states[trainer.global_step] = {name: state.frozen for name, state in technique(callback)._states.items()}
            widths[trainer.global_step] = callback.timeline.num_bits(trainer.global_step)

    fit(Diverging(lr=5e-2), callback, Look(), max_steps=60, val_check_interval=4)
    down = next(step for step in widths if widths[step] == 2)
    back = next(step for step in widths if step > down and widths[step] == 4)
    assert states[back - 1]["net.0"].any()
    assert not any(frozen.any() for frozen in states[back].values())
    assert all(frozen.any() for frozen in states[back + 6].values())


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dampening": -1}, ValueError, "dampening=-1 must be positive"),
        ({"dampening": "much"}, TypeError, "dampening='much' must be a number, or two"),
        ({"freeze_threshold": (1, 2, 3)}, TypeError, "must be a number, or two"),
        ({"freeze_threshold": 1.5}, ValueError, "freeze_threshold=1.5 must be between 0 and 1"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0 must be below 1"),
        ({"threshold": 0}, ValueError, "threshold=0 must be positive"),
        ({"start": 1.0}, ValueError, "oscillation: start: A fraction"),
        ({"measure": False}, ValueError, "does nothing with measure=False"),
        ({"measure": False, "freeze_threshold": 0.1}, ValueError, "needs the frequencies"),
        ({"damping": 0.1}, TypeError, "unexpected keyword"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        QATCallback("w4", oscillation=arguments)


def test_what_does_not_fit_the_run_is_refused_before_training():
    task = TinyTask()
    with pytest.raises(QATConfigurationError, match="start=200 is not reached in a run of 10"):
        fit(task, qat({"dampening": 0.1, "start": 200}), max_steps=10)
    with pytest.raises(QATConfigurationError, match=r"dampening goes from 0 to 0.1 over a run.*dampening=\(0.1, 0.1\)"):
        fit(task, qat({"dampening": 0.1, "start": 2}), max_epochs=-1)
    assert task.losses == []


def test_the_summary_says_what_is_done_and_what_it_costs(capsys):
    fit(TinyTask(), qat({"dampening": 0.1, "freeze_threshold": (0.04, 0.011)}), max_steps=8)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "measured at every step (11 bytes a weight, 0.0 MiB" in text
    assert "dampened with a weight from 0 to 0.1, frozen above a frequency from 0.04 to 0.011" in text
    assert "up to 4 bits, from step 2" in text


def test_wide_weights_are_measured_but_neither_frozen_nor_dampened():
    callback = QATCallback(
        [{"target": "net.0", "scheme": "w8"}, {"target": "net.2", "scheme": "w3"}],
        oscillation={**FREEZING, "start": 2, "freeze_threshold": 0.1},
    )
    fit(TinyTask(lr=5e-2), callback, max_steps=24)
    states = technique(callback)._states
    assert states["net.0"].frequency.max() > 0.1
    assert not states["net.0"].frozen.any()
    assert states["net.2"].frozen.any()
