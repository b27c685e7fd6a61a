"""Mixed precision: activations and weights of a float32 graph in 16 bits, where that costs no more than a rounding.

Every op is one of four kinds, much as PyTorch's autocast sorts them:

    products    linear, matmul, convolution, attention, look-ups    16 bits in and out; sums inside are float32
    followers   elementwise, moving, norms                          16 bits where an operand that is no constant has 16 bits
    references  planish ops without a GPU form                      float32 in; their result is rounded to 16 bits
    the rest    softmax, exp, mean, positions, tables               float32 in and out

The graph's inputs and outputs keep their types. A cast stands where the type changes, one for each tensor; constants are converted here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves

from ..compress import layers
from ..compress.model import Model

aten = torch.ops.aten
PRODUCTS = frozenset(
    f"aten.{n}"
    for n in (
        *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "embedding"),
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"),
    )
)
FOLLOWERS = frozenset(
    f"aten.{n}"
    for n in (
        *("add", "sub", "rsub", "mul", "div", "neg", "abs", "maximum", "minimum", "clamp", "clamp_min", "clamp_max"),
        *("relu", "relu_", "relu6", "gelu", "silu", "silu_", "sigmoid", "tanh", "hardtanh", "hardtanh_", "hardswish"),
        *(
            "hardsigmoid",
            "leaky_relu",
            "elu",
            "where",
            "masked_fill",
            "cat",
            "stack",
            "view",
            "reshape",
            "_unsafe_view",
        ),
        *("flatten", "unflatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand", "expand_as", "repeat"),
        *(
            "repeat_interleave",
            "slice",
            "select",
            "narrow",
            "index",
            "index_select",
            "gather",
            "split",
            "unbind",
            "chunk",
        ),
        *("split_with_sizes", "contiguous", "clone", "alias", "detach", "dropout", "roll", "flip", "pad", "max_pool2d"),
        *("constant_pad_nd", "avg_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "layer_norm", "rms_norm"),
        *("group_norm", "batch_norm"),
    )
)
"""norms among them: their sums are float32 whatever they read"""
ROUNDINGS = ("planish.kv_cache",)
"""planish ops that round what they read and keep its type"""
CASTS = ("aten._to_copy", "aten.to")
REFERENCES = ("planish.linear", "planish.embedding")
"""how the names of planish ops begin whose float32 results join the 16-bit activations"""
Types = dict[Node, tuple[torch.dtype, tuple[int, ...]]]
"""type and shape of a node's tensor"""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def described(model: Model, example: Sequence[torch.Tensor] = ()) -> Types:
    """Type and shape of every tensor of the graph for inputs like the example's, else of the declared shapes, found without computing values."""
    return _Seen(model).seen(example or model.example())


class _Seen(layers.Hollow):
    def see(self, value: object) -> object:
        """(type, shape) of a tensor."""
        return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else None


def narrow(model: Model, dtype: torch.dtype, fused: Collection[Node] = ()) -> None:
    """Let the model's graph compute in `dtype` (bfloat16 or float16), in place. `fused`: planish nodes that a GPU form will take."""
    _Narrowing(model, dtype, frozenset(fused)).run()


class _Narrowing:
    """One walk over the graph in its order."""

    def __init__(self, model: Model, dtype: torch.dtype, fused: frozenset[Node]) -> None:
        self.module, self.graph, self.dtype, self.fused = model.graph, model.graph.graph, dtype, fused
        self.before = described(model)
        self.now: dict[Node, torch.dtype] = {}
        """the type of every float so far; of the parts, for a node that gives several"""
        self.casts: dict[tuple[object, torch.dtype], Node] = {}
        output = next(n for n in self.graph.nodes if n.op == "output")
        self.declared = [self.before[n][0] for n in tree_leaves(output.args)]
        self.first = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))

    def run(self) -> None:
        """Visit every node."""
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "get_attr"):
                if node in self.before and self.before[node][0].is_floating_point:
                    self.now[node] = self.before[node][0]
            elif node.op == "call_function":
                self._call(node)
            else:
                self._outputs(node)
        layers.drop_unused(self.module)

    def _call(self, node: Node) -> None:
        kind = layers.op(node)
        floats = [a for a in node.all_input_nodes if a in self.now]
        made = self.before.get(node)
        is_float = made is not None and made[0].is_floating_point
        several = made is None and any(u.target is operator.getitem for u in node.users)
        if node.target is operator.getitem:
            source = node.args[0]
            assert isinstance(source, Node)
            if is_float and source in self.now:
                self.now[node] = self.now[source]
            return
        if (
            kind in CASTS
            and made is not None
            and is_float
            and len(floats) == 1
            and {made[0], self.before[floats[0]][0]} <= set(FLOATS)
        ):
            node.replace_all_uses_with(floats[0])
            self.graph.erase_node(node)
            return
        if is_float:
            node.args = map_aggregate(node.args, self._finite)  # pyright: ignore[reportAttributeAccessIssue]
        if node in self.fused or kind.startswith("planish.gpu_"):
            self._operands(node, [a for a in floats if a.op != "get_attr"], self.dtype)
            self.now[node] = self.dtype
        elif kind in PRODUCTS:
            self._operands(node, floats, self.dtype)
            self.now[node] = self.dtype
        elif (kind in FOLLOWERS or kind in ROUNDINGS) and (is_float or several):
            self._follow(node, kind, floats)
        else:
            self._operands(node, floats, torch.float32)
            if is_float or several:
                self.now[node] = torch.float32 if made is None or made[0] in FLOATS else made[0]
            if is_float and kind.startswith(REFERENCES):
                self._rounded(node)

    def _follow(self, node: Node, kind: str, floats: list[Node]) -> None:
        moving = [a for a in floats if a.op != "get_attr"] or floats
        dtype = self.dtype if any(self.now[a] == self.dtype for a in moving) else torch.float32
        if kind == "aten.batch_norm":  # its statistics keep their type
            self._operands(node, floats[1:], torch.float32)
            floats = floats[:1]
        self._operands(node, floats, dtype)
        if floats:
            self.now[node] = dtype
        elif node in self.before:
            self.now[node] = self.before[node][0]

    def _operands(self, node: Node, floats: list[Node], dtype: torch.dtype) -> None:
        """Let `node` read `floats` in `dtype`; float64 stays what it is."""
        wanted = {a: self._cast(a, dtype) for a in floats if self.now[a] != dtype and self.now[a] in FLOATS}
        if wanted:
            node.args = map_arg(node.args, lambda a: wanted.get(a, a))  # pyright: ignore[reportAttributeAccessIssue]
            node.kwargs = map_arg(node.kwargs, lambda a: wanted.get(a, a))  # pyright: ignore[reportAttributeAccessIssue]

    def _cast(self, source: Node, dtype: torch.dtype) -> Node:
        """The tensor in another type: a converted constant, or a cast behind it."""
        key = (source.target if source.op == "get_attr" else source, dtype)
        if key not in self.casts:
            if source.op == "get_attr":
                made = _converted(self.module, source, dtype)
            else:
                place = self.first if source.op == "placeholder" else source.next
                with self.graph.inserting_before(place):
                    made = self.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
            self.casts[key], self.now[made] = made, dtype
        return self.casts[key]

    def _rounded(self, node: Node) -> None:
        """Let every reader of a reference's result read it in 16 bits."""
        made = self._cast(node, self.dtype)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    def _finite(self, value: Any) -> Any:
        """A literal that 16 bits hold: masks use the least float32."""
        most = torch.finfo(self.dtype).max
        return math.copysign(most, value) if isinstance(value, float) and most < abs(value) < math.inf else value

    def _outputs(self, node: Node) -> None:
        """Every output in the type that it had."""
        leaves = [
            self._cast(leaf, dtype) if leaf in self.now and self.now[leaf] != dtype else leaf
            for leaf, dtype in zip(tree_leaves(node.args), self.declared, strict=True)
        ]
        node.args = (leaves[0],) if isinstance(node.args[0], Node) else (tuple(leaves),)


def _converted(module: GraphModule, source: Node, dtype: torch.dtype) -> Node:
    """A constant in another type under a name of its own, at the graph's beginning."""
    value = layers.read(module, source)
    most = min(torch.finfo(dtype).max, torch.finfo(value.dtype).max)
    value = torch.where(value.isfinite(), value.clamp(-most, most), value).to(dtype)
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        return layers.add_buffer(module, f"{source.target}_{str(dtype).removeprefix('torch.')}", value)
