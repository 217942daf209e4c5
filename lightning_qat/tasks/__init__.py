"""LightningModules and LightningDataModules that the recipes use. Add one: a file here and a line in a registry.

Each registry is a config group of the command line; its entries are made from plain values.
"""

from collections.abc import Callable

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_qat.tasks.causal_lm import CausalLMTask
from lightning_qat.tasks.cifar_resnet import CifarResNet
from lightning_qat.tasks.hf_causal_lm import load_causal_lm
from lightning_qat.tasks.image_classification import ImageClassificationTask, load_image_model
from lightning_qat.tasks.images import ImageDataModule
from lightning_qat.tasks.packed_text import PackedTextDataModule
from lightning_qat.tasks.sentence_embedding import SentenceEmbeddingTask
from lightning_qat.tasks.sentence_encoder import load_sentence_encoder
from lightning_qat.tasks.sentence_pairs import SentencePairDataModule
from lightning_qat.tasks.text import TextDataModule
from lightning_qat.tasks.tiny_lm import TinyLM

DATA: dict[str, type[LightningDataModule]] = {
    "text": TextDataModule,
    "packed_text": PackedTextDataModule,
    "images": ImageDataModule,
    "sentence_pairs": SentencePairDataModule,
}

TASKS: dict[str, type[LightningModule]] = {
    "causal_lm": CausalLMTask,
    "image_classification": ImageClassificationTask,
    "sentence_embedding": SentenceEmbeddingTask,
}

MODELS: dict[str, Callable[..., nn.Module]] = {
    "tiny_lm": TinyLM,
    "cifar_resnet": CifarResNet,
    "hf_causal_lm": load_causal_lm,
    "image_model": load_image_model,
    "sentence_encoder": load_sentence_encoder,
}

__all__ = [
    "DATA",
    "MODELS",
    "TASKS",
    "CausalLMTask",
    "CifarResNet",
    "ImageClassificationTask",
    "ImageDataModule",
    "PackedTextDataModule",
    "SentenceEmbeddingTask",
    "SentencePairDataModule",
    "TextDataModule",
    "TinyLM",
    "load_causal_lm",
    "load_image_model",
    "load_sentence_encoder",
]
