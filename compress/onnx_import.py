"""Float (or quantize/dequantize) ONNX models to torch, so that every pass works on them.

Each ONNX node becomes the torch call of one function in OPS, recorded by torch.fx: a function sees graph values as fx
proxies, constants as tensors, and shape arithmetic as lists of ints and proxies, so that what depends on constants
only is folded by simply running. Initializers become parameters (running statistics and integer codes: buffers) that
keep their names where those are names. Semantics: ONNX operator specification, opset 7 to 21.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch
import torch.nn.functional as F
from torch.fx import Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from ..common.errors import PlanishError, listed
from ..kernels import affine
from . import onnx_file
from .model import Model, from_program, trace

_ = affine  # its import defines planish::quantize and planish::dequantize

Value = Any
"""a Proxy (graph value), a Tensor (constant), a list of ints and Proxies (a shape), or None (input left out)"""


class Unsupported(Exception):
    """This node cannot be imported; the message says why."""


def load(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Model:
    """The model in an .onnx file. `shapes` gives input shapes where the file leaves more than the batch open.

    Raises PlanishError for a missing or damaged file and for nodes that are not known.
    """
    return to_model(onnx_file.read(path), str(path), shapes)


def to_model(proto: onnx.ModelProto, source: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Model:
    """The traced model: batch-dynamic when two samples at once give what each gives alone, else with the file's shapes."""
    examples = _examples(proto, source, shapes or {})
    graph = import_onnx(proto, examples, source)
    model = trace(graph, examples, source)
    if model.batched and not _batch_independent(model, examples):
        program = torch.export.export(graph, tuple(examples.values()))
        return from_program(program, tuple(examples), source)
    return model


def import_onnx(proto: onnx.ModelProto, examples: Mapping[str, torch.Tensor], source: str) -> torch.fx.GraphModule:
    """A module with one argument per ONNX input, of which `examples` gives a sample each under its Python name.

    Raises PlanishError naming the node that is not known.
    """
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    importer = _Importer(proto, source, opset)
    initial = {i.name for i in proto.graph.initializer}
    for item in proto.graph.input:
        if item.name not in initial:
            importer.values[item.name] = importer.leaf(
                importer.graph.placeholder(identifier(item.name)), examples[identifier(item.name)]
            )
    for node in proto.graph.node:
        importer.add(node)
    outputs = tuple(importer.values[o.name] for o in proto.graph.output)
    if not all(isinstance(o, Proxy) for o in outputs):
        raise PlanishError(f"'{source}': an output does not depend on the inputs")
    nodes = tuple(o.node for o in outputs)
    importer.graph.output(nodes[0] if len(nodes) == 1 else nodes)
    importer.graph.eliminate_dead_code()
    return torch.fx.GraphModule(importer.root, importer.graph)


def identifier(name: str) -> str:
    """An ONNX value name as a Python name: 'input.1' -> 'input_1'."""
    clean = re.sub(r"\W", "_", name, flags=re.ASCII)
    return clean if re.match(r"[A-Za-z_]", clean) else f"x{clean}"


def _examples(proto: onnx.ModelProto, source: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    initial = {i.name for i in proto.graph.initializer}
    wanted = [i for i in proto.graph.input if i.name not in initial]
    unknown = [n for n in shapes if n not in [i.name for i in wanted] + [identifier(i.name) for i in wanted]]
    if unknown:
        raise PlanishError(
            f"'{source}' has no inputs {listed(unknown)}; its inputs are {listed([i.name for i in wanted], 6)}"
        )
    for item in wanted:
        tensor = item.type.tensor_type
        given = shapes.get(item.name, shapes.get(identifier(item.name)))
        dims = tuple(d.dim_value for d in tensor.shape.dim)
        if given is None and any(d == 0 for d in dims[1:]):
            raise PlanishError(f"input '{item.name}' of '{source}' has open dimensions; give --input {item.name}=1,...")
        fits = given is None or (
            len(given) == len(dims) and all(d in (0, g) for d, g in zip(dims[1:], given[1:], strict=True))
        )
        if not fits:
            raise PlanishError(f"input '{item.name}' of '{source}' has the shape {dims} (0: open); {given} was given")
        dtype = torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))).dtype
        found[identifier(item.name)] = torch.zeros(given or (dims[0] or 2, *dims[1:]), dtype=dtype)
    return found


def _batch_independent(model: Model, examples: Mapping[str, torch.Tensor]) -> bool:
    """Whether the outputs for two random samples at once are the outputs for each (a file may fix its batch inside)."""
    generator = torch.Generator().manual_seed(0)
    pair = [
        torch.randn((2, *x.shape[1:]), generator=generator) if x.is_floating_point() else x.new_zeros((2, *x.shape[1:]))
        for x in examples.values()
    ]
    with torch.no_grad():
        both = pytree.tree_leaves(model(*pair))
        single = [pytree.tree_leaves(model(*(x[i : i + 1] for x in pair))) for i in range(2)]
    return all(
        y.ndim > 0
        and len(y) == 2
        and all(torch.allclose(y[i : i + 1], single[i][k], rtol=1e-3, atol=1e-4) for i in range(2))
        for k, y in enumerate(both)
    )


class _Tracer(GraphAppendingTracer):
    """Records calls on proxies, and runs each on tensors without data, so that every value's shape is known."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        call = getattr(args[0], target) if kind == "call_method" else target
        node.meta["val"] = call(*(args[1:] if kind == "call_method" else args), **kwargs)
        return proxy


class _Importer:
    """The fx graph that is being built: values by ONNX name, and the module that holds the constants."""

    def __init__(self, proto: onnx.ModelProto, source: str, opset: int) -> None:
        self.source, self.opset = source, opset
        self.graph, self.root = torch.fx.Graph(), torch.nn.Module()
        self.tracer = _Tracer(self.graph)
        self.values: dict[str, Value] = {"": None}
        self.names: dict[int, str] = {}  # id of a constant tensor -> name of the initializer it is
        self.registered: dict[tuple[int, str], Proxy] = {}
        for item in proto.graph.initializer:
            self.values[item.name] = tensor = _tensor(item)
            self.names[id(tensor)] = item.name
        self.bias = _matmul_biases(proto, self.values)

    def leaf(self, node: torch.fx.Node, value: torch.Tensor) -> Proxy:
        """A proxy for an input or a constant."""
        node.meta["val"] = value.to("meta")
        return Proxy(node, self.tracer)

    def add(self, proto: onnx.NodeProto) -> None:
        """Import one node; its outputs are then in `values`."""
        kind = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
        label = f"node '{proto.name or proto.output[0]}' ({kind}) of '{self.source}'"
        if kind not in OPS:
            raise PlanishError(f"{label} is not known; known ops: {', '.join(sorted(OPS))}")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
        node = Node(proto, [self.values[n] for n in proto.input], attributes, self)
        if all(n in self.values for n in proto.output):
            return  # the Add that went into its MatMul
        try:
            result = OPS[kind](node)
        except Unsupported as error:
            raise PlanishError(f"{label}: {error}") from None
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
            raise PlanishError(f"{label} does not fit its inputs: {reason}") from None
        unread = [n for n in attributes if n not in node.read]
        if unread:
            raise PlanishError(f"{label} has attributes that are not known: {listed(unread)}")
        results = list(result) if isinstance(result, tuple) else [result]
        for name, value in zip(proto.output, results, strict=False):
            self.values[name] = value
        lacking = [n for n in proto.output if n and n not in self.values]
        if lacking:
            raise PlanishError(f"{label} has outputs that are not known: {listed(lacking)}")

    def constant(self, tensor: torch.Tensor, owner: str, role: str, learned: bool) -> Proxy:
        """A constant as parameter or buffer of the module, under its ONNX name or '<layer>.<role>'."""
        key = (id(tensor), role)
        if key not in self.registered:
            name = _free_name(self.root, self._name(tensor, owner, role))
            *path, leaf = name.split(".")
            module = self.root
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            if learned and tensor.is_floating_point():
                module.register_parameter(leaf, torch.nn.Parameter(tensor))
            else:
                module.register_buffer(leaf, tensor)
            self.registered[key] = self.leaf(self.graph.get_attr(name), tensor)
            self.values[f"\0{name}"] = tensor  # keeps the tensor alive, and so its id unique
        return self.registered[key]

    def _name(self, tensor: torch.Tensor, owner: str, role: str) -> str:
        given = self.names.get(id(tensor), "")
        if given and "::" not in given and not given.isdigit():
            clean = re.sub(r"[^A-Za-z0-9_.]", "_", given.replace("/", ".")).strip(".")
            clean = re.sub(r"\.{2,}", ".", clean)
            return f"{clean}_codes" if role == "codes" else clean
        return f"{_layer(owner)}.{'weight_codes' if role == 'codes' else role}"


def _layer(node_name: str) -> str:
    """The layer that a torch exporter's node name speaks of: '/layer1/layer1.0/conv1/Conv' -> 'layer1.0.conv1'."""
    found: list[str] = []
    for part in node_name.strip("/").split("/")[:-1] or [node_name.strip("/")]:
        if found and part.startswith(found[-1] + "."):
            found.pop()
        found.append(part)
    clean = re.sub(r"[^A-Za-z0-9_.]", "_", ".".join(found)).strip(".")
    return re.sub(r"\.{2,}", ".", clean) or "constant"


def _free_name(root: torch.nn.Module, name: str) -> str:
    taken = dict(root.named_parameters()) | dict(root.named_buffers())
    for count in range(len(taken) + 2):
        free = name if count == 0 else f"{name}_{count}"
        clash = any(t == free or t.startswith(free + ".") or free.startswith(t + ".") for t in taken)
        if not clash and not hasattr(torch.nn.Module(), free.split(".")[0]):
            return free
    return "constant_" + name.replace(".", "_") + str(len(taken))


def _tensor(proto: onnx.TensorProto) -> torch.Tensor:
    array = onnx.numpy_helper.to_array(proto)
    return torch.from_numpy(np.array(array))  # a copy: the file's bytes are read-only


def _matmul_biases(proto: onnx.ModelProto, values: Mapping[str, Value]) -> dict[str, tuple[torch.Tensor, str]]:
    """{MatMul output: (bias (out,), output of the Add)} where the only use of a MatMul is the addition of its bias."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {o.name for o in proto.graph.output}
    found: dict[str, tuple[torch.Tensor, str]] = {}
    for node in proto.graph.node:
        weight = values.get(node.input[1]) if node.op_type == "MatMul" else None
        after = users.get(node.output[0], []) if weight is not None and node.output[0] not in outputs else []
        if weight is None or weight.ndim != 2 or len(after) != 1 or after[0].op_type != "Add":
            continue
        other = next((n for n in after[0].input if n != node.output[0]), "")
        bias = values.get(other)
        if isinstance(bias, torch.Tensor) and bias.shape == (weight.shape[1],):
            found[node.output[0]] = (bias, after[0].output[0])
    return found


@dataclass
class Node:
    """One ONNX node as an op's function sees it."""

    proto: onnx.NodeProto
    inputs: list[Value]
    attributes: dict[str, Any]
    importer: _Importer
    read: set[str] = field(default_factory=set)

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value; strings are decoded. Attributes that no one asks for are an error."""
        self.read.add(name)
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def require(self, name: str, accepted: Any) -> None:
        """Raise Unsupported unless the attribute is absent or has the accepted value."""
        value = self.attr(name, accepted)
        if value != accepted:
            raise Unsupported(f"{name} = {value!r} is not supported; {accepted!r} is")

    def value(self, index: int) -> Value:
        """An input as it is; None when it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def x(self, index: int = 0, role: str = "constant", learned: bool = True) -> Any:
        """An input to compute with: a proxy, or the tensor itself when the whole node is constant."""
        value = self.value(index)
        if not isinstance(value, torch.Tensor) or not any(isinstance(v, Proxy) for v in self.inputs):
            return value
        return self.constant(value, role, learned)

    def constant(self, tensor: torch.Tensor, role: str, learned: bool = True) -> Any:
        """A constant tensor in the graph: a proxy."""
        return self.importer.constant(tensor, self.proto.name or self.proto.output[0], role, learned)

    def tensor(self, index: int) -> torch.Tensor:
        """An input that must be constant."""
        value = self.value(index)
        if isinstance(value, list) and all(isinstance(v, int) for v in value):
            return torch.tensor(value)
        if not isinstance(value, torch.Tensor):
            raise Unsupported(f"input {index} ('{self.proto.input[index]}') must be constant")
        return value

    def ints(self, index: int, attribute: str | None = None) -> list[Any] | None:
        """Integers from an input or, in older opsets, an attribute; entries may be proxies of dimensions."""
        value = self.value(index)
        if value is None:
            return None if attribute is None else self.attr(attribute)
        if attribute is not None:
            self.read.add(attribute)
        return value if isinstance(value, list) else [int(v) for v in self.tensor(index).flatten()]

    def shape(self, index: int = 0) -> list[int]:
        """Dimensions of an input; the first is the batch of the example where the input is a graph value."""
        value = self.value(index)
        return list((value.node.meta["val"] if isinstance(value, Proxy) else value).shape)

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.importer.opset


# ---- convolution, matrix products, normalization


def _pads(n: Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """[begin..., end...] of the spatial dimensions, from `pads` or `auto_pad`."""
    mode, pads = n.attr("auto_pad", "NOTSET"), n.attr("pads", [0] * (2 * len(kernel)))
    if mode == "NOTSET":
        return list(pads)
    if mode == "VALID":
        return [0] * (2 * len(kernel))
    total = []
    for size, k, s, d in zip(n.shape()[2:], kernel, strides, dilations, strict=True):
        total.append(max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0))
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return small + large if mode == "SAME_UPPER" else large + small


def _padded(x: Any, pads: Sequence[int], value: float) -> tuple[Any, list[int]]:
    """The input and the symmetric padding left for the op; unequal sides are padded explicitly with `value`."""
    half = len(pads) // 2
    begin, end = list(pads[:half]), list(pads[half:])
    if begin == end:
        return x, begin
    flat = [p for pair in zip(reversed(begin), reversed(end), strict=True) for p in pair]
    return F.pad(x, flat, value=value), [0] * half


def _conv(n: Node) -> Any:
    kernel = n.shape(1)[2:]
    rank = len(kernel)
    if not 1 <= rank <= 3:
        raise Unsupported(f"{rank} spatial dimensions; 1 to 3 are accepted")
    n.attr("kernel_shape")
    strides, dilations = n.attr("strides", [1] * rank), n.attr("dilations", [1] * rank)
    x, padding = _padded(n.x(0), _pads(n, kernel, strides, dilations), 0.0)
    convolve: Callable[..., Any] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolve(x, n.x(1, "weight"), n.x(2, "bias"), list(strides), padding, list(dilations), n.attr("group", 1))


def _gemm(n: Node) -> Any:
    x = n.x(0)
    alpha, beta = n.attr("alpha", 1.0), n.attr("beta", 1.0)
    if n.attr("transA", 0):
        x = x.t()
    weight, transposed = n.value(1), n.attr("transB", 0)
    w: Any = weight
    if isinstance(weight, torch.Tensor):
        w = _linear_weight(n, weight if transposed else None, weight, alpha)
    else:
        w = weight if transposed else weight.t()
        w = w if alpha == 1 else w * alpha  # a product would hide a quantized weight from what looks for layers
    bias: Any = n.value(2)
    if isinstance(bias, torch.Tensor):
        flat = bias.flatten() if bias.ndim == 2 and bias.shape[0] == 1 else bias
        own = flat if beta == 1 else flat * beta
        bias = n.constant(_renamed(n, bias, own), "bias")
    elif bias is not None and beta != 1:
        bias = bias * beta
    return F.linear(x, w, bias)


def _linear_weight(n: Node, ready: torch.Tensor | None, stored: torch.Tensor, alpha: float = 1.0) -> Any:
    """The parameter (out, in) of a linear layer from a stored matrix, transposed at import unless it is `ready`."""
    weight = stored.t().contiguous() if ready is None else ready
    return n.constant(_renamed(n, stored, weight if alpha == 1 else weight * alpha), "weight")


def _renamed(n: Node, stored: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Let a tensor derived from an initializer carry the initializer's name."""
    if used is not stored and id(stored) in n.importer.names:
        n.importer.names[id(used)] = n.importer.names[id(stored)]
        n.importer.values[f"\0derived {len(n.importer.values)}"] = used  # kept alive: its id is the key
    return used


def _matmul(n: Node) -> Any:
    weight = n.value(1)
    if not (isinstance(weight, torch.Tensor) and weight.ndim == 2 and isinstance(n.value(0), Proxy)):
        return torch.matmul(n.x(0), n.x(1, "weight"))
    fused = n.importer.bias.get(n.proto.output[0])
    w = _linear_weight(n, None, weight)
    y = F.linear(n.x(0), w, n.constant(fused[0], "bias") if fused else None)
    if fused:
        n.importer.values[fused[1]] = y
    return y


def _batch_norm(n: Node) -> Any:
    n.require("training_mode", 0)
    n.require("spatial", 1)
    n.attr("momentum")
    mean, variance = n.x(3, "running_mean", learned=False), n.x(4, "running_var", learned=False)
    return F.batch_norm(n.x(0), mean, variance, n.x(1, "weight"), n.x(2, "bias"), False, 0.0, n.attr("epsilon", 1e-5))


def _layer_norm(n: Node) -> Any:
    n.require("stash_type", 1)
    rank = len(n.shape())
    axis = n.attr("axis", -1) % rank
    normalized = n.shape(1)
    if len(normalized) != rank - axis:
        raise Unsupported("scale must have the shape of the normalized dimensions")
    return F.layer_norm(n.x(0), normalized, n.x(1, "weight"), n.x(2, "bias"), n.attr("epsilon", 1e-5))


# ---- activations and arithmetic


def _unary(function: Callable[[Any], Any]) -> Callable[[Node], Any]:
    return lambda n: function(n.x(0))


def _operand(n: Node, index: int) -> Any:
    """An elementwise operand; a constant of one element is a plain number."""
    value = n.value(index)
    others = [v for v in n.inputs if isinstance(v, Proxy)]
    if isinstance(value, torch.Tensor) and others and value.numel() == 1 and value.is_floating_point():
        return float(value)
    return n.x(index, "constant")


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Node], Any]:
    def convert(n: Node) -> Any:
        a, b = n.value(0), n.value(1)
        if isinstance(a, list) or isinstance(b, list):  # arithmetic on dimensions
            return _dims_arithmetic(function, _as_dims(a), _as_dims(b))
        return function(_operand(n, 0), _operand(n, 1))

    return convert


def _as_dims(value: Value) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return [int(v) for v in value.flatten()]
    raise Unsupported("arithmetic of a shape with something that is no integer constant")


def _dims_arithmetic(function: Callable[[Any, Any], Any], a: list[Any], b: list[Any]) -> list[Any]:
    function = operator.floordiv if function is operator.truediv else function
    n = max(len(a), len(b))
    if len(a) not in (1, n) or len(b) not in (1, n):
        raise Unsupported("shapes of different lengths")
    return [function(a[i % len(a)], b[i % len(b)]) for i in range(n)]


def _clip(n: Node) -> Any:
    low, high = (float(n.tensor(i)) if n.value(i) is not None else None for i in (1, 2))
    low, high = n.attr("min", low), n.attr("max", high)
    if low is None and high is None:
        return n.x(0)
    return F.relu(n.x(0)) if (low, high) == (0.0, None) else torch.clamp(n.x(0), low, high)


def _hard_sigmoid(n: Node) -> Any:
    alpha, beta = n.attr("alpha", 0.2), n.attr("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(n.x(0))
    return torch.clamp(n.x(0) * alpha + beta, 0.0, 1.0)


def _prelu(n: Node) -> Any:
    slope = n.value(1)
    if not isinstance(slope, torch.Tensor) or slope.numel() not in (1, n.shape()[1]):
        raise Unsupported("the slope must be constant, one number or one per channel")
    return F.prelu(n.x(0), n.constant(_renamed(n, slope, slope.flatten()), "weight"))


def _softmax(function: Callable[..., Any]) -> Callable[[Node], Any]:
    def convert(n: Node) -> Any:
        axis = n.attr("axis", -1 if n.opset >= 13 else 1)
        if n.opset < 13 and axis % len(n.shape()) != len(n.shape()) - 1:
            raise Unsupported(f"axis {axis} joins dimensions before opset 13; the last axis is accepted")
        return function(n.x(0), dim=axis)

    return convert


def _gelu(n: Node) -> Any:
    return F.gelu(n.x(0), approximate=n.attr("approximate", "none"))


# ---- pooling and reductions


def _pool(n: Node) -> tuple[Any, dict[str, Any], list[int]]:
    kernel = n.attr("kernel_shape")
    if len(kernel) not in (1, 2):
        raise Unsupported(f"{len(kernel)} spatial dimensions; 1 or 2 are accepted")
    strides, dilations = n.attr("strides", [1] * len(kernel)), n.attr("dilations", [1] * len(kernel))
    pads = _pads(n, kernel, strides, dilations)
    return n.x(0), {"kernel_size": kernel, "stride": strides, "ceil_mode": bool(n.attr("ceil_mode", 0))}, pads


def _max_pool(n: Node) -> Any:
    n.require("storage_order", 0)
    x, options, pads = _pool(n)
    x, padding = _padded(x, pads, -math.inf)
    pool = F.max_pool1d if len(padding) == 1 else F.max_pool2d
    return pool(x, **options, padding=padding, dilation=n.attr("dilations", [1] * len(padding)))


def _average_pool(n: Node) -> Any:
    x, options, pads = _pool(n)
    n.require("dilations", [1] * (len(pads) // 2))
    included = bool(n.attr("count_include_pad", 0))
    half = len(pads) // 2
    if pads[:half] != pads[half:] and not included:
        raise Unsupported(f"pads {pads} with count_include_pad = 0; equal pads on both sides are accepted")
    x, padding = _padded(x, pads, 0.0)
    if half == 1:
        return F.avg_pool1d(x, **options, padding=padding, count_include_pad=included)
    return F.avg_pool2d(x, **options, padding=padding, count_include_pad=included)


def _global_average_pool(n: Node) -> Any:
    rank = len(n.shape())
    return F.adaptive_avg_pool2d(n.x(0), 1) if rank == 4 else torch.mean(n.x(0), list(range(2, rank)), keepdim=True)


def _global_max_pool(n: Node) -> Any:
    return torch.amax(n.x(0), list(range(2, len(n.shape()))), keepdim=True)


def _reduce(function: Callable[..., Any]) -> Callable[[Node], Any]:
    def convert(n: Node) -> Any:
        axes, keep_all = n.ints(1, "axes"), n.attr("noop_with_empty_axes", 0)
        if not axes and keep_all:
            return n.x(0)
        return function(n.x(0), axes or list(range(len(n.shape()))), keepdim=bool(n.attr("keepdims", 1)))

    return convert


# ---- shape


def _shape(n: Node) -> Any:
    start, end = n.attr("start", 0), n.attr("end")
    value = n.value(0)
    if isinstance(value, torch.Tensor):
        return torch.tensor(value.shape)[start:end]
    return [value.size(0) if i == 0 else d for i, d in enumerate(n.shape())][start:end]


def _reshape(n: Node) -> Any:
    value, allow_zero = n.value(0), n.attr("allowzero", 0)
    if isinstance(value, list):
        return value
    target = list(n.ints(1, "shape") or [])
    x = n.x(0)
    if isinstance(value, Proxy):
        for i, d in enumerate(target):
            if isinstance(d, int) and d == 0 and not allow_zero:
                target[i] = x.size(i)
        if target and isinstance(target[0], int) and target[0] == n.shape()[0] == 1:
            target[0] = x.size(0)  # a file written for one sample; `to_model` checks that this is right
    elif not allow_zero:
        target = [value.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return x.reshape(target)


def _flatten(n: Node) -> Any:
    x, axis = n.x(0), n.attr("axis", 1)
    if axis == 1 or isinstance(x, torch.Tensor):
        return torch.flatten(x, 1) if axis == 1 else x.reshape([math.prod(x.shape[:axis]), -1])
    return x.reshape([x.size(0) * math.prod(n.shape()[1:axis]) if axis else 1, -1])


def _squeeze(n: Node) -> Any:
    axes = n.ints(1, "axes")
    if isinstance(n.value(0), list):
        return n.value(0)
    if axes is None:
        axes = [i for i, d in enumerate(n.shape()) if d == 1]
    return torch.squeeze(n.x(0), tuple(axes))


def _unsqueeze(n: Node) -> Any:
    axes = n.ints(1, "axes") or []
    if isinstance(n.value(0), list):
        return n.value(0)
    x, rank = n.x(0), len(n.shape()) + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = torch.unsqueeze(x, axis)
    return x


def _concat(n: Node) -> Any:
    axis = n.attr("axis")
    if any(isinstance(v, list) for v in n.inputs):
        return [d for v in n.inputs for d in _as_dims(v)]
    return torch.cat([n.x(i) for i in range(len(n.inputs))], axis)


def _split(n: Node) -> Any:
    axis, sizes = n.attr("axis", 0), n.ints(1, "split")
    if sizes is None:
        count, whole = n.attr("num_outputs", len(n.proto.output)), n.shape()[axis]
        step = math.ceil(whole / count)
        sizes = [min(step, whole - i * step) for i in range(count)]
    n.attr("num_outputs")
    parts = torch.split(n.x(0), sizes, axis)
    return tuple(parts[i] for i in range(len(sizes)))


def _gather(n: Node) -> Any:
    axis, value, index = n.attr("axis", 0), n.value(0), n.value(1)
    if isinstance(value, list):
        picked = [value[i] for i in _as_dims(index)]
        return picked
    if isinstance(index, torch.Tensor) and isinstance(value, torch.Tensor):
        return torch.from_numpy(np.take(value.numpy(), index.numpy(), axis))
    if isinstance(value, torch.Tensor):  # rows of a table
        if axis != 0 or value.ndim != 2:
            raise Unsupported("indices that depend on the input pick rows of a constant matrix (axis 0) only")
        return F.embedding(index, n.constant(value, "weight"))
    if not isinstance(index, torch.Tensor):
        raise Unsupported("indices must be constant or pick from a constant table")
    if index.ndim == 0:
        return torch.select(n.x(0), axis, int(index))
    if index.ndim != 1:
        raise Unsupported(f"indices of shape {tuple(index.shape)}; one index or a list is accepted")
    return torch.index_select(n.x(0), axis, n.constant(index % n.shape()[axis], "indices", learned=False))


def _slice(n: Node) -> Any:
    starts, ends, axes, steps = n.ints(1, "starts"), n.ints(2, "ends"), n.ints(3, "axes"), n.ints(4)
    assert starts is not None and ends is not None
    if isinstance(n.value(0), list):
        return n.value(0)[starts[0] : ends[0] : (steps or [1])[0]]
    x, rank = n.x(0), len(n.shape())
    for axis, start, end, step in zip(
        axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True
    ):
        index: list[Any] = [slice(None)] * rank
        open_end = isinstance(end, int) and (end >= 2**31 - 1 or (step < 0 and end <= -(2**31) + 1))
        index[axis] = slice(start, None if open_end else end, step)
        if isinstance(x, torch.Tensor):  # numpy knows negative steps
            x = torch.from_numpy(x.numpy()[tuple(index)].copy())
        elif step < 1:
            raise Unsupported(f"step {step}; a positive step is accepted")
        else:
            x = x[tuple(index)]
    return x


def _pad(n: Node) -> Any:
    mode, pads, axes = n.attr("mode", "constant"), n.ints(1, "pads"), n.ints(3)
    fill = n.attr("value", float(n.tensor(2)) if n.value(2) is not None else 0.0)
    rank = len(n.shape())
    if pads is None or any(not isinstance(p, int) for p in pads):
        raise Unsupported("pads must be constant")
    half = len(pads) // 2
    each = {a % rank: (pads[i], pads[half + i]) for i, a in enumerate(axes or range(rank))}
    flat = [p for axis in reversed(range(rank)) for p in each.get(axis, (0, 0))]
    while flat[-2:] == [0, 0]:
        flat = flat[:-2]
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
    if mode not in modes:
        raise Unsupported(f"mode {mode!r}; {', '.join(modes)} are accepted")
    if not flat:
        return n.x(0)
    return F.pad(n.x(0), flat, modes[mode], fill if mode == "constant" else None)


def _transpose(n: Node) -> Any:
    order = n.attr("perm") or list(reversed(range(len(n.shape()))))
    return n.x(0).permute(order)


def _expand(n: Node) -> Any:
    sizes = n.ints(1) or []
    return (
        torch.broadcast_to(n.x(0), [-1 if isinstance(s, int) and s == 1 else s for s in sizes])
        if isinstance(n.value(0), Proxy)
        else n.x(0).expand(torch.broadcast_shapes(n.x(0).shape, sizes))
    )


# ---- constants, types, quantization


def _constant(n: Node) -> Any:
    for name in ("value_float", "value_int", "value_floats", "value_ints"):
        value = n.attr(name)
        if value is not None:
            return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)
    value = n.attr("value")
    if value is None:
        raise Unsupported("it has no dense numeric value")
    return _tensor(value)


def _constant_of_shape(n: Node) -> Any:
    value = n.attr("value")
    fill = torch.zeros(1) if value is None else _tensor(value)
    return torch.full([int(v) for v in n.tensor(0)], fill.item(), dtype=fill.dtype)


def _cast(n: Node) -> Any:
    dtype = torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(n.attr("to")))).dtype
    n.attr("saturate")
    if isinstance(n.value(0), list):
        if dtype.is_floating_point:
            raise Unsupported("a shape as floating point")
        return n.value(0)
    return n.x(0).to(dtype)


def _quantization(n: Node, default: torch.dtype) -> tuple[Proxy, Proxy, int, torch.dtype]:
    """Scale float32 and zero point, 0-d or (channels,), the axis and the integer dtype."""
    n.require("block_size", 0)
    scale = n.tensor(1)
    zero = torch.zeros(scale.shape, dtype=default) if n.value(2) is None else n.tensor(2)
    shape = () if scale.numel() == 1 else (-1,)
    axis = n.attr("axis", 1)
    return (
        n.constant(_renamed(n, scale, scale.reshape(shape)), "scale", learned=False),
        n.constant(
            _renamed(n, zero, zero.reshape(shape)) if n.value(2) is not None else zero.reshape(shape),
            "zero_point",
            learned=False,
        ),
        axis,
        zero.dtype,
    )


def _quantize(n: Node) -> Any:
    for name, accepted in (("saturate", 1), ("output_dtype", 0), ("precision", 0)):
        n.require(name, accepted)
    scale, zero, axis, dtype = _quantization(n, torch.uint8)
    x = n.x(0) if isinstance(n.value(0), Proxy) else n.constant(n.tensor(0), "weight")
    limits = torch.iinfo(dtype)
    return torch.ops.planish.quantize.default(x, scale, zero, axis, limits.min, limits.max, dtype)


def _dequantize(n: Node) -> Any:
    n.require("output_dtype", 0)
    value = n.value(0)
    scale, zero, axis, _ = _quantization(n, value.dtype if isinstance(value, torch.Tensor) else torch.uint8)
    x = value if isinstance(value, Proxy) else n.constant(n.tensor(0), "codes", learned=False)
    return torch.ops.planish.dequantize.default(x, scale, zero, axis)


OPS: dict[str, Callable[[Node], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Relu": _unary(F.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "HardSwish": _unary(F.hardswish),
    "Softplus": _unary(F.softplus),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Erf": _unary(torch.erf),
    "Abs": _unary(torch.abs),
    "Neg": _unary(operator.neg),
    "Clip": _clip,
    "LeakyRelu": lambda n: F.leaky_relu(n.x(0), n.attr("alpha", 0.01)),
    "Elu": lambda n: F.elu(n.x(0), n.attr("alpha", 1.0)),
    "PRelu": _prelu,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Add": _binary(operator.add),
    "Sub": _binary(operator.sub),
    "Mul": _binary(operator.mul),
    "Div": _binary(operator.truediv),
    "Pow": _binary(operator.pow),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "Shape": _shape,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Gather": _gather,
    "Slice": _slice,
    "Pad": _pad,
    "Transpose": _transpose,
    "Expand": _expand,
    "Identity": lambda n: n.value(0),
    "Dropout": lambda n: (n.attr("ratio"), n.attr("seed"), n.value(0))[2],
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cast": _cast,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
"""the function that imports each ONNX op"""
