"""Image classification, and models for it: the residual network for small images, or any of timm."""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat.tasks.cifar_resnet import CifarResNet
from lightning_qat.tasks.fine_tuning import FineTuningTask
from lightning_qat.tasks.sources import import_optional


class ImageClassificationTask(FineTuningTask):
    """Train a classifier; batches are images float32 ``[B, C, H, W]``, normalised, and labels int64 ``[B]``.

    Logs ``train/loss``, ``val/loss`` (mean cross-entropy in nats) and ``val/accuracy`` (share of images, 0 to 1).

    Args:
        model: Maps images to logits ``[B, num_classes]``; see :func:`load_image_model`.
        num_classes: Number of classes.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr_fraction: Share of ``lr`` at which the cosine ends; 1 for a constant rate.
        optimizer: ``"sgd"`` with Nesterov momentum, or ``"adamw"``.
        momentum: Momentum of SGD.
        label_smoothing: Label smoothing of the training loss.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int = 10,
        lr: float = 0.02,
        weight_decay: float = 1e-4,
        warmup_steps: int = 100,
        final_lr_fraction: float = 0.0,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_steps, final_lr_fraction, optimizer, momentum)
        self.model, self.num_classes, self.label_smoothing = model, num_classes, label_smoothing
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, C, H, W]``."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        images, labels = batch
        loss = F.cross_entropy(self._logits(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the accuracy."""
        images, labels = batch
        logits = self._logits(images).float()
        self.accuracy(logits, labels)
        self.log("val/accuracy", self.accuracy, prog_bar=True)
        self.log("val/loss", F.cross_entropy(logits, labels), batch_size=len(labels))

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self(images)
        if logits.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"The model gives {list(logits.shape[1:])} values per image for num_classes={self.num_classes}. "
                "Give task and model the same num_classes."
            )
        return logits


def load_image_model(
    name: str = "cifar_resnet20", num_classes: int = 10, weights: str | None = None, pretrained: bool = False
) -> nn.Module:
    """Return a model for :class:`ImageClassificationTask`.

    Args:
        name: ``"cifar_resnet20"`` (or any other depth of six times the blocks per stage and two: 32, 44, 56, 110), or
            a model of timm.
        num_classes: Number of classes.
        weights: ``.safetensors`` file with its state dict.
        pretrained: Download the weights that timm has for the model.

    Raises:
        FileNotFoundError: If there is no file ``weights``.
        ImportError: If the model is of timm, which is not installed.
        ValueError: If there is no such model, or the weights are not of it.
    """
    model = _build(name, num_classes, pretrained)
    if weights is None:
        return model
    safetensors = import_optional("safetensors.torch", "safetensors", "weights=")
    try:
        model.load_state_dict(safetensors.load_file(weights))
    except RuntimeError as error:  # the names or shapes that do not fit are in the message
        raise ValueError(f"{weights!r} does not fit {name!r} with {num_classes} classes: {error}") from error
    return model


def _build(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    if match := re.fullmatch(r"cifar_resnet(\d+)", name):
        depth = int(match.group(1))
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"There is no {name!r}: the depth must be 6 n + 2, as in cifar_resnet20.")
        if pretrained:
            raise ValueError(f"Nothing is downloaded for {name!r}. Give weights=, a .safetensors file.")
        return CifarResNet((depth - 2) // 6, num_classes)
    timm = import_optional("timm", "timm", f"The model {name!r}, which is not a cifar_resnet,")
    if not timm.is_model(name):
        close: Any = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name!r}. Names that are close: {close}.")
    model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    return model
