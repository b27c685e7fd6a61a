"""`Data`: calibration, training or test samples by input name, checked before anything uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..common.errors import PlanishError, listed
from .model import Input, Model


@dataclass(frozen=True)
class Data:
    """Samples of a model's inputs, all with the same number of samples along the first dimension."""

    inputs: Mapping[str, np.ndarray]
    """(n, ...) by input name"""
    labels: np.ndarray | None
    """(n,) integer classes, None when unknown"""
    source: str

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))

    def take(self, indices: slice | np.ndarray) -> Data:
        """The chosen samples."""
        labels = None if self.labels is None else self.labels[indices]
        return Data({k: v[indices] for k, v in self.inputs.items()}, labels, self.source)

    def sample(self, count: int, generator: torch.Generator) -> Data:
        """`count` samples without repetition, drawn by `generator`; all of them when there are fewer."""
        if count >= self.n:
            return self
        order = torch.randperm(self.n, generator=generator)[:count].sort().values.numpy()
        return self.take(order)

    def batches(self, model: Model, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Input tensors in the model's order, `size` samples at a time (the model's own batch when that is fixed)."""
        size = size if model.batched else model.inputs[0].shape[0]
        if not model.batched and self.n < size:
            raise PlanishError(f"data '{self.source}' has {self.n} samples; '{model.source}' takes {size} at a time")
        for start in range(0, self.n - (0 if model.batched else self.n % size), size):
            yield model.feeds({k: v[start : start + size] for k, v in self.inputs.items()})


def check(data: Data, inputs: Sequence[Input]) -> Data:
    """The data in the inputs' order and dtypes. Raises PlanishError for what does not fit them or is not finite.

    A state input may be absent: it then starts empty. Wider floats and integers are taken and converted; floats for integers and the other way round are refused.
    """
    inputs = [i for i in inputs if not i.state or i.name in data.inputs]
    wanted = [i.name for i in inputs]
    missing = [n for n in wanted if n not in data.inputs]
    extra = [n for n in data.inputs if n not in wanted]
    if missing or extra:
        raise PlanishError(
            f"data '{data.source}' has the keys {listed(data.inputs, 6)}; the model's inputs are {listed(wanted, 6)}"
            " (and 'labels' for the classes)"
        )
    counts = {n: len(data.inputs[n]) for n in wanted}
    if min(counts.values()) == 0:
        raise PlanishError(f"data '{data.source}' is empty: 0 samples of '{wanted[0]}'")
    if len(set(counts.values())) > 1:
        raise PlanishError(f"data '{data.source}' has different numbers of samples: {counts}")
    for item in inputs:
        array = data.inputs[item.name]
        accepted = ("n", *(item.dim(k) or d for k, d in enumerate(item.shape) if k > 0))
        if len(array.shape) != len(accepted) or any(
            isinstance(d, int) and d != n for n, d in zip(array.shape[1:], accepted[1:], strict=True)
        ):
            found = ("n", *array.shape[1:])
            raise PlanishError(
                f"data '{data.source}': '{item.name}' has shape {_dims(found)}; the model takes {_dims(accepted)}"
            )
        wanted_kind = "f" if item.dtype.is_floating_point else "iu"
        if array.dtype.kind not in wanted_kind:
            raise PlanishError(
                f"data '{data.source}': '{item.name}' has dtype {array.dtype}; the model takes {item.dtype}".replace(
                    "torch.", ""
                )
            )
        if wanted_kind == "iu":
            limits = torch.iinfo(item.dtype)
            if int(array.min()) < limits.min or int(array.max()) > limits.max:
                raise PlanishError(
                    f"data '{data.source}': '{item.name}' has values from {array.min()} to {array.max()}; the model takes "
                    f"{limits.min} to {limits.max}"
                )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))
            raise PlanishError(
                f"data '{data.source}': '{item.name}' has {len(bad)} NaN or Inf values, the first in sample {bad[0][0]}"
            )
    if data.labels is not None and len(data.labels) != data.n:
        raise PlanishError(f"data '{data.source}': {len(data.labels)} labels for {data.n} samples")
    arrays = {
        i.name: data.inputs[i.name].astype(torch.empty(0, dtype=i.dtype).numpy().dtype, copy=False) for i in inputs
    }
    return Data(arrays, data.labels, data.source)


def _dims(shape: tuple[object, ...]) -> str:
    return "(" + ", ".join(str(d) for d in shape) + ")"
