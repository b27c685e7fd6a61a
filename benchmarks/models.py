"""Networks for the benchmarks, with trained weights from the data folder where there are any. All take NCHW float32.

The data folder is named by PLANISH_DATA, else it is `../shared/data` beside the repository.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def data_folder() -> Path:
    """Where the data sets and weights are; may not exist."""
    given = os.environ.get("PLANISH_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"


# --- ResNet for CIFAR (He et al. 2015, section 4.2): shortcut without weights


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut that takes every second pixel and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """Stem, three stages of `blocks` blocks at 16, 32 and 64 channels, mean over pixels, linear."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(blocks - 1))
            )

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


def resnet20() -> nn.Module:
    """ResNet-20, trained on CIFAR-10 where the weights are there; input normalized with the ImageNet mean and deviation."""
    torch.manual_seed(0)
    model = CifarResNet(3)
    weights = data_folder() / "resnet_cifar10" / "resnet20.pt"
    if weights.exists():
        state = torch.load(weights, weights_only=True)
        state = state.get("state_dict", state)
        model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return model.eval()


# --- MLPerf Tiny: described by the list of ops in *_graph.json


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TFLite's SAME padding of one dimension: before, after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class TinyGraph(nn.Module):
    """A network of MLPerf Tiny rebuilt from its op list, batch norm folded as in the published file; the softmax on request."""

    def __init__(self, name: str, shape: tuple[int, int, int], softmax: bool = False) -> None:
        super().__init__()
        self.softmax = softmax
        folder = data_folder() / "mlperf_tiny"
        graph = json.loads((folder / f"{name}_graph.json").read_text(encoding="utf-8"))
        weights = np.load(folder / f"{name}_float_weights.npz")
        self.ops: list[dict[str, Any]] = [op for op in graph["ops"] if op["op"] != "SOFTMAX"]
        self.source: int = graph["input"]
        self.layers = nn.ModuleDict()
        self.pads: dict[int, tuple[int, int, int, int]] = {}
        sizes = {self.source: shape}
        for op in self.ops:
            index, (channels, height, width) = op["i"], sizes[op["inputs"][0]]
            out = op["out_shape"]
            if "weight_key" in op:
                weight, bias = (torch.from_numpy(weights[op[k]]) for k in ("weight_key", "bias_key"))
                layer: nn.Module
                if op["op"] == "FULLY_CONNECTED":
                    layer = nn.Linear(weight.shape[1], weight.shape[0])
                else:
                    kernel, stride = tuple(weight.shape[2:]), tuple(op["stride"])
                    rows, columns = (
                        same_padding(n, k, s) if op["padding"] == "SAME" else (0, 0)
                        for n, k, s in zip((height, width), kernel, stride, strict=True)
                    )
                    even = rows[0] == rows[1] and columns[0] == columns[1]
                    self.pads[index] = (0, 0, 0, 0) if even else (*columns, *rows)
                    layer = nn.Conv2d(
                        channels,
                        weight.shape[0],
                        kernel,
                        stride,
                        (rows[0], columns[0]) if even else 0,
                        groups=op.get("groups", 1),
                    )
                layer.load_state_dict({"weight": weight, "bias": bias})
                self.layers[str(index)] = layer
            sizes[op["outputs"][0]] = (out[3], out[1], out[2]) if len(out) == 4 else (out[1], 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) to (n, classes)."""
        values = {self.source: x}
        for op in self.ops:
            index, first = op["i"], values[op["inputs"][0]]
            if op["op"] == "ADD":
                y = first + values[op["inputs"][1]]
            elif op["op"] == "AVERAGE_POOL_2D":
                y = F.avg_pool2d(first, op["kernel"])
            elif op["op"] == "RESHAPE":
                y = first.flatten(1)
            else:
                pads = self.pads.get(index, (0, 0, 0, 0))
                y = self.layers[str(index)](F.pad(first, pads) if any(pads) else first)
            values[op["outputs"][0]] = F.relu(y) if op.get("act") == "relu" else y
        y = values[self.ops[-1]["outputs"][0]]
        return torch.softmax(y, 1) if self.softmax else y


def resnet8(softmax: bool = False) -> nn.Module:
    """MLPerf Tiny image classification: (n, 3, 32, 32) pixels 0 to 255 to (n, 10)."""
    return TinyGraph("ic_resnet8", (3, 32, 32), softmax).eval()


def dscnn(softmax: bool = False) -> nn.Module:
    """MLPerf Tiny keyword spotting: (n, 1, 49, 10) features to (n, 12)."""
    return TinyGraph("kws_dscnn", (1, 49, 10), softmax).eval()


def mobilenet_v1_025(softmax: bool = False) -> nn.Module:
    """MLPerf Tiny visual wake words, MobileNetV1 at width 0.25: (n, 3, 96, 96) values 0 to 1 to (n, 2)."""
    return TinyGraph("vww_mobilenet", (3, 96, 96), softmax).eval()


def autoencoder() -> nn.Module:
    """MLPerf Tiny anomaly detection: (n, 640) log-mel features to (n, 640)."""
    return TinyGraph("ad_autoencoder", (640, 1, 1)).eval()


def images(name: str, count: int, split: str = "test") -> np.ndarray:
    """`count` inputs (n, c, h, w) float32 for the network `name`: real ones, except CIFAR images enlarged for MobileNet and
    random spectra for the autoencoder.

    `split` is 'test' or 'train'; keyword spotting has test samples only.
    """
    if name == "dscnn":
        x = np.load(data_folder() / "kws_mfcc" / "kws_mfcc_dev.npz")["x"]  # (500, 49, 10, 1) int8
        x = (x.astype(np.float32) - 83) * np.float32(0.5847029089927673)
        x = np.resize(x, (count, *x.shape[1:]))  # repeats after 500
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if (
        name == "autoencoder"
    ):  # no licensed recordings here: levels in dB as a log-mel spectrogram has, five frames alike
        generator = np.random.default_rng(0 if split == "test" else 1)
        level = generator.normal(-20, 12, (count, 1, 128)) + generator.normal(0, 4, (count, 5, 128))
        return level.reshape(count, 640).astype(np.float32)
    x = np.load(cifar(split))["x"][:count].transpose(0, 3, 1, 2).astype(np.float32)
    if name == "resnet8":
        return x
    x = x / 255
    if name == "resnet20":
        mean, deviation = (
            np.array(v, np.float32).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        return (x - mean) / deviation
    return F.interpolate(torch.from_numpy(x), size=(96, 96), mode="bilinear").numpy()


def labels(count: int, split: str = "test") -> np.ndarray:
    """Classes (n,) of the CIFAR-10 images."""
    return np.load(cifar(split))["y"][:count].astype(np.int64)


def cifar(split: str) -> Path:
    """The file of CIFAR-10 images: the test half for development (4,937), or 15,000 training images."""
    return data_folder() / "cifar10" / ("cifar10_test_dev.npz" if split == "test" else "cifar10_train_15k.npz")
