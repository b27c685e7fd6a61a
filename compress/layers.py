"""Reading the traced graph: which layer a node belongs to, which parameter it reads, which shape it has."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from .model import Model

STORED_AS = ("_codes", "_scale", "_zero_point")
"""what the quantizer appends to a parameter's name for the tensors that replace it"""


def op(node: Node) -> str:
    """The ATen op without its overload, e.g. 'aten.conv2d' or 'planish.quantize'; '' for a node that is not a call."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return str(node.target).rpartition(".")[0]


def parameter(node: object) -> str | None:
    """Name of the parameter whose value `node` is, also when a dequantize stands between; None when it is not one."""
    while isinstance(node, Node):
        if node.op == "get_attr":
            name = str(node.target)
            for suffix in STORED_AS:
                name = name.removesuffix(suffix)
            return name
        if op(node) not in ("planish.dequantize", "aten.detach", "aten.detach_", "aten.lift_fresh_copy"):
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
    for arg in tree_leaves(node.args[1:]):
        name = parameter(arg)
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


class _Shapes(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.found[n] = tuple(value.shape)
        return value


def shapes(model: Model, batch: int = 1) -> dict[Node, tuple[int, ...]]:
    """Shape of every tensor of the graph for `batch` samples, found without computing values.

    A model that fixes its batch is taken with its own. Nodes that give no single tensor are absent.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        run = _Shapes(model.graph)
        run.run(*(mode.from_tensor(x) for x in model.example(batch)))
    return run.found
