"""`GpuOp`: one fused op as a program for a GPU holds it, the node `planish::gpu_<file name>`.

An op's file says what is stored (`pack`: weights in the order in which the kernel reads them) and registers the node with `register`. On
CUDA tensors the node launches the kernel of the same name in kernels/triton/; on the CPU it computes the reference, in plain torch from the
same stored tensors, which defines the numbers.

Activations are float16, bfloat16 or float32; sums are float32 (int32 for integer products); the output has the type of x. Every linear
op ends in the same epilogue, in float32:

    y = activation(z + bias) * factor + residual        z (..., out) the product; factor and residual (..., out); any part may be absent
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from ...common import plugins
from ...common.errors import missing_extra
from ..affine import LIBRARY
from .core import Core

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
"""what an epilogue may apply"""
EPILOGUE = "Tensor? bias, Tensor? factor, Tensor? residual, str activation"
"""the last arguments of every linear op's schema"""


@dataclass(frozen=True)
class Layer:
    """One use of a fused op of kernels/, whose constants are known."""

    op: str
    """name of the op's file in kernels/"""
    name: str
    """layer name, for messages"""
    tensors: Mapping[str, torch.Tensor]
    """constant tensor arguments by the schema's name; an absent optional one is missing, and so is the computed x"""
    attributes: Mapping[str, Any]
    """the other arguments by name"""


@dataclass(frozen=True)
class Split:
    """The same layer as two nodes, so that what stands before it can be fused into the first, and layers that read one x share it.

    codes, scale, zero, y, sum = planish::gpu_quantize_tokens(x, <a norm, a rotation, a residual>, <`quantize`>)
    planish::gpu_<`product`>(codes=codes, token_scale=scale, token_zero=zero where quantize["group"] is -1, <`tensors`>,
                             <`attributes`>, dtype=<x's>, <the epilogue>)
    """

    quantize: Mapping[str, Any]
    """attributes of gpu_quantize_tokens: format, group, columns; layers may share its codes where these are equal"""
    product: str
    """linear_int8 or linear_float8"""
    tensors: Mapping[str, torch.Tensor]
    """arguments of the product by name: the same tensors as `Packed.tensors`"""
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Packed:
    """The arguments of `planish::gpu_<op>` besides x and the epilogue, by the names of its schema."""

    tensors: Mapping[str, torch.Tensor]
    """stored in the artifact"""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    split: Split | None = None
    """the two nodes that it may be written as; None where there is only the one"""


class GpuOp(abc.ABC):
    """How a fused op is stored for a GPU. Stateless."""

    @abc.abstractmethod
    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Why no kernel takes this layer on this core (a shape, a width, a missing unit): one clause; None where one does."""

    @abc.abstractmethod
    def pack(self, layer: Layer, core: Core) -> Packed:
        """What is stored. Equal layers give equal bytes."""


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `planish::<schema>`, named gpu_<op>: `reference` on the CPU, `run` of kernels/triton/<op>.py on CUDA tensors.

    Both take the schema's arguments in its order.
    """
    name = schema.partition("(")[0]
    op = name.removeprefix("gpu_")

    LIBRARY.define(schema)
    names = [a.name for a in getattr(torch.ops.planish, name).default._schema.arguments]

    def launch(*args: Any) -> Any:
        return kernel(op).run(*in_rows(names, args))

    LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"planish::{name}", fake, lib=LIBRARY)


def in_rows(names: Sequence[str], arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a node, what its epilogue reads made contiguous: another layer's output may be a view of a merged one."""
    return [
        a.contiguous() if n in ("factor", "residual") and isinstance(a, torch.Tensor) else a
        for n, a in zip(names, arguments, strict=False)
    ]


def kernel(op: str) -> Any:
    """The module kernels/triton/<op>.py. Raises Missing where Triton is not installed."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise missing_extra("triton", "gpu", "running GPU kernels, or compiling them,") from error
    return importlib.import_module(f"..triton.{op}", __package__)


def epilogue(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The end of every linear op for the product z (..., out) float32: (..., out) of `dtype`."""
    y = ACTIVATIONS[activation](z if bias is None else z + bias.float())
    y = y if factor is None else y * factor.float()
    y = y if residual is None else y + residual.float()
    return y.to(dtype)


def linear_output(x: torch.Tensor, out: int) -> torch.Tensor:
    """The shape function of a linear op whose x is in floats: (..., in) -> (..., out)."""
    return x.new_empty((*x.shape[:-1], out))


def ops() -> dict[str, GpuOp]:
    """Every op by name. Importing their files, which this does, defines their nodes."""
    return {name: kind() for name, kind in plugins.find(__package__ or "planish.kernels.gpu", GpuOp).items()}
