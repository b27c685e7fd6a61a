"""`Moments`: what calibration keeps of one activation tensor's channels. The one collector that every outlier method shares.

All values are seen as rows of the last dimension: x (rows, channels).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..common.errors import PlanishError
from ..kernels.packing import CHUNK

SAMPLE = 2048
"""rows kept for searches over the output error"""


@dataclass
class Moments:
    """Statistics of x (rows, channels), summed over calibration batches."""

    channels: int
    products: bool = False
    """whether `second` is summed, which costs channels^2 numbers"""
    keep: int = SAMPLE
    """rows in `kept`; 0 for a method that looks at none"""
    rows: int = 0
    low: torch.Tensor = field(init=False)
    """(channels,) least value"""
    high: torch.Tensor = field(init=False)
    """(channels,) largest value"""
    first: torch.Tensor = field(init=False)
    """(channels,) float64, sum of x"""
    second: torch.Tensor | None = field(init=False, default=None)
    """(channels, channels) float32, sum of x^T x; None unless `products`"""
    square: torch.Tensor = field(init=False)
    """(channels,) float64, sum of x^2"""
    magnitude: torch.Tensor = field(init=False)
    """(channels,) float64, sum of |x|"""
    fourth: float = field(init=False, default=0.0)
    """sum of x^4 over all elements"""
    kept: torch.Tensor = field(init=False)
    """(at most keep, channels) rows spread evenly over what was seen"""

    def __post_init__(self) -> None:
        self.low = torch.full((self.channels,), float("inf"))
        self.high = torch.full((self.channels,), float("-inf"))
        self.first = torch.zeros(self.channels, dtype=torch.float64)
        self.square = torch.zeros(self.channels, dtype=torch.float64)
        self.magnitude = torch.zeros(self.channels, dtype=torch.float64)
        self.kept = torch.empty(0, self.channels)
        self._stride = 1
        self._next = 0
        if self.products:
            self.second = torch.zeros(self.channels, self.channels)

    def add(self, value: torch.Tensor, name: str = "") -> None:
        """Take in one batch (..., channels). Raises PlanishError when it holds NaN or Inf; `name` is the layer for the message."""
        x = value.detach().reshape(-1, self.channels).float()  # (rows, channels)
        for part in x.split(max(1, CHUNK // self.channels)):
            self._sum(part)
        if not (torch.isfinite(self.low) & torch.isfinite(self.high)).all():
            raise PlanishError(f"calibration: layer '{name}' reads NaN or Inf values for finite inputs")
        if self.second is not None:
            self.second.addmm_(x.T, x)
        self._keep(x)
        self.rows += len(x)

    def _sum(self, x: torch.Tensor) -> None:
        """Ranges and sums of a few rows."""
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))
        wide = x.double()
        self.first += wide.sum(0)
        self.magnitude += wide.abs().sum(0)
        square = wide.square_()
        self.square += square.sum(0)
        self.fourth += float(square.square_().sum())

    def _keep(self, x: torch.Tensor) -> None:
        """Every `stride`-th row; when `keep` is full, every second kept row goes and the stride doubles."""
        chosen = x[self._next - self.rows :: self._stride] if self._next < self.rows + len(x) else x[:0]
        self._next += len(chosen) * self._stride
        if not self.keep:
            return
        self.kept = torch.cat([self.kept, chosen])
        while len(self.kept) > self.keep:
            self.kept = self.kept[::2].clone()
            self._stride *= 2
            self._next = -(-(self.rows + len(x)) // self._stride) * self._stride

    @property
    def peak(self) -> torch.Tensor:
        """(channels,) largest magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean(self) -> torch.Tensor:
        """(channels,)"""
        return (self.first / max(1, self.rows)).float()

    @property
    def mean_square(self) -> torch.Tensor:
        """(channels,) E[x^2]."""
        return (self.square / max(1, self.rows)).float()

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """(channels,) E[|x|]."""
        return (self.magnitude / max(1, self.rows)).float()

    @property
    def kurtosis(self) -> float:
        """E[x^4] / E[x^2]^2 over all elements: 3 for a normal distribution, large with outliers."""
        count = max(1, self.rows * self.channels)
        square = float(self.square.sum()) / count
        return self.fourth / count / square**2 if square > 0 else 0.0

    def outliers(self, threshold: float) -> torch.Tensor:
        """Indices of the channels in which some |x| >= threshold (Dettmers et al. 2022, section 3.2)."""
        return (self.peak >= threshold).nonzero().flatten()

    def hessian(self) -> torch.Tensor:
        """(channels, channels) float64, mean of 2 x^T x (Frantar et al. 2022, section 3). Needs `products`."""
        assert self.second is not None
        return self.second.double() * (2 / max(1, self.rows))
