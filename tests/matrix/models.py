"""Modules of every shape that Lightning users have, on data small enough for a matrix."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

WIDTH, NUM_CLASSES, BATCH = 16, 4, 8


def loaders(num_batches: int = 8) -> tuple[DataLoader, DataLoader]:
    """Return loaders for training and validation; the last batch is uneven."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_batches * BATCH - 3, WIDTH, generator=generator)
    y = (x[:, :NUM_CLASSES] + 0.5 * x[:, -NUM_CLASSES:]).argmax(1)
    data = TensorDataset(x, y)
    return DataLoader(data, BATCH), DataLoader(data, 2 * BATCH)


class Shared(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(torch.relu(self.inner(x)))))


class Tied(nn.Module):
    """An embedding whose table is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(NUM_CLASSES * 3, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, NUM_CLASSES * 3, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.float().abs() * 5).long() % (NUM_CLASSES * 3)
        return self.lm_head(torch.relu(self.inner(self.embed(tokens).mean(1))))[:, :NUM_CLASSES]


class MyLinear(nn.Linear):
    """A linear layer of the user's own class."""


class Checkpointed(nn.Module):
    """A model that computes its activations again for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU()), nn.Linear(32, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class KeywordsOnly(nn.Module):
    """A model that takes no positional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, inputs: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(inputs * scale)


class ConvNet(nn.Module):
    """Convolution and batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x.view(-1, 1, 4, 4)))).mean((2, 3)))


def mlp(linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    return nn.Sequential(linear(WIDTH, 32), nn.ReLU(), linear(32, NUM_CLASSES))


def with_frozen_part() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), nn.Linear(WIDTH, NUM_CLASSES))
    model[0].requires_grad_(False)
    return model


def partly_compiled() -> nn.Module:
    model = mlp()
    model[0].compile(backend="aot_eager")
    return model


def hugging_face() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=12,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=WIDTH,
        num_labels=NUM_CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(mlp(), LoraConfig(target_modules=["0"], r=2, lora_dropout=0.1, modules_to_save=["2"]))


BUILDERS = {
    "mlp": mlp,
    "shared module": Shared,
    "tied weights": Tied,
    "frozen part": with_frozen_part,
    "built late": mlp,
    "subclassed": lambda: mlp(MyLinear),
    "keywords only": KeywordsOnly,
    "convolutions": ConvNet,
    "gradient checkpointing": Checkpointed,
    "compiled submodule": partly_compiled,
    "hugging face": hugging_face,
    "lora": adapted,
}


class Task(pl.LightningModule):
    """A classifier.

    Args:
        model: Which of ``BUILDERS``.
        optimization: ``automatic``, ``manual``, or ``two optimizers`` (manual).
        optimizer: ``adamw`` or ``sgd``.
        scheduler: Name of a scheduler, or None.
    """

    def __init__(
        self, model: str = "mlp", optimization: str = "automatic", optimizer: str = "adamw", scheduler: str = "none"
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kind, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.automatic_optimization = optimization == "automatic"
        self.num_optimizers = 2 if optimization == "two optimizers" else 1
        self.model: nn.Module | None = None if model == "built late" else self._build()
        self.losses: list[float] = []
        self.learning_rate = 1e-2

    def _build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BUILDERS[self.kind]()

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._build()

    def forward(self, x: Tensor) -> Tensor:
        assert self.model is not None
        if self.kind == "keywords only":
            return self.model(inputs=x)
        if self.kind == "hugging face":
            return self.model(input_ids=(x.float().abs() * 5).long() % 12).logits
        return self.model(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        if not self.automatic_optimization:
            self._step_by_hand(loss)
        return loss

    def _step_by_hand(self, loss: Tensor) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        has_two = self.num_optimizers == 2 and len(parameters) > 1
        parts = [parameters[::2], parameters[1::2]] if has_two else [parameters]
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        optimizers = [kinds[self.optimizer](part, self.learning_rate) for part in parts]
        if self.scheduler == "none":
            return optimizers
        return optimizers, [make_scheduler(self.scheduler, optimizer) for optimizer in optimizers]


def make_scheduler(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what Lightning takes for a scheduler."""
    schedulers = torch.optim.lr_scheduler
    if name == "ReduceLROnPlateau":
        return {"scheduler": schedulers.ReduceLROnPlateau(optimizer, patience=0), "monitor": "val/loss"}
    peaks = [group["lr"] for group in optimizer.param_groups]
    made = {
        "LambdaLR": lambda: schedulers.LambdaLR(optimizer, lambda step: 0.95**step),
        "SequentialLR": lambda: schedulers.SequentialLR(
            optimizer,
            [schedulers.LinearLR(optimizer, 0.1, 1.0, 2), schedulers.CosineAnnealingLR(optimizer, 10)],
            milestones=[2],
        ),
        "OneCycleLR": lambda: schedulers.OneCycleLR(optimizer, peaks, total_steps=64),
        "CosineAnnealingLR": lambda: schedulers.CosineAnnealingLR(optimizer, 16),
    }[name]()
    return {"scheduler": made, "interval": "step"}
