"""LightningModules and LightningDataModules that the recipes use. Add one: a file here and a line in a registry.

Each registry is a config group of the command line; its entries are made from plain values.
"""

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_qat.tasks.causal_lm import CausalLMTask
from lightning_qat.tasks.cifar_resnet import CifarResNet
from lightning_qat.tasks.text import TextDataModule
from lightning_qat.tasks.tiny_lm import TinyLM

DATA: dict[str, type[LightningDataModule]] = {"text": TextDataModule}

TASKS: dict[str, type[LightningModule]] = {"causal_lm": CausalLMTask}

MODELS: dict[str, type[nn.Module]] = {"tiny_lm": TinyLM, "cifar_resnet": CifarResNet}

__all__ = ["DATA", "MODELS", "TASKS", "CausalLMTask", "CifarResNet", "TextDataModule", "TinyLM"]
