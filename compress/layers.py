"""Reading and editing the traced graph: which layer a node belongs to, which parameter it reads, which shape it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ..common.errors import PlanishError
from .model import Model

STORED_AS = ("_codes", "_scale", "_zero_point")
"""what the quantizer appends to a parameter's name for the tensors that replace it"""


SMALL = 1024
"""elements of a constant whose values shapes may depend on"""
LARGEST = 1 << 22
"""elements of a constant that is computed ahead"""
FLOAT_OPS = ("planish.selective_scan", "planish.hadamard")
"""planish ops that compute in float, so that a model with them is not quantized yet"""


def op(node: Node) -> str:
    """The ATen op without its overload, e.g. 'aten.conv2d' or 'planish.quantize'; '' for a node that is not a call."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return str(node.target).rpartition(".")[0]


def parameter(node: object) -> str | None:
    """Name of the parameter whose value `node` is, also when a dequantize stands between; None when it is not one."""
    coded = False
    while isinstance(node, Node):
        coded |= op(node) == "planish.dequantize"
        if node.op == "get_attr":
            name = str(node.target)
            for suffix in STORED_AS if coded else ():
                name = name.removesuffix(suffix)
            return name
        if op(node) not in (
            "planish.dequantize",
            "aten.detach",
            "aten.detach_",
            "aten.lift_fresh_copy",
            "aten._to_copy",
        ):
            return None
        node = node.args[0]
    return None


def argument(node: Node, name: str) -> Any:
    """Value of an op's argument by its schema name, wherever it was passed; the schema's default when it was not."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, item in enumerate(node.target._schema.arguments):
        if item.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, item.default_value)
    raise KeyError(f"{node.target} has no argument '{name}'")


def set_argument(node: Node, name: str, value: Any) -> None:
    """Change an op's argument by its schema name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [item.name for item in node.target._schema.arguments]
    index = names.index(name)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


def layer(node: Node) -> str:
    """Layer name of an op: the prefix of its weight's name (conv1.weight -> conv1), else the node's own name."""
    for arg in node.args[1:]:
        for leaf in [arg] if isinstance(arg, Node) else tree_leaves(arg):
            name = parameter(leaf)
            if name is not None:
                return name.rpartition(".")[0] or name
    return node.name


def tensor(graph: GraphModule, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`."""
    value: object = graph
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor)
    return value


def set_tensor(graph: GraphModule, name: str, value: torch.Tensor) -> None:
    """Replace the data of the parameter or buffer called `name`; it stays a parameter or a buffer."""
    path, _, leaf = name.rpartition(".")
    owner = graph.get_submodule(path)
    if isinstance(getattr(owner, leaf), torch.nn.Parameter):
        value = torch.nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
    setattr(owner, leaf, value)


def bias_name(node: Node) -> str:
    """Name of the bias of a convolution or linear layer, or the one that it gets: conv1.weight -> conv1.bias."""
    bias, weight = parameter(argument(node, "bias")), parameter(argument(node, "weight"))
    assert weight is not None
    return bias or (weight.removesuffix("weight") + "bias" if weight.endswith(".weight") else f"{weight}_bias")


def refuse_quantized(model: Model, name: str) -> None:
    """Raise PlanishError when the graph already holds integer codes; `name` is the pass that wants floats."""
    for node in model.graph.graph.nodes:
        if op(node).startswith("planish.") and op(node) not in FLOAT_OPS:
            raise PlanishError(
                f"{name} works on float models; '{model.source}' is quantized already (at '{node.name}'): "
                "put it before the quantizing pass"
            )


def is_constant(node: object) -> bool:
    """Whether the node is a parameter or buffer itself."""
    return isinstance(node, Node) and node.op == "get_attr"


def read(graph: GraphModule, node: Node) -> torch.Tensor:
    """The tensor that a get_attr node stands for, detached."""
    return tensor(graph, str(node.target)).detach()


def is_parameter(node: object) -> bool:
    """Whether the node is a floating parameter, also one that is stored in 16 bits and converted where it is read."""
    return is_constant(node) or (isinstance(node, Node) and op(node) == "aten._to_copy" and is_constant(node.args[0]))


def value(graph: GraphModule, node: object) -> torch.Tensor:
    """The float32 value of a node for which `is_parameter` holds: 16-bit parameters are converted."""
    return stored(graph, node).float()


def stored(graph: GraphModule, node: object) -> torch.Tensor:
    """The tensor of a node for which `is_parameter` holds, as it is stored."""
    assert isinstance(node, Node)
    source = node if is_constant(node) else node.args[0]
    assert isinstance(source, Node)
    return read(graph, source)


def constant(graph: GraphModule, node: Node, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """The tensor that a node gives in every run; None where inputs, sizes or chance decide, or where it is large.

    Floating tensors are taken in `dtype`, where one is given, before anything is computed from them.
    """
    if is_constant(node):
        value = read(graph, node)
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return None
    value = node.meta.get("val")
    if (
        not isinstance(value, torch.Tensor)
        or not all(isinstance(d, int) for d in value.shape)
        or value.numel() > LARGEST
    ):
        return None
    inputs = {n: constant(graph, n, dtype) for n in node.all_input_nodes}
    if any(v is None for v in inputs.values()):
        return None
    with torch.no_grad():
        return node.target(*map_arg(node.args, inputs.__getitem__), **map_arg(node.kwargs, inputs.__getitem__))


def store(graph: GraphModule, node: Node, index: int, name: str, new: torch.Tensor) -> None:
    """Let argument `index` of `node` read `new` as the parameter `name`; other readers of the old tensor keep it.

    `name` is made unique when another node still reads a tensor of that name.
    """
    old = node.args[index] if index < len(node.args) else None
    shared = isinstance(old, Node) and (len(old.users) > 1 or (not is_constant(old) and len(old.args[0].users) > 1))  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    if shared:
        name = f"{name}_of_{node.name}"
    with graph.graph.inserting_before(node):
        made = add_parameter(graph, name, new)
    args = list(node.args) + [None] * (index + 1 - len(node.args))
    args[index] = made
    node.args = tuple(args)


def add_parameter(graph: GraphModule, name: str, value: torch.Tensor) -> Node:
    """Store a trainable parameter under a dotted name and return a new get_attr node for it (at the insert point)."""
    _owner(graph, name).register_parameter(name.rpartition(".")[2], torch.nn.Parameter(value.contiguous()))
    return _attribute(graph, name, value)


def add_buffer(graph: GraphModule, name: str, value: torch.Tensor) -> Node:
    """Store a constant tensor under a dotted name and return a new get_attr node for it (at the insert point)."""
    _owner(graph, name).register_buffer(name.rpartition(".")[2], value.contiguous())
    return _attribute(graph, name, value)


def drop_unused(graph: GraphModule) -> None:
    """Remove dead nodes, and the parameters and buffers that no node reads."""
    graph.graph.eliminate_dead_code()
    graph.recompile()
    used = {n.target for n in graph.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in [*graph.named_parameters(), *graph.named_buffers()]]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)


def _owner(graph: GraphModule, name: str) -> torch.nn.Module:
    """The module that holds the last part of a dotted name, made where it is missing; an old value is removed."""
    owner: torch.nn.Module = graph
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    return owner


def _attribute(graph: GraphModule, name: str, value: torch.Tensor) -> Node:
    node = graph.graph.create_node("get_attr", name)
    node.meta["val"] = value
    return node


class Hollow(Interpreter):
    """Runs a graph for what its tensors are, without values: weights are never read, and no result takes memory."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.graph)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.found: dict[Node, Any] = {}
        """what `see` makes of each node's result"""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the same shape without values; a small one as it is."""
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) and value.numel() > SMALL else value

    def see(self, value: object) -> object:
        """What is kept of a result, None for nothing."""
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def run_node(self, n: Node) -> object:
        """As ever; keeps what is seen of the result."""
        value = super().run_node(n)
        seen = self.see(value)
        if seen is not None:
            self.found[n] = seen
        return value

    def seen(self, example: Iterable[torch.Tensor]) -> dict[Node, Any]:
        """Run on inputs of the example's shapes."""
        with self._mode:
            self.run(*(self._mode.from_tensor(x) for x in example))
        return self.found


def shapes(model: Model, batch: int = 1) -> dict[Node, tuple[int, ...]]:
    """Shape of every tensor of the graph for `batch` samples, found without computing values.

    A model that fixes its batch is taken with its own. Nodes that give no single tensor are absent.
    """
    return Hollow(model).seen(model.example(batch))
