"""A module and its callbacks over their whole life: interrupted, copied, pickled, in other processes."""

import copy
import multiprocessing
import pickle
import signal
import threading

import lightning.pytorch as pl
import pytest
import torch

from lightning_qat import PTQCallback, QATCallback, load_qat, quantized_weights
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.nn import quantized_layers
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.helpers import TinyTask, batch_at, fit, loader, make_trainer

OPTIONS = {
    "scheme": "w2a8-static",
    "schedule": [8, 4, 2],
    "scale_lr": 1e-3,
    "freeze_at": 0.9,
    "activation_calibration_steps": 3,
    "distillation": {"task_weight": 1.0},
    "oscillation": {"freeze_threshold": 0.04},
}
STEPS = 24


class At(pl.Callback):
    """Does something after an optimizer step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            self.action(trainer, pl_module)


class Stop(Exception):
    """What a user's code may raise."""


class Calibrated(TinyTask):
    """Its loaders give placeholders."""

    def calibration_step(self, batch):
        self(batch_at(0))


def fail(trainer, pl_module):
    raise Stop


def interrupt(trainer, pl_module):
    signal.raise_signal(signal.SIGINT)


def leftovers(task):
    """Return what the callback has put into the instance and not taken out."""
    hooks = ("setup", "configure_model", "configure_optimizers", "configure_gradient_clipping", "on_save_checkpoint")
    return {*hooks, "training_step", "forward"} & set(vars(task))


def finish(task, callback=None):
    fit(task, callback or QATCallback(**OPTIONS), max_steps=STEPS)
    return state_of(task)


@pytest.fixture(autouse=True)
def _listening_to_interrupts():
    """A shell lets what it runs in the background ignore Ctrl-C, and so does Lightning once it had one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def expected():
    return finish(TinyTask())


@pytest.mark.parametrize(("action", "error"), [(fail, Stop), (interrupt, (KeyboardInterrupt, SystemExit))])
def test_after_an_interruption_the_same_objects_can_train_again(action, error, expected, tmp_path):
    """Ctrl-C ends the process with Lightning's error, which a notebook survives."""
    task, callback = Calibrated(), QATCallback(**OPTIONS)
    ptq = PTQCallback("rtn", bits=4, results=tmp_path / "ptq.jsonl")
    with pytest.raises(error):
        fit(task, callback, ptq, At(10, action), max_steps=STEPS)
    assert not leftovers(task)
    assert len(quantized_layers(task)) == 2
    make_trainer(callback).validate(task, loader(4), verbose=False)
    task.load_state_dict(TinyTask().state_dict(), strict=False)
    again = finish(TinyTask(), callback)
    assert_same(
        {k: v for k, v in again.items() if "fake_quant" not in k},
        {k: v for k, v in expected.items() if "fake_quant" not in k},
    )


@pytest.mark.parametrize("action", [fail, interrupt])
def test_what_was_saved_before_an_interruption_is_resumed_to_the_bit(action, expected, tmp_path):
    with pytest.raises((Stop, KeyboardInterrupt, SystemExit)):
        fit(TinyTask(), QATCallback(**OPTIONS), StepCheckpoint(tmp_path, [9]), At(13, action), max_steps=STEPS)
    resumed = TinyTask()
    fit(resumed, QATCallback(**OPTIONS), max_steps=STEPS, ckpt_path=tmp_path / "step9.ckpt")
    assert_same(state_of(resumed), expected)


@pytest.mark.parametrize("step", [2, 10, 23])
def test_copies_and_pickles_in_the_middle_compute_the_same_and_disturb_nothing(step, expected):
    def look(trainer, pl_module):
        for twin in (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))):
            x = batch_at(77)
            assert torch.equal(twin.eval()(x), pl_module.eval()(x))
            pl_module.train()
            seen.append(set(quantized_layers(twin)))
        for callback in (copy.deepcopy(trainer.callbacks[0]), pickle.loads(pickle.dumps(trainer.callbacks[0]))):
            seen.append(callback.timeline.rungs)

    seen, task = [], TinyTask()
    fit(task, QATCallback(**OPTIONS), At(step, look), max_steps=STEPS)
    assert len(seen) == 4
    assert_same(state_of(task), expected)


def test_a_copy_of_the_callback_trains_another_module_alike(expected):
    callback = QATCallback(**OPTIONS)
    finish(TinyTask(seed=3), callback)
    assert_same(finish(TinyTask(), pickle.loads(pickle.dumps(QATCallback(**OPTIONS)))), expected)
    assert_same(finish(TinyTask(), copy.deepcopy(callback)), expected)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_fit_after_another_stage(stage):
    def make():
        return QATCallback(**{**OPTIONS, "scheme": "w2a8", "activation_calibration_steps": None})

    task, callback = TinyTask(), make()
    getattr(make_trainer(callback), stage)(task, loader(4))
    assert_same(finish(task, callback), finish(TinyTask(), make()))


def in_child(path, queue):
    task = load_qat(TinyTask(seed=1), path)
    queue.put({name: weight.codes.numpy() for name, weight in quantized_weights(task).items()})


def test_another_process_reads_the_same_codes(tmp_path):
    task = TinyTask()
    fit(task, QATCallback(**OPTIONS), StepCheckpoint(tmp_path, [STEPS]), max_steps=STEPS)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(tmp_path / f"step{STEPS}.ckpt", queue))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    for name, weight in quantized_weights(task).items():
        assert torch.equal(torch.from_numpy(found[name]), weight.codes)


def test_two_modules_train_in_two_threads_alike(expected):
    """As hyper-parameter searches do: nothing that the callback keeps is global."""
    tasks = [TinyTask(), TinyTask()]
    threads = [threading.Thread(target=finish, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for task in tasks:
        assert_same(state_of(task), expected)
