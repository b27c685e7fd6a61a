"""A small residual network for Fashion-MNIST (28x28 grey images, 10 classes) and its data.

`planish compress demo/fashion_resnet.py:network --weights demo/fashion_resnet.safetensors --data demo/fashion_resnet.py:train`
reads both functions; nothing else of planish is used here. Trained by examples/train_fashion_resnet.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MEAN, STD = 0.286, 0.353  # of the training images, scaled to [0, 1]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class FashionResNet(nn.Module):
    """Stem, three residual blocks of 16, 32 and 64 channels, global average, linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = Block(16, 16, 1)
        self.block2 = Block(16, 32, 2)
        self.block3 = Block(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(n, 1, 28, 28) normalised grey values -> (n, 10) class scores."""
        x = torch.relu(self.bn(self.conv(image)))
        x = self.block3(self.block2(self.block1(x)))
        return self.linear(x.mean((2, 3)))


def network() -> nn.Module:
    """The network, untrained; planish loads the weights into it."""
    return FashionResNet()


def prepare(images: np.ndarray) -> np.ndarray:
    """(n, 28, 28) uint8 -> (n, 1, 28, 28) float32 as the network takes it."""
    return ((images.astype(np.float32) / 255 - MEAN) / STD)[:, None]


def _split(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("fashion_mnist.npz")) as file:
        return {"image": prepare(file[f"{name}_x"]), "labels": file[f"{name}_y"].astype(np.int64)}


def train() -> dict[str, np.ndarray]:
    """The slice of training images, for calibration and recovery training."""
    return _split("train")


def test() -> dict[str, np.ndarray]:
    """The slice of test images, for accuracy."""
    return _split("test")
