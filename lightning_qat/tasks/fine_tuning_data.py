"""What the data of the recipes have in common: read once, shuffled by a seed, and recognized by a hash."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


class FineTuningData(pl.LightningDataModule):
    """Training data in an order that depends on the seed alone, and validation data in theirs.

    Training leaves out a last batch that is not full; validation keeps it.

    Args:
        batch_size: Samples per batch.
        num_workers: Processes that load batches.
        seed: Seed of the order of training samples.
    """

    samples = "samples"  # what they are called in messages

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._data: tuple[Dataset[Any], Dataset[Any]] | None = None
        self._hash: str | None = None

    @abstractmethod
    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return training and validation data, from the cache if they are there."""

    @abstractmethod
    def hashed_parts(self) -> Iterable[bytes]:
        """Return what tells these data from others."""

    def collate(self, is_training: bool) -> Callable[[list[Any]], Any] | None:
        """Return what makes a batch of samples; None for what torch does."""
        return None

    def prepare_data(self) -> None:
        """Read and transform the data in one process, so that the others find them in the cache."""
        self.setup("fit")

    def setup(self, stage: str) -> None:
        """Read the data, once."""
        if self._data is None:
            self._data = self.load()

    @property
    def train_data(self) -> Dataset[Any]:
        """The training data."""
        self.setup("fit")
        assert self._data is not None
        return self._data[0]

    @property
    def val_data(self) -> Dataset[Any]:
        """The validation data."""
        self.setup("fit")
        assert self._data is not None
        return self._data[1]

    @property
    def data_hash(self) -> str:
        """Hash of what the data hold, the same on every machine."""
        if self._hash is None:
            digest = hashlib.sha256()
            for part in self.hashed_parts():
                digest.update(part)
            self._hash = digest.hexdigest()[:16]
        return self._hash

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training batches, in the same order for the same seed.

        Raises:
            ValueError: If there is not a single full batch.
        """
        data, generator = self.train_data, torch.Generator().manual_seed(self.seed)
        if not isinstance(data, IterableDataset) and len(data) < self.batch_size:  # type: ignore[arg-type]
            raise ValueError(
                f"There are only {len(data)} training {self.samples}, "  # type: ignore[arg-type]
                f"too few for a batch of {self.batch_size}. Use a smaller batch_size or more data."
            )
        shuffle = None if isinstance(data, IterableDataset) else True
        return self._loader(data, is_training=True, shuffle=shuffle, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches, in order, the last batch maybe shorter than the others."""
        return self._loader(self.val_data, is_training=False)

    def _loader(self, data: Dataset[Any], is_training: bool, **arguments: Any) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.batch_size,
            collate_fn=self.collate(is_training),
            num_workers=self.num_workers,
            **arguments,
        )
