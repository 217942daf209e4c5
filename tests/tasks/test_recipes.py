"""Recipes name classes and arguments that there are, and train with their callbacks on small data."""

import inspect
import json
import sys
import textwrap

import hydra
import lightning.pytorch as pl
import pytest
from hydra import initialize_config_module
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lightning_qat.callbacks.control import current_bits
from tests.tasks.test_images import make_images, write_parquet
from tests.tasks.test_sentences import make_pairs, write_csv
from tests.tasks.tiny_models import WORDS, save_bert, save_llama, save_tokenizer

NEW = ("causal_lm", "image_classification", "sentence_embedding", "bring_your_own")
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


def compose(name, *overrides):
    with initialize_config_module(version_base="1.3", config_module="lightning_qat.conf"):
        return hydra.compose("train", [f"recipe={name}", "logger=none", *(f"++{each}" for each in overrides)])


def run(cfg):
    """Fine-tune as the command line does, for a few steps, and return the metric and the width in the end."""
    pl.seed_everything(0, verbose=False)
    data = instantiate(cfg.data, seed=0)
    task = instantiate(cfg.task, **cfg.finetune.task)
    callbacks = [instantiate(node) for node in cfg.callbacks.values()]
    steps = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = instantiate(cfg.trainer, **{**QUIET, **steps}, callbacks=callbacks)
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 6
    assert cfg.metric.key in trainer.callback_metrics
    return float(trainer.callback_metrics[cfg.metric.key]), current_bits(task)


def nodes_of(node):
    if isinstance(node, DictConfig):
        if not OmegaConf.is_missing(node, "_target_") and "_target_" in node:
            yield node
        for key in node:
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from nodes_of(node[key])


@pytest.mark.parametrize("name", NEW)
def test_recipes_name_arguments_that_there_are(name):
    cfg = compose(name)
    assert cfg.name == name
    assert set(cfg.metric) == {"key", "name", "higher_is_better"}
    for node in nodes_of(cfg):
        arguments = set(node) - {"_target_", "_convert_"}
        assert arguments <= set(inspect.signature(get_method(node._target_)).parameters)
    if not OmegaConf.is_missing(cfg.task, "_target_"):
        known = set(inspect.signature(get_method(cfg.task._target_)).parameters)
        assert set(cfg.base.task) | set(cfg.finetune.task) <= known


@pytest.mark.parametrize("name", NEW)
def test_what_the_user_must_give_is_asked_for(name):
    cfg = compose(name)
    with pytest.raises(MissingMandatoryValue):
        OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("lora", ["null", "{r: 2, target_modules: [q_proj, v_proj]}"])
def test_causal_lm(lora, tmp_path):
    pytest.importorskip("transformers")
    if lora != "null":
        pytest.importorskip("peft")
    save_tokenizer(tmp_path / "model")
    save_llama(tmp_path / "model")
    text = tmp_path / "a.jsonl"
    text.write_text((json.dumps({"text": " ".join(WORDS)}) + "\n") * 300)
    cfg = compose(
        "causal_lm", f"task.model.name={tmp_path / 'model'}", f"data.train={text}", "data.sequence_length=16",
        f"task.model.lora={lora}", f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert run(cfg)[1] == 3


def test_image_classification(tmp_path):
    pytest.importorskip("PIL")
    train = write_parquet(tmp_path / "a.parquet", *make_images(60))
    cfg = compose(
        "image_classification", f"data.train=[{train}]", "task.num_classes=3", "data.batch_size=8",
        "task.model.name=cifar_resnet8", f"data.cache_dir={tmp_path / 'cache'}", "data.mean=[0.5,0.5,0.5]",
    )  # fmt: skip
    value, num_bits = run(cfg)
    assert 0 <= value <= 1
    assert num_bits == 3


def test_sentence_embedding(tmp_path):
    pytest.importorskip("transformers")
    save_tokenizer(tmp_path / "model")
    save_bert(tmp_path / "model")
    train = write_csv(tmp_path / "a.csv", make_pairs(80), header=None)
    cfg = compose(
        "sentence_embedding", f"task.model.name={tmp_path / 'model'}", f"data.train={train}", "data.batch_size=8",
        "data.csv_columns=[sentence1,sentence2,score]", f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    value, num_bits = run(cfg)
    assert -1 <= value <= 1
    assert num_bits == 3


USER_CODE = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

class MyData(pl.LightningDataModule):
    def __init__(self, rows=64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 8, generator=generator)
        self.data = TensorDataset(x, x.flip(1))

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)

    val_dataloader = train_dataloader

class MyModule(pl.LightningModule):
    def __init__(self, width=16, lr=0.1):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 8))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/mse", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)
"""


def test_bring_your_own(tmp_path, monkeypatch):
    (tmp_path / "my_project.py").write_text(textwrap.dedent(USER_CODE))
    monkeypatch.syspath_prepend(tmp_path)
    cfg = compose(
        "bring_your_own", "data._target_=my_project.MyData", "task._target_=my_project.MyModule", "task.width=32",
        "metric.key=val/mse", "metric.name=MSE", "metric.higher_is_better=false", "finetune.task.lr=0.2",
    )  # fmt: skip
    try:
        value, num_bits = run(cfg)
    finally:
        sys.modules.pop("my_project", None)
    assert value > 0
    assert num_bits == 4
