"""Next-token training and perplexity for any model that maps token ids to logits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from lightning_qat.tasks.fine_tuning import FineTuningTask


class CausalLMTask(FineTuningTask):
    """Train a causal language model; batches are token ids int64 ``[B, T + 1]``.

    Logs ``train/loss`` (nats per token) and ``val/perplexity``.

    Args:
        model: Maps token ids ``[B, T]`` to logits ``[B, T, V]``, or to an output that has them as ``logits``, as
            the models of Hugging Face and PEFT do; see :func:`~lightning_qat.tasks.hf_causal_lm.load_causal_lm`.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr_fraction: Share of ``lr`` at which the cosine ends; 1 for a constant rate.
    """

    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
        final_lr_fraction: float = 0.1,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_steps, final_lr_fraction)
        self.model = model
        self.perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[B, T, V]`` for ``tokens`` ``[B, T]``."""
        output: Any = self.model(tokens)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy in nats per token."""
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/loss", loss)
        return loss

    def calibration_step(self, batch: Tensor) -> None:
        """Run the model on what it sees in training: the batch without its last token."""
        self(batch[:, :-1])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch to the perplexity."""
        self.perplexity(self(batch[:, :-1]).float(), batch[:, 1:])
        self.log("val/perplexity", self.perplexity, prog_bar=True)
