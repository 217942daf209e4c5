"""LightningModules and LightningDataModules that the recipes use."""

from lightning_qat.tasks.causal_lm import CausalLMTask
from lightning_qat.tasks.hf_causal_lm import load_causal_lm
from lightning_qat.tasks.image_classification import ImageClassificationTask, load_image_model
from lightning_qat.tasks.images import ImageDataModule
from lightning_qat.tasks.packed_text import PackedTextDataModule
from lightning_qat.tasks.sentence_embedding import SentenceEmbeddingTask
from lightning_qat.tasks.sentence_encoder import load_sentence_encoder
from lightning_qat.tasks.sentence_pairs import SentencePairDataModule
from lightning_qat.tasks.text import TextDataModule
from lightning_qat.tasks.tiny_lm import TinyLM

__all__ = [
    "CausalLMTask",
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
