"""MACs and parameters equal the formulas of the layers, before and after the graph is changed."""

from __future__ import annotations

import numpy as np
import torch
from planish.compress import cost
from planish.compress.data import Data
from planish.compress.model import Model, trace
from planish.compress.passes import Context
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.llm_int8 import LlmInt8
from planish.targets import target
from torch import nn


def _trace(module: nn.Module, *shape: int) -> Model:
    return trace(module, {"x": torch.zeros(2, *shape)}, "test")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.up = nn.ConvTranspose2d(12, 4, 2, stride=2)
        self.head = nn.Linear(4 * 16 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.grouped(self.depthwise(self.stem(x))))
        return self.head(x.flatten(1))


def test_macs_of_every_convolution_kind() -> None:
    found = cost.macs(_trace(Net(), 3, 16, 16))
    assert found == {
        "stem": 8 * 8 * 8 * 3 * 9,
        "depthwise": 8 * 8 * 8 * 9,
        "grouped": 12 * 8 * 8 * 2,
        "up": 12 * 8 * 8 * 4 * 4,
        "head": 5 * 4 * 16 * 16,
    }


def test_parameters_by_layer_add_up() -> None:
    model = _trace(Net(), 3, 16, 16)
    found = cost.parameters(model)
    assert found["stem"] == 8 * 3 * 9
    assert found["grouped"] == 12 * 2 + 12
    assert sum(found.values()) == model.parameters()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.shared(x)) @ x.transpose(1, 2)


def test_a_layer_called_twice_and_a_product_of_activations() -> None:
    found = cost.macs(_trace(Twice(), 4, 6))
    assert found["shared"] == 2 * 4 * 6 * 6
    assert sum(found.values()) == 2 * 4 * 6 * 6 + 4 * 4 * 6


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_counts_both_products() -> None:
    assert cost.total_macs(_trace(Attention(), 2, 5, 8)) == 2 * (2 * 5 * 5 * 8)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.ParameterList([torch.zeros(21, 6), torch.zeros(21, 7), torch.zeros(21), torch.zeros(21)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x.new_zeros(1, x.shape[0], 7)
        return torch._VF.gru(x, start, list(self.cell), True, 1, 0.0, False, False, True)[0]


def test_recurrent_cells_count_every_step() -> None:
    assert cost.macs(_trace(Recurrent(), 9, 6)) == {"cell": 9 * 3 * 7 * (6 + 7)}


def test_a_low_bit_layer_counts_as_in_float() -> None:
    """One with a second result too (LLM.int8 counts values beyond its threshold)."""
    model = _trace(nn.Sequential(nn.Linear(32, 24)), 4, 32)
    data = Data({"x": np.random.default_rng(0).standard_normal((8, 4, 32)).astype(np.float32)}, None, "test")
    for method in (LlmInt8(), Dynamic()):
        context = Context(model, data, target.load("host"), torch.Generator().manual_seed(0))
        assert cost.macs(method.apply(model, context)) == cost.macs(model)
