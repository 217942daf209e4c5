"""Images with labels, decoded once."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_qat.tasks.augmentation import ImageBatch
from lightning_qat.tasks.fine_tuning_data import FineTuningData
from lightning_qat.tasks.flat_rows import FlatRows, map_once, open_column
from lightning_qat.tasks.labels import find_label_column, read_labels
from lightning_qat.tasks.sources import check_column, find_validation, held_out, import_optional, load_source, to_plain


class LabeledImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of an image, uint8 ``[C, H, W]``, and its label, int64 ``[]``.

    Args:
        pixels: The images, flattened.
        labels: Labels, int64 ``[N]``.
        shape: ``(C, H, W)``.
    """

    def __init__(self, pixels: FlatRows, labels: Tensor, shape: tuple[int, int, int]) -> None:
        self.pixels, self.labels, self.shape = pixels, labels, shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image and its label."""
        return self.pixels[index].view(self.shape), self.labels[index]

    def hashed_parts(self) -> Iterable[bytes]:
        """Yield what the images and labels are."""
        yield from self.pixels.hashed_parts()
        yield self.labels.numpy().tobytes()


class ImageDataModule(FineTuningData):
    """Batches of images float32 ``[B, C, H, W]``, normalised, and labels int64 ``[B]``.

    Images are decoded once, into the memory-mapped cache of ``datasets``. In training they are flipped and shifted, by
    torch's random numbers (those of the process, or of the worker that loads the batch).

    Args:
        train: Files (``.parquet`` and others), a folder of images by class, or the name of a data set on the Hub.
        validation: Validation data, in the same ways. Default: those in ``val_split``, or ``val_fraction``.
        config_name: Configuration of a data set on the Hub.
        train_split: Split of ``train`` to train on.
        val_split: Split to validate on.
        val_fraction: Share of the images that is held out where there are no validation data, the same for all seeds.
        image_column: Column of the images. Default: the only one that holds images.
        label_column: Column of the labels. Default: the only one of classes, or ``label`` or ``labels``.
        image_size: Side of a square that images are scaled to cover, of which the middle is taken. Default: images as
            they are, all of one size.
        mean: Mean of each channel, in 0 to 1, that is subtracted; one number for gray images, three for color.
        std: Standard deviation of each channel, by which is divided.
        flip: Whether half of the training images are mirrored.
        shift: Pixels by which training images are shifted at most; what comes in is the mean color.
        batch_size: Images per batch.
        num_workers: Processes that load batches.
        num_proc: Processes that decode.
        seed: Seed of the order of training images.
        cache_dir: Folder of the cache. Default: that of ``datasets``.

    Raises:
        ValueError: If ``mean`` and ``std`` are not of one or three channels.
    """

    samples = "images"

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        config_name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int | None = None,
        mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406),
        std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225),
        flip: bool = True,
        shift: int = 4,
        batch_size: int = 128,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if len(mean) != len(std) or len(mean) not in (1, 3):
            raise ValueError(f"mean={list(mean)} and std={list(std)} must both have one number, or three for color.")
        self.train, self.validation = to_plain(train), to_plain(validation)
        self.config_name, self.train_split, self.val_split = config_name, train_split, val_split
        self.val_fraction, self.image_column, self.label_column = val_fraction, image_column, label_column
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.flip, self.shift, self.num_proc, self.cache_dir = flip, shift, num_proc, cache_dir

    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return training and validation images, not yet normalised.

        Raises:
            FileNotFoundError: If a source is not there.
            ValueError: If columns are not found, images differ in size, or labels are missing.
        """
        import_optional("PIL.Image", "pillow", "Decoding images")
        validation, val_split = find_validation(self.train, self.validation, self.val_split)
        train, classes = self._read(self.train, self.train_split, None)
        if validation is None:
            kept, held = held_out(len(train), self.val_fraction, "images")
            return Subset(train, kept), Subset(train, held)
        val, _ = self._read(validation, val_split, classes)
        if val.shape != train.shape:
            raise ValueError(f"Training images are {train.shape}, validation images {val.shape}: give image_size=.")
        return train, val

    def hashed_parts(self) -> Iterable[bytes]:
        """Return images and labels, and which of them are for training."""
        for data in (self.train_data, self.val_data):
            if isinstance(data, Subset):
                yield np.array(data.indices).tobytes()
                data = data.dataset
            assert isinstance(data, LabeledImages)
            yield from data.hashed_parts()

    def collate(self, is_training: bool) -> Callable[[list[Any]], Any]:
        """Return what stacks and normalises images, and in training flips and shifts them."""
        flip, shift = (self.flip, self.shift) if is_training else (False, 0)
        return ImageBatch(self.mean, self.std, flip, shift)

    def _read(
        self, source: str | list[str], split: str, classes: list[str] | None
    ) -> tuple[LabeledImages, list[str] | None]:
        """Return images and labels, and the names of the classes if labels are names."""
        from datasets import Image, Sequence, Value

        dataset = load_source(source, split, self.config_name, cache_dir=self.cache_dir)
        column = self._find_image_column(dataset)
        labels, classes = read_labels(dataset, find_label_column(dataset, self.label_column), classes)
        undecoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
        mode = "RGB" if len(self.mean) == 3 else "L"
        size = self._find_size(undecoded[0][column], mode)
        decoded = map_once(
            undecoded,
            decode,
            {"column": column, "mode": mode, "size": size, "is_scaled": self.image_size is not None},
            [column, mode, size, self.image_size is not None],
            {"pixels": Sequence(Value("uint8"))},
            "Decoding",
            self.num_proc,
        )
        shape = (len(self.mean), *size)
        rows = FlatRows(functools.partial(open_column, decoded, "pixels"), int(np.prod(shape)), torch.uint8)
        return LabeledImages(rows, labels, shape), classes

    def _find_image_column(self, dataset: Any) -> str:
        if self.image_column is not None:
            check_column(dataset, self.image_column, "image_column")
            return self.image_column
        # Parquet that was not written by datasets has what an image is made of, but does not call it one.
        found = [
            name
            for name, kind in dataset.features.items()
            if type(kind).__name__ == "Image" or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})
        ]
        if len(found) != 1:
            raise ValueError(f"{found or 'None'} of {dataset.column_names} hold images. Name one: image_column=.")
        return str(found[0])

    def _find_size(self, first: Mapping[str, Any], mode: str) -> tuple[int, int]:
        """Return height and width of the images, those of the first one if all are taken as they are."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        width, height = open_image(first, mode).size
        return height, width


def open_image(image: Mapping[str, Any], mode: str) -> Any:
    """Return a PIL image, the right way up, of what ``datasets`` has if it does not decode (bytes, or a path)."""
    from PIL import Image, ImageOps

    file = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    with Image.open(file) as opened:
        return ImageOps.exif_transpose(opened).convert(mode)


def decode(
    batch: Mapping[str, list[Any]], column: str, mode: str, size: tuple[int, int], is_scaled: bool
) -> dict[str, list[np.ndarray]]:
    """Return images as flat arrays of uint8, ``[C * H * W]``.

    Args:
        batch: Images in ``column``.
        column: Name of the column.
        mode: ``"RGB"`` or ``"L"``.
        size: Height and width.
        is_scaled: Whether images are scaled and cropped to that size, or must have it.

    Raises:
        ValueError: If they do not have it.
    """
    from PIL import Image, ImageOps

    pixels = []
    for each in batch[column]:
        image = open_image(each, mode)
        if is_scaled:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        if image.size != size[::-1]:
            raise ValueError(f"Images have the sizes {size[::-1]} and {image.size} (width, height): give image_size=.")
        pixels.append(np.asarray(image).reshape(*size, -1).transpose(2, 0, 1).reshape(-1))
    return {"pixels": pixels}
