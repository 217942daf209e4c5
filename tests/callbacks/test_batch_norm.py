"""Batch normalization in real runs: statistics that belong to the weights, and training that goes on as before."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from torch import nn

from lightning_qat import QATCallback, load_qat
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.callbacks.techniques import BatchNorm
from lightning_qat.nn.batch_norm import batch_norms, reestimate
from tests.helpers import TinyTask, fit, loader, make_trainer


def images_at(index, size=8):
    return 1 + torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(2000 + index))


class images(loader):
    """A resumable loader of images."""

    def __iter__(self):
        self.position %= self.num_batches
        while self.position < self.num_batches:
            self.position += 1
            yield {"x": images_at(self.position - 1)}


class ConvTask(pl.LightningModule):
    def __init__(self, seed=0, lr=5e-2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.2)
        self.lr, self.losses, self.scores, self.modes = lr, [], [], []

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.dropout(torch.relu(self.bn2(self.conv2(x))).mean((2, 3))))

    def training_step(self, batch, batch_idx):
        self.modes.append((self.bn1.training, self.bn2.training, self.dropout.training))
        loss = nn.functional.mse_loss(self(batch["x"]), batch["x"][:, :1, :2, :2].flatten(1))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        score = nn.functional.mse_loss(self(batch["x"]), batch["x"][:, :1, :2, :2].flatten(1))
        self.scores.append(score.item())
        self.log("val/loss", score)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def run(task, *callbacks, batch_norm=None, scheme="w3", num_batches=12, ckpt_path=None, **options):
    qat = QATCallback(scheme, batch_norm=batch_norm)
    trainer = make_trainer(qat, *callbacks, **options)
    torch.manual_seed(7)  # of dropout
    trainer.fit(task, images(num_batches), images(2), ckpt_path=ckpt_path)
    return trainer


def statistics(task):
    return {name: buffer.clone() for name, buffer in task.named_buffers() if "running" in name}


def expected_statistics(task, batches):
    """Statistics of the weights as they are, on a copy."""
    twin = copy.deepcopy(task)
    twin._trainer = None
    reestimate(twin, list(batch_norms(twin).values()), lambda index: twin(batches[index]["x"]), len(batches))
    return statistics(twin)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


FIRST = [{"x": images_at(index)} for index in range(3)]


# --------------------------------------------------------------------------------------------- re-estimation


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 4, "accumulate_grad_batches": 2}])
def test_training_goes_on_to_the_bit_as_without(options):
    plain, task = ConvTask(), ConvTask()
    run(plain, max_epochs=2, **options)
    run(task, batch_norm=3, max_epochs=2, **options)
    assert task.losses == plain.losses
    assert task.modes == plain.modes
    assert task.scores != plain.scores
    assert_same(dict(task.named_parameters()), dict(plain.named_parameters()))
    assert_same(
        {n: b for n, b in task.named_buffers() if "tracked" in n},
        {n: b for n, b in plain.named_buffers() if "tracked" in n},
    )


def test_checkpoints_of_every_kind_have_statistics_of_their_weights(tmp_path):
    """Saved after a validation, in the middle and at the end of an epoch; at the last step; and after the fit."""
    after_validation = pl_callbacks.ModelCheckpoint(tmp_path / "val", monitor="val/loss", save_top_k=-1)
    at_steps = pl_callbacks.ModelCheckpoint(tmp_path / "steps", every_n_train_steps=10)
    task = ConvTask()
    options = {"max_steps": 20, "max_epochs": -1, "val_check_interval": 6, "enable_checkpointing": True}
    trainer = run(task, after_validation, at_steps, batch_norm=3, **options)
    trainer.save_checkpoint(tmp_path / "val" / "end.ckpt")
    files = [*(tmp_path / "val").glob("*.ckpt"), *(tmp_path / "steps").glob("*step=20.ckpt")]
    assert len(files) == 5
    for file in files:
        loaded = load_qat(ConvTask(seed=9), file)
        assert_same(statistics(loaded), expected_statistics(loaded, FIRST))


def test_statistics_at_the_end_belong_to_the_weights_without_a_validation():
    task = ConvTask()
    run(task, batch_norm=3, max_epochs=2, limit_val_batches=0)
    assert_same(statistics(task), expected_statistics(task, FIRST))


def test_the_checkpoint_of_the_last_epoch_has_them_without_a_validation(tmp_path):
    saver = pl_callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    task = ConvTask()
    run(task, saver, batch_norm=3, max_epochs=2, limit_val_batches=0, enable_checkpointing=True)
    loaded = load_qat(ConvTask(seed=9), tmp_path / "epoch=1.ckpt")
    assert_same(statistics(loaded), expected_statistics(loaded, FIRST))


def test_statistics_belong_to_the_weights_of_a_run_that_is_stopped():
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    task = ConvTask()
    run(task, Stop(), batch_norm=3, max_epochs=5, limit_val_batches=0)
    assert len(task.losses) == 12
    assert_same(statistics(task), expected_statistics(task, FIRST))


def test_random_numbers_of_the_pass_leave_no_trace():
    class Task(ConvTask):
        def calibration_step(self, batch):
            return self(batch["x"] + 0.1 * torch.randn_like(batch["x"]))

    plain, task = Task(), Task()
    run(plain, max_epochs=2)
    run(task, batch_norm=3, max_epochs=2)
    assert task.losses == plain.losses


def test_an_early_validation_uses_the_batches_so_far():
    task = ConvTask()
    seen = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append((statistics(pl_module), expected_statistics(pl_module, FIRST[: trainer.global_step])))

    run(task, Look(), batch_norm=3, val_check_interval=2, max_steps=4)
    for found, expected in seen:
        assert_same(found, expected)
    assert len(seen) == 2


def test_given_batches_take_the_place_of_training_batches():
    given = [{"x": images_at(500 + index)} for index in range(4)]
    task = ConvTask()
    run(task, batch_norm={"calibration_data": given, "reestimate": 2})
    assert_same(statistics(task), expected_statistics(task, given[:2]))


def test_a_calibration_step_is_used_if_there_is_one():
    class Task(ConvTask):
        def calibration_step(self, batch):
            assert not self.dropout.training
            return self(2 * batch["x"])

    task = Task()
    run(task, batch_norm=3)
    assert_same(statistics(task), expected_statistics(task, [{"x": 2 * batch["x"]} for batch in FIRST]))


def test_layers_in_evaluation_mode_are_left_alone():
    class Task(ConvTask):
        def on_train_epoch_start(self):
            self.bn1.eval()

    task = Task()
    run(task, batch_norm=3)
    assert torch.equal(task.bn1.running_mean, torch.zeros(8))
    assert torch.equal(task.bn2.running_mean, expected_statistics_of_second(task))
    assert not task.bn1.training


def expected_statistics_of_second(task):
    twin = copy.deepcopy(task)
    twin._trainer = None
    reestimate(twin, [twin.bn2], lambda index: twin(FIRST[index]["x"]), 3)
    return twin.bn2.running_mean


def test_batches_that_take_too_much_memory_are_left_out():
    task = ConvTask()
    num_bytes = images_at(0).nbytes
    with pytest.warns(UserWarning, match="keeps 2 training batches, not 50.*Raise memory_gib"):
        run(task, batch_norm={"memory_gib": 2.5 * num_bytes / 2**30})
    assert_same(statistics(task), expected_statistics(task, FIRST[:2]))


def test_observers_of_static_inputs_see_nothing_of_it():
    """Neither before a validation nor when statistics are frozen in the middle of their calibration."""
    grids = []
    for batch_norm in (None, {"reestimate": 2, "freeze_at": 4}):
        task = ConvTask()
        callback = QATCallback(
            "w4a8-static", batch_norm=batch_norm, activation_calibration_steps=6, activation_observer="ema"
        )
        trainer = make_trainer(callback, max_steps=10, val_check_interval=3, max_epochs=-1)
        torch.manual_seed(7)
        trainer.fit(task, images(12), images(2))
        grids.append(task.conv1.input_fake_quant.seen)  # the input of the first layer does not depend on statistics
    assert torch.equal(*grids)


def test_each_fit_begins_anew():
    callback = QATCallback("w3", batch_norm=2)
    for _ in range(2):
        task = ConvTask()
        make_trainer(callback, max_steps=4).fit(task, images(12), images(2))
        assert_same(statistics(task), expected_statistics(task, FIRST[:2]))


@pytest.mark.skipif(not hasattr(pl_callbacks, "EMAWeightAveraging"), reason="came with Lightning 2.6")
def test_an_average_of_weights_is_validated_and_saved_with_statistics_of_its_own(tmp_path):
    average = pl_callbacks.EMAWeightAveraging(decay=0.7)
    saver = pl_callbacks.ModelCheckpoint(tmp_path, monitor="val/loss", filename="ema")
    task = ConvTask()
    run(task, average, saver, batch_norm=3, enable_checkpointing=True, max_steps=12)
    loaded = load_qat(ConvTask(seed=9), tmp_path / "ema.ckpt")
    assert_same(statistics(loaded), expected_statistics(loaded, FIRST))
    assert_same(statistics(task), statistics(loaded))  # after training the average is what stays


@pytest.mark.skipif(not hasattr(pl_callbacks, "EMAWeightAveraging"), reason="came with Lightning 2.6")
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"val_check_interval": 5}, {"val_check_interval": 12}])
def test_an_average_that_stays_has_statistics_of_its_own_wherever_the_last_validation_was(use_buffers, options):
    average = pl_callbacks.EMAWeightAveraging(decay=0.8, use_buffers=use_buffers)
    task = ConvTask()
    run(task, average, batch_norm=3, max_steps=12, max_epochs=-1, **options)
    assert_same(statistics(task), expected_statistics(task, FIRST))
    assert "on_train_end" not in vars(task)
    assert task.bn1.training


def run_two_processes(folder, *arguments):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.ddp_batch_norm", str(folder), *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_processes_whose_memory_is_full_at_different_batches_freeze_together(tmp_path):
    """It is in one of them when statistics freeze: had that one computed them, it would wait for the other for ever."""
    first, second = run_two_processes(tmp_path, "uneven")
    assert (first["num_batches"], second["num_batches"]) == (5, 10)
    for each in (first, second):
        assert each["modes"] == [(True, True, True)] * 7 + [(False, False, True)] * 5
    assert_same(first["statistics"], second["statistics"])


def test_processes_share_one_average_and_freeze_the_same_weights(tmp_path):
    first, second = run_two_processes(tmp_path)
    for part in ("statistics", "weights", "frozen"):
        assert_same(first[part], second[part])
    for name, value in first["statistics"].items():
        torch.testing.assert_close(value, (first["own"][name] + second["own"][name]) / 2)
        assert not torch.allclose(first["own"][name], second["own"][name], rtol=1e-3)
    assert any(frozen.any() for frozen in first["frozen"].values())


# --------------------------------------------------------------------------------------------------- freezing


class PutIntoTrainingMode(pl.Callback):
    """As older versions of Lightning and some modules do."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.train()


@pytest.mark.parametrize("reestimated", [3, None])
def test_statistics_freeze_for_good(reestimated):
    task, seen = ConvTask(), {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = statistics(pl_module)
            if trainer.global_step == 10:
                seen["weights"] = copy.deepcopy(pl_module)

    run(
        task,
        Look(),
        PutIntoTrainingMode(),
        batch_norm={"reestimate": reestimated, "freeze_at": 10},
        max_epochs=3,
        num_batches=8,
        val_check_interval=4,
    )
    assert task.modes == [(True, True, True)] * 10 + [(False, False, True)] * 14
    for step in range(11, 25):
        assert_same(seen[11], seen[step])
    assert_same(seen[11], statistics(task))
    if reestimated:
        assert_same(seen[11], expected_statistics(seen["weights"], FIRST))
    else:
        assert_same(seen[11], seen[10])
    assert task.bn1.training
    assert not torch.equal(task.bn1.weight, seen["weights"].bn1.weight)


def test_freezing_at_the_start_keeps_the_statistics_of_the_pretrained_model():
    task = ConvTask()
    task.bn1.running_mean.fill_(0.5)
    before = statistics(task)
    run(task, batch_norm={"freeze_at": 0})
    assert_same(before, statistics(task))


def test_frozen_statistics_are_those_of_the_rung():
    task, seen = ConvTask(), {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = statistics(pl_module)

        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 8:
                seen["weights"] = copy.deepcopy(pl_module)

    callback = QATCallback("w2", schedule={0: 4, 8: 2}, batch_norm={"reestimate": 3, "freeze_at": 4})
    make_trainer(callback, Look(), max_steps=12).fit(task, images(12), images(2))
    for norm in (seen["weights"].bn1, seen["weights"].bn2):
        norm.train()
    assert_same(seen[9], expected_statistics(seen["weights"], FIRST))
    assert_same(seen[5], seen[8])
    assert_same(seen[9], seen[12])
    assert not torch.equal(seen[8]["bn2.running_var"], seen[9]["bn2.running_var"])
    assert task.modes[4:] == [(False, False, True)] * 8


# --------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("at", [2, 7, 12, 15])
def test_resuming_anywhere_is_bit_exact(at, tmp_path):
    """While batches are still captured, after that, when statistics are about to freeze, and when they are frozen."""
    settings = {"reestimate": 4, "freeze_at": 12}
    options = {"max_steps": 20, "max_epochs": -1, "num_batches": 10, "val_check_interval": 5}
    whole, resumed = ConvTask(), ConvTask(seed=99)
    whole.dropout.p = resumed.dropout.p = 0.0
    run(whole, StepCheckpoint(tmp_path, [at]), batch_norm=settings, **options)
    run(resumed, batch_norm=settings, ckpt_path=tmp_path / f"step{at}.ckpt", **options)
    assert resumed.losses == whole.losses[at:]
    assert_same(statistics(resumed), statistics(whole))
    assert resumed.scores == whole.scores[-len(resumed.scores) :]
    assert len(resumed.scores) >= 2


class Wrapped:
    """A batch that a checkpoint of plain tensors cannot hold."""

    def __init__(self, x):
        self.x = x

    def __getitem__(self, key):
        return self.x

    def __len__(self):
        return len(self.x)


def test_a_checkpoint_without_the_batches_is_warned_of(tmp_path):
    class Task(ConvTask):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return Wrapped(batch["x"])

        def calibration_step(self, batch):
            return self(batch["x"])

    run(Task(), StepCheckpoint(tmp_path, [4]), batch_norm=3, max_steps=6)
    with pytest.warns(UserWarning, match="does not hold the batches.*Give calibration_data"):
        run(Task(), batch_norm=3, max_steps=6, ckpt_path=tmp_path / "step4.ckpt")


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reestimate": None}, ValueError, "does nothing without reestimate and freeze_at"),
        ({"reestimate": 0}, ValueError, "reestimate=0 must be positive"),
        ({"reestimate": 1.5}, TypeError, "must be a whole number"),
        ({"freeze_at": 1.5}, ValueError, "batch_norm: freeze_at: A fraction of the run"),
        ({"memory_gib": -1}, ValueError, "memory_gib=-1 must be positive"),
        ({"calibration_data": []}, ValueError, "no batches"),
        ({"batches": 3}, TypeError, "batch_norm=.*unexpected keyword"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        QATCallback("w4", batch_norm=arguments)


def test_what_does_not_fit_the_model_is_refused_before_training():
    with pytest.raises(QATConfigurationError, match=r"TinyTask has no batch normalization.*Leave batch_norm out"):
        fit(TinyTask(), QATCallback("w4", batch_norm=True), max_steps=2)
    with pytest.raises(QATConfigurationError, match="freeze_at=40 is not reached in a run of 12"):
        run(ConvTask(), batch_norm={"freeze_at": 40})
    with pytest.raises(QATConfigurationError, match=r"freeze_at=0.5 is a fraction of a run that has no known end"):
        run(ConvTask(), batch_norm={"freeze_at": 0.5}, max_epochs=-1)

    class WithoutForward(ConvTask):
        forward = pl.LightningModule.forward

    with pytest.raises(QATConfigurationError, match=r"no forward.*calibration_step\(self, batch\)"):
        run(WithoutForward(), batch_norm=True)

    class OtherForward(ConvTask):
        def forward(self, image):
            return super().forward(image["y"] if isinstance(image, dict) else image)

    task = OtherForward()
    with pytest.raises(QATConfigurationError, match=r"forward fails on a batch with KeyError.*or set reestimate=None"):
        run(task, batch_norm=True)
    assert len(task.losses) == 1


def test_it_is_said_if_nothing_is_in_training_mode():
    class Task(ConvTask):
        def on_train_epoch_start(self):
            self.bn1.eval()
            self.bn2.eval()

    with pytest.warns(UserWarning, match="batch_norm has no effect"):
        run(Task(), batch_norm=True)


def test_the_summary_says_what_is_done(capsys):
    run(ConvTask(), batch_norm={"reestimate": 5, "freeze_at": 0.75})
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Batch norm statistics of 2 layers computed anew from 5 training batches" in text
    assert "frozen from step 9" in text


@pytest.mark.filterwarnings("ignore:Training stopped")
def test_a_fast_dev_run_tries_everything():
    task = ConvTask()
    run(task, batch_norm=BatchNorm(50, freeze_at=500), fast_dev_run=2)
    assert task.modes == [(False, False, True)] * 2
