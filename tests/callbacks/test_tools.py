"""What Lightning does around a fit: its command line, and its searches for a learning rate and a batch size."""

import logging

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_qat import QATCallback
from lightning_qat.core import QuantScheme
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.helpers import TinyTask, make_trainer
from tests.matrix.models import Task, loaders

pytestmark = pytest.mark.filterwarnings("ignore")

# ------------------------------------------------------------------------------------------------------- LightningCLI


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loaders()[0]

    def val_dataloader(self):
        return loaders()[1]


def run_cli(tmp_path, *arguments):
    cli = pytest.importorskip("lightning.pytorch.cli")
    pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    defaults = {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(tmp_path), "max_epochs": 2}
    return cli.LightningCLI(Task, Data, args=["fit", *arguments], trainer_defaults=defaults).trainer


CALLBACKS = [
    {
        "class_path": "lightning_qat.QATCallback",
        "init_args": {
            "scheme": [{"target": "*", "scheme": "w4"}, {"target": "model.0", "scheme": "w8"}],
            "schedule": [8, 4],
            "scale_lr": 0.001,
            "observer": {"name": "mse"},
            "distillation": {"task_weight": 0.5},
            "freeze_at": {"drift_below": 0.001, "every_n_steps": 4},
        },
    },
    {"class_path": "lightning_qat.PTQCallback", "init_args": {"methods": ["rtn", {"name": "gptq"}], "bits": [8, 4]}},
]


def test_callbacks_of_a_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.dump({"trainer": {"callbacks": CALLBACKS}}))
    trainer = run_cli(tmp_path, "--config", str(config))
    (qat,) = (each for each in trainer.callbacks if isinstance(each, QATCallback))
    schemes = {layer.name: layer.scheme for layer in qat.plan.layers}
    assert schemes == {"model.0": QuantScheme.parse("w8"), "model.2": QuantScheme.parse("w4")}
    assert "ptq_of_latent/gptq_w4/val/loss" in trainer.callback_metrics
    (saved,) = tmp_path.rglob("config.yaml")
    again = run_cli(tmp_path / "again", "--config", str(saved), "--trainer.logger", "false")
    assert again.callback_metrics["val/loss"] == trainer.callback_metrics["val/loss"]


def test_callbacks_of_the_command_line(tmp_path):
    arguments = ["--trainer.logger=false", "--trainer.callbacks+=lightning_qat.QATCallback"]
    options = ["scheme=w4g16", "schedule=[8, 4]", "ignore=[model.2]", "schedule=linear"]
    trainer = run_cli(tmp_path, *arguments, *(f"--trainer.callbacks.{option}" for option in options))
    (qat,) = (each for each in trainer.callbacks if isinstance(each, QATCallback))
    assert [layer.name for layer in qat.plan.layers] == ["model.0"]


@pytest.mark.parametrize(
    ("option", "message"),
    [("scheem=w4", "Option 'scheem' is not accepted"), ("scheme=w99", "num_bits=99"), ("scale_lr=[1]", "scale_lr")],
)
def test_mistakes_on_the_command_line_are_explained(option, message, tmp_path, capsys):
    arguments = ["--trainer.callbacks+=lightning_qat.QATCallback", "--trainer.callbacks.scheme=w4"]
    with pytest.raises((SystemExit, ValueError)) as caught:
        run_cli(tmp_path, *arguments, f"--trainer.callbacks.{option}")
    assert message in capsys.readouterr().err + str(caught.value)


# ----------------------------------------------------------------------------------------------------------- searches


def search(options, *callbacks, lr=1e-2):
    task = TinyTask(lr=lr)
    qat = QATCallback("w2g16", **{"schedule": [8, 4, 2], "scale_lr": "same", "freeze_at": 0.9, **options})
    trainer = make_trainer(qat, *callbacks, max_steps=24)
    trainer.fit(task, DataLoader(torch.zeros(200, 1), 1), DataLoader(torch.zeros(2, 1), 1))
    return task


PLATEAU = {"name": "plateau", "bits": [8, 4, 2], "monitor": "val/loss", "patience": 1}


@pytest.mark.parametrize(
    "options",
    [{}, {"distillation": True}, {"oscillation": True}, {"schedule": PLATEAU, "freeze_at": None}],
    ids=["learned", "distilled", "watched", "plateau"],
)
def test_a_run_after_a_search_for_a_learning_rate_is_that_run_without_the_search(options):
    searched = search(options, pl_callbacks.LearningRateFinder(num_training_steps=15, attr_name="lr"))
    assert searched.lr != 1e-2
    assert_same(state_of(searched), state_of(search(options, lr=searched.lr)))


def test_the_tuner_finds_a_learning_rate():
    task, trainer = TinyTask(), make_trainer(QATCallback("w4", schedule=[8, 4], distillation=True), max_steps=8)
    data = DataLoader(torch.zeros(200, 1), 1)
    Tuner(trainer).lr_find(task, data, attr_name="lr", num_training=15)
    assert task.lr != 1e-2
    trainer.fit(task, data)
    assert trainer.global_step == 8


@pytest.mark.parametrize("comes_first", [True, False])
def test_the_schedule_knows_the_batch_size_that_was_found(comes_first):
    class Sized(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self):
            return DataLoader(torch.zeros(64, 1), self.batch_size)

        def val_dataloader(self):
            return DataLoader(torch.zeros(4, 1), self.batch_size)

    data, qat = Sized(), QATCallback("w2", schedule=[8, 4, 2], distillation=True)
    callbacks = [qat, pl_callbacks.BatchSizeFinder(max_trials=3, steps_per_trial=2)]
    trainer = make_trainer(*(callbacks if comes_first else callbacks[::-1]), max_epochs=3)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer.fit(TinyTask(), data)
    assert data.batch_size == 8
    assert trainer.global_step == 24
    assert qat.timeline.rungs == ((0, 8), (8, 4), (16, 2))
