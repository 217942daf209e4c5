"""Sentence embeddings whose cosine similarity says how alike two sentences are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.regression import SpearmanCorrCoef

from lightning_qat.tasks.fine_tuning import FineTuningTask


class SentenceEmbeddingTask(FineTuningTask):
    """Train a sentence encoder so that cosine similarities come close to scores.

    A batch is a dictionary of the encoder's inputs, ``[2 B, T]``, in which the rows ``2 i`` and ``2 i + 1`` are a pair,
    and ``score``, float32 ``[2 B]`` in 0 to 1, the same for both rows.

    Logs ``train/loss`` and ``val/loss`` (mean squared error of the similarity), and ``val/spearman``, the rank
    correlation of similarity and score, from -1 to 1.

    Args:
        model: Maps ``input_ids`` and ``attention_mask`` (and what else its tokenizer gives) to embeddings ``[2 B, D]``;
            see :func:`~lightning_qat.tasks.sentence_encoder.load_sentence_encoder`.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr_fraction: Share of ``lr`` at which the cosine ends; 1 for a constant rate.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
        final_lr_fraction: float = 0.0,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_steps, final_lr_fraction)
        self.model = model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps two numbers for each pair
            self.spearman = SpearmanCorrCoef()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:
        """Return embeddings ``[N, D]`` of tokens ``[N, T]``."""
        others.pop("score", None)  # which calibration, that passes what the batch holds, does not know to leave out
        embeddings: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **others)
        return embeddings

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        similarity, score = self._compare(batch)
        loss = F.mse_loss(similarity, score)
        self.log("train/loss", loss, batch_size=len(score))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the pairs of a batch to the correlation."""
        similarity, score = self._compare(batch)
        self.spearman(similarity, score)
        self.log("val/spearman", self.spearman, prog_bar=True, batch_size=len(score))
        self.log("val/loss", F.mse_loss(similarity, score), batch_size=len(score))

    def _compare(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cosine similarities and scores, float32 ``[B]``."""
        embeddings = self(**batch).float()
        return F.cosine_similarity(embeddings[::2], embeddings[1::2]), batch["score"][::2].float()
