"""Batches of images: stacked, normalised, and in training flipped and shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """Makes a batch of uint8 images and labels.

    Args:
        mean: Mean of each channel, in 0 to 1.
        std: Standard deviation of each channel.
        flip: Whether each image is mirrored with probability one half.
        shift: Pixels by which each image is shifted at most, in both directions.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    shift: int

    def __call__(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return images float32 ``[B, C, H, W]`` and labels int64 ``[B]``."""
        images = torch.stack([image for image, _ in samples]).float() / 255
        images = (images - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        if self.flip:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
        return shift_images(images, self.shift), torch.stack([label for _, label in samples])


def shift_images(images: Tensor, shift: int) -> Tensor:
    """Return every image shifted by random numbers of pixels from ``-shift`` to ``shift``; zeros come in.

    Args:
        images: ``[B, C, H, W]``.
        shift: Pixels.
    """
    if not shift:
        return images
    number, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4)
    rows = torch.randint(2 * shift + 1, (number, 1)) + torch.arange(height)
    columns = torch.randint(2 * shift + 1, (number, 1)) + torch.arange(width)
    index = torch.arange(number)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
