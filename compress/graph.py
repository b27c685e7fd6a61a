"""Small questions and edits that every pass asks of a traced graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node


def read(module: GraphModule, node: Any) -> torch.Tensor:
    """The tensor that a get_attr node stands for, detached."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()


def is_constant(node: Any) -> bool:
    """Whether the node is a parameter or buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def layer_of(node: Node) -> str:
    """The layer's name as the user knows it: the owner of its weight (`layer1.0.conv1`), else the node's own name."""
    for arg in node.args[1:]:
        if isinstance(arg, Node) and arg.op == "get_attr":
            owner, _, _leaf = str(arg.target).rpartition(".")
            return owner or arg.name
        if isinstance(arg, Node) and arg.args and is_constant(arg.args[0]):  # a dequantized weight
            return str(arg.args[0].target).rpartition(".")[0] or arg.name
    return node.name


def set_parameter(module: GraphModule, name: str, value: torch.Tensor) -> Node:
    """Store a trainable parameter under a dotted name and return a new get_attr node for it (at the insert point)."""
    _owner(module, name).register_parameter(name.rpartition(".")[2], torch.nn.Parameter(value.contiguous()))
    return _attribute(module, name, value)


def set_buffer(module: GraphModule, name: str, value: torch.Tensor) -> Node:
    """Store a constant tensor under a dotted name and return a new get_attr node for it (at the insert point)."""
    _owner(module, name).register_buffer(name.rpartition(".")[2], value.contiguous())
    return _attribute(module, name, value)


def _owner(module: GraphModule, name: str) -> torch.nn.Module:
    owner: torch.nn.Module = module
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if leaf in owner._parameters:
        del owner._parameters[leaf]
    if leaf in owner._buffers:
        del owner._buffers[leaf]
    return owner


def _attribute(module: GraphModule, name: str, value: torch.Tensor) -> Node:
    node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node
