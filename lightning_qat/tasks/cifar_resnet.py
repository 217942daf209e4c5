"""The residual network for images of 32 by 32 pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which subsamples and pads channels with zeros: it has no weights."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, (channels - in_channels) // 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``[B, C', H', W']`` of features ``[B, C, H, W]``."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + shortcut)


class CifarResNet(nn.Module):
    """A residual network with shortcuts of option A.

    Args:
        num_blocks: Blocks in each of the three stages: 3 gives ResNet-20.
        num_classes: Number of classes.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2.
    """

    def __init__(self, num_blocks: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, num_blocks)
        self.layer2 = self._stage(16, 32, 2, num_blocks)
        self.layer3 = self._stage(32, 64, 2, num_blocks)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int, num_blocks: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, 3, 32, 32]``."""
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
