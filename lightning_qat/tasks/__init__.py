"""LightningModules and LightningDataModules that the recipes use."""

from lightning_qat.tasks.causal_lm import CausalLMTask
from lightning_qat.tasks.text import TextDataModule
from lightning_qat.tasks.tiny_lm import TinyLM

__all__ = ["CausalLMTask", "TextDataModule", "TinyLM"]
