"""LightningModules and LightningDataModules that the recipes use."""

from lightning_qat.tasks.causal_lm import CausalLMTask
from lightning_qat.tasks.hf_causal_lm import load_causal_lm
from lightning_qat.tasks.packed_text import PackedTextDataModule
from lightning_qat.tasks.text import TextDataModule
from lightning_qat.tasks.tiny_lm import TinyLM

__all__ = ["CausalLMTask", "PackedTextDataModule", "TextDataModule", "TinyLM", "load_causal_lm"]
