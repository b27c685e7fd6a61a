"""Small real networks and data that the tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.targets import target
from torch import nn

torch.set_num_threads(int(os.environ.get("PLANISH_TEST_THREADS", "1")))


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:.*LeafSpec.*:FutureWarning"
    )  # torch 2.13's own pickling of tree specs


class Residual(nn.Module):
    """Every shape of graph that quantization must place pairs in: residual add, concat, depthwise, pools, padded shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.branch = nn.Conv2d(32, 8, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, image):
        """(n, 3, 16, 16) -> (n, 10)."""
        x = torch.relu(self.bn(self.stem(image)))
        x = torch.relu(x + self.point(nn.functional.relu6(self.depthwise(x))))
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        x = torch.relu(self.down(x) + short)
        x = torch.cat([x, self.branch(x)], 1)
        x = nn.functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def trained(module, shape, seed=0):
    """Weights and batch-norm statistics as a trained network has them: not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        elif value.is_floating_point() and value.ndim == 1 and "bn" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            spread = 1 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            value.copy_(torch.randn(value.shape, generator=generator) * spread)
    return module.eval()


@pytest.fixture(scope="session")
def residual():
    """The traced network above."""
    return trace(trained(Residual(), (3, 16, 16)), {"image": torch.zeros(1, 3, 16, 16)}, "residual")


@pytest.fixture(scope="session")
def images():
    """Smooth random images for it, so that activations are as correlated as real ones."""
    generator = np.random.default_rng(0)
    coarse = generator.standard_normal((96, 3, 4, 4)).astype(np.float32)
    smooth = coarse.repeat(4, 2).repeat(4, 3) + 0.2 * generator.standard_normal((96, 3, 16, 16)).astype(np.float32)
    return Data({"image": smooth}, None, "images")


@pytest.fixture
def context(residual, images):
    """What a pass is given, for `host`."""
    return Context(residual, images, target.load("host"), torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def quantized(residual, images):
    """The network above after static quantization with the default settings."""
    from planish.compress.quantize.static import Static

    return Static().apply(residual, Context(residual, images, target.load("host"), torch.Generator().manual_seed(0)))


@pytest.fixture(scope="session")
def data_folder():
    """The folder of real models and data sets; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("PLANISH_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no data folder (set PLANISH_DATA)")
    return folder
