"""How each ATen op carries channel units from its inputs to its output: one rule per kind of op.

A rule is told the op's node, binds the parameters that run along channels, unites units that the op ties together,
notes which constants must be rewritten after removal, and returns the units of the output (None: not followed).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from .. import layers
from .dependency import Count, Dependencies, Track, Tracked

Rule = Callable[[Dependencies, Node], Tracked]
aten = torch.ops.aten


def find(node: Node) -> Rule | None:
    """The rule for a call, None when there is none."""
    if node.target is operator.getitem:
        return _getitem
    name = layers.op(node)
    return RULES.get(name.removeprefix("aten.").rstrip("_")) if name.startswith("aten.") else _no_tensor(node)


def _no_tensor(node: Node) -> Rule | None:
    """Arithmetic on sizes touches no channels."""
    return _nothing if getattr(node.target, "__module__", "") in ("_operator", "math") else None


def _source(d: Dependencies, node: Node) -> Track | None:
    """Units of the first argument, when it is one tensor."""
    tracked = d.tracks.get(node.args[0]) if isinstance(node.args[0], Node) else None
    return tracked if isinstance(tracked, Track) else None


def _names(node: Node) -> list[str]:
    """Names of the op's arguments."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return [a.name for a in node.target._schema.arguments]


def _rank(d: Dependencies, node: object) -> int:
    assert isinstance(node, Node)
    return len(d.shapes[node])


def _give_up(d: Dependencies, node: Node, why: str) -> None:
    for source in node.all_input_nodes:
        d.protect_node(source, f"{why} at '{node.name}' ({layers.op(node)})")


def _same(d: Dependencies, node: Node) -> Tracked:
    """Element-wise op of one tensor; with a second tensor (clamp, pow) its channels are tied too."""
    tensors = [a for a in node.all_input_nodes if a in d.shapes]
    return _source(d, node) if len(tensors) == 1 else _elementwise(d, node)


def _nothing(d: Dependencies, node: Node) -> Tracked:
    """Reads a size, or checks one that pruning does not change."""
    return None


def _assertion(d: Dependencies, node: Node) -> Tracked:
    """A recorded check of a tensor's dtype or device; one of its size cannot be kept."""
    if layers.argument(node, "size") is not None or layers.argument(node, "stride") is not None:
        _give_up(d, node, "channels are of a size that the program asserts")
    return None


# --- layers with weights ---------------------------------------------------------------------------------------------


def _convolution(spatial: int, transposed: bool) -> Rule:
    """Convolution with weight (out, in // groups, *kernel); transposed: (in, out // groups, *kernel)."""

    def rule(d: Dependencies, node: Node) -> Tracked:
        source, weight, bias = (layers.argument(node, n) for n in ("input", "weight", "bias"))
        groups = layers.argument(node, "groups")
        axis = _rank(d, source) - spatial - 1
        inputs = d.along(source, axis)
        outputs = d.new(d.shapes[node][axis])
        if not (isinstance(weight, Node) and weight.op == "get_attr") or (transposed and groups > 1):
            _give_up(d, node, "channels meet a weight that is computed, or a grouped transposed convolution,")
            d.protect(outputs, f"made by '{node.name}', whose weight is not followed")
            return Track(axis, outputs)
        depthwise = groups > 1 and groups == len(inputs)
        if depthwise:
            each = len(outputs) // groups  # output channels of one input channel
            d.unite(outputs, [u for u in inputs for _ in range(each)])
            d.rewrites.append(lambda count: layers.set_argument(node, "groups", count(inputs)))
        elif groups > 1:
            # The groups stay equal in size: the k-th channel of every group goes or stays with the first group's.
            inputs = _tie(d, inputs, groups)
            _tie(d, outputs, groups)
        d.bind(node, weight, 1 if transposed else 0, outputs)
        if not depthwise:
            incoming = 0 if transposed else 1
            d.bind(node, weight, incoming, inputs)
            d.consumers.add((str(weight.target), incoming))
        if bias is not None and not d.bind(node, bias, 0, outputs):
            d.protect(outputs, f"made by '{node.name}', whose bias is not a parameter")
        return Track(axis, outputs)

    return rule


def _tie(d: Dependencies, units: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Unite the k-th unit of every group; the first group's units are returned."""
    size = len(units) // groups
    for start in range(size, len(units), size):
        d.unite(units[:size], units[start : start + size])
    return units[:size]


def _linear(d: Dependencies, node: Node) -> Tracked:
    """Linear with weight (out, in), on the last dimension."""
    source, weight, bias = (layers.argument(node, n) for n in ("input", "weight", "bias"))
    axis = _rank(d, source) - 1
    inputs, outputs = d.along(source, axis), d.new(d.shapes[node][axis])
    if not d.bind(node, weight, 0, outputs):
        _give_up(d, node, "channels meet a weight that is computed")
        d.protect(outputs, f"made by '{node.name}', whose weight is not followed")
        return Track(axis, outputs)
    d.bind(node, weight, 1, inputs)
    d.consumers.add((str(weight.target), 1))
    if bias is not None and not d.bind(node, bias, 0, outputs):
        d.protect(outputs, f"made by '{node.name}', whose bias is not a parameter")
    return Track(axis, outputs)


def _channel_norm(d: Dependencies, node: Node) -> Tracked:
    """Batch or instance norm: every channel by itself, four vectors (channels,)."""
    source = layers.argument(node, "input")
    units = d.along(source, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = layers.argument(node, name)
        if vector is not None and not d.bind(node, vector, 0, units):
            d.protect(units, f"meets a computed {name} at '{node.name}'")
    return Track(1, units)


def _prelu(d: Dependencies, node: Node) -> Tracked:
    track, slope = _source(d, node), layers.argument(node, "weight")
    if track is None or d.shapes[slope] == (1,):
        return track
    if track.axis != 1 or not d.bind(node, slope, 0, track.units):
        d.protect(track.units, f"meets a slope that is not followed at '{node.name}'")
    return track


# --- several tensors -------------------------------------------------------------------------------------------------


def _elementwise(d: Dependencies, node: Node) -> Tracked:
    """Sum, product, ... of tensors with broadcasting: channels at one position are one unit."""
    rank = _rank(d, node)
    operands = [a for a in node.args if isinstance(a, Node) and a in d.shapes]
    tracks: dict[Node, Track] = {}
    for operand in operands:
        tracked = d.tracks.get(operand)
        if isinstance(tracked, Track):
            tracks[operand] = tracked
    axes = {t.axis + rank - _rank(d, o) for o, t in tracks.items()}
    if not axes:
        return None
    if len(axes) > 1:
        _give_up(d, node, "channels of one tensor meet another dimension of a second tensor")
        return None
    axis = axes.pop()
    full = [t.units for t in tracks.values() if len(t.units) == d.shapes[node][axis]]
    if not full or any(len(t.units) not in (1, len(full[0])) for t in tracks.values()):
        _give_up(d, node, "one channel is broadcast to many")
        return None
    units = full[0]
    for operand in operands:
        own = axis - rank + _rank(d, operand)
        size = d.shapes[operand][own] if own >= 0 else 1
        if operand in tracks and size == len(units):
            d.unite(units, tracks[operand].units)
        elif operand in tracks:
            d.protect(tracks[operand].units, f"is broadcast to many channels at '{node.name}'")
        elif size > 1 and not d.bind(node, operand, own, units):
            d.protect(units, f"meets '{operand.name}', which has a fixed number of channels, at '{node.name}'")
        elif size == 1 and operand.op == "get_attr":
            d._accounted.add((node, str(operand.target)))
    return Track(axis, units)


def _cat(d: Dependencies, node: Node) -> Tracked:
    parts: list[Node] = layers.argument(node, "tensors")
    rank = _rank(d, node)
    dim = layers.argument(node, "dim") % rank
    tracks = [t for t in (d.tracks.get(p) for p in parts) if isinstance(t, Track)]
    axes = {t.axis for t in tracks}
    if len(axes) != 1:
        if axes:
            _give_up(d, node, "channels along different dimensions are concatenated")
        return None
    axis = axes.pop()
    if axis == dim:
        return Track(axis, tuple(u for p in parts for u in d.along(p, axis)))
    units = [d.along(p, axis) for p in parts]
    for other in units[1:]:
        d.unite(units[0], other)
    return Track(axis, units[0])


def _split(d: Dependencies, node: Node) -> Tracked:
    """chunk, split: afterwards always written with the sizes that remain."""
    track = _source(d, node)
    if track is None:
        return None
    source = node.args[0]
    dim = layers.argument(node, "dim") % _rank(d, source)
    pieces = sorted((int(u.args[1]), u) for u in node.users if u.target is operator.getitem)  # pyright: ignore[reportArgumentType]
    if dim != track.axis:
        return [track] * (1 + max((i for i, _ in pieces), default=-1))
    sizes = _split_sizes(node, len(track.units))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [track.units[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def rewrite(count: Count) -> None:
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (source, [count(p) for p in parts], dim), {}

    d.rewrites.append(rewrite)
    return [Track(dim, p) for p in parts]


def _split_sizes(node: Node, total: int) -> list[int]:
    if node.target is aten.chunk.default:
        step = -(-total // layers.argument(node, "chunks"))
    elif node.target is aten.split_with_sizes.default or node.target is aten.split.sizes:
        return list(node.args[1])  # pyright: ignore[reportArgumentType]
    else:
        step = layers.argument(node, "split_size")
    return [min(step, total - start) for start in range(0, total, step)]


def _getitem(d: Dependencies, node: Node) -> Tracked:
    tracked = d.tracks.get(node.args[0]) if isinstance(node.args[0], Node) else None
    if isinstance(tracked, Sequence):
        return tracked[int(node.args[1])]  # pyright: ignore[reportArgumentType]
    _give_up(d, node, "channels are in one of several results")
    return None


# --- shape ------------------------------------------------------------------------------------------------------------


def _reshape(size: str | None) -> Rule:
    """view, reshape, flatten, squeeze, ...: the order of elements stays. `size` is the argument that names the new shape.

    With S elements after the channel dimension (C channels), the element at flat position f belongs to channel
    (f // S) mod C. A dimension of the result (D long, T elements after it) follows channels when that channel is a
    function of its index alone: T divides S, and S*C divides D*T. This covers plain copies, channels repeated by a
    flatten of (channels, height, width), and tiled ones of (height, width, channels).
    """

    def rule(d: Dependencies, node: Node) -> Tracked:
        track = _source(d, node)
        if track is None:
            return None
        if size is not None and size not in _names(node):
            _give_up(d, node, "channels are reinterpreted")
            return None
        before, after = d.shapes[node.args[0]], d.shapes[node]  # pyright: ignore[reportArgumentType]
        channels, inner = len(track.units), prod(before[track.axis + 1 :])
        for axis, length in enumerate(after):
            rest = prod(after[axis + 1 :])
            if inner % rest or (length * rest) % (inner * channels):
                continue
            units = tuple(track.units[(i * rest // inner) % channels] for i in range(length))
            if size is not None and not _follow_size(d, node, size, axis, units):
                _give_up(d, node, "channels are in a size that the program computes")
                return None
            return Track(axis, units)
        _give_up(d, node, "channels are split into several dimensions")
        return None

    return rule


def _follow_size(d: Dependencies, node: Node, argument: str, axis: int, units: tuple[int, ...]) -> bool:
    """Note that entry `axis` of a size argument becomes the number of units left; False when it is not a plain number."""
    given = list(layers.argument(node, argument))[axis]
    if isinstance(given, Node):
        return False
    if given != -1:

        def rewrite(count: Count) -> None:
            sizes: list[Any] = list(layers.argument(node, argument))
            sizes[axis] = count(units)
            layers.set_argument(node, argument, sizes)

        d.rewrites.append(rewrite)
    return True


def _permute(d: Dependencies, node: Node) -> Tracked:
    track = _source(d, node)
    if track is None:
        return None
    rank = _rank(d, node)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [i % rank for i in layers.argument(node, "dims")]
    elif node.target is aten.transpose.int:
        first, second = (layers.argument(node, n) % rank for n in ("dim0", "dim1"))
        order[first], order[second] = second, first
    else:  # t
        order.reverse()
    return Track(order.index(track.axis), track.units)


def _expand(d: Dependencies, node: Node) -> Tracked:
    track = _source(d, node)
    if track is None:
        return None
    axis = track.axis + _rank(d, node) - _rank(d, node.args[0])
    if d.shapes[node][axis] != len(track.units):
        _give_up(d, node, "one channel is broadcast to many")
        return None
    if not _follow_size(d, node, "size", axis, track.units):
        _give_up(d, node, "channels are in a size that the program computes")
        return None
    return Track(axis, track.units)


def _slice(d: Dependencies, node: Node) -> Tracked:
    track = _source(d, node)
    if track is None or layers.argument(node, "dim") % _rank(d, node) != track.axis:
        return track
    start, end, step = (layers.argument(node, n) for n in ("start", "end", "step"))
    if any(isinstance(v, Node) for v in (start, end, step)) or step != 1:
        _give_up(d, node, "channels are picked with a step or a computed bound")
        return None
    first, last, _ = slice(start, end).indices(len(track.units))
    before, picked = track.units[:first], track.units[first:last]

    def rewrite(count: Count) -> None:
        layers.set_argument(node, "start", count(before))
        layers.set_argument(node, "end", count(before) + count(picked))

    d.rewrites.append(rewrite)
    return Track(track.axis, picked)


def _pad(d: Dependencies, node: Node) -> Tracked:
    """Padding of the channel dimension adds channels of its own, which nothing but their sum's partners tie."""
    track = _source(d, node)
    if track is None:
        return None
    amounts: list[Any] = list(layers.argument(node, "pad"))
    place = 2 * (_rank(d, node) - 1 - track.axis)  # pairs run from the last dimension to the first
    pair = amounts[place : place + 2]
    if not any(pair):
        return track
    constant = node.target is aten.constant_pad_nd.default or layers.argument(node, "mode") == "constant"
    if not constant or any(isinstance(p, Node) or p < 0 for p in pair):
        _give_up(d, node, "channels are padded with other channels, or cut")
        return None
    before, after = d.new(pair[0]), d.new(pair[1])

    def rewrite(count: Count) -> None:
        sizes: list[Any] = list(layers.argument(node, "pad"))
        sizes[place : place + 2] = [count(before), count(after)]
        layers.set_argument(node, "pad", sizes)

    d.rewrites.append(rewrite)
    return Track(track.axis, before + track.units + after)


# --- reductions -------------------------------------------------------------------------------------------------------


def _pool(spatial: int) -> Rule:
    """Pooling and resizing of the last `spatial` dimensions."""

    def rule(d: Dependencies, node: Node) -> Tracked:
        track = _source(d, node)
        if track is not None and track.axis >= _rank(d, node.args[0]) - spatial:
            _give_up(d, node, "channels lie along a pooled dimension")
            return None
        return track

    return rule


def _reduce(d: Dependencies, node: Node) -> Tracked:
    """mean, sum, amax over dimensions."""
    track = _source(d, node)
    if track is None:
        return None
    rank = _rank(d, node.args[0])
    if "dim" not in _names(node):
        _give_up(d, node, "channels are reduced")
        return None
    given = layers.argument(node, "dim")
    dims = [i % rank for i in ([given] if isinstance(given, int) else given or range(rank))]
    if track.axis in dims:
        _give_up(d, node, "channels are reduced")
        return None
    gone = 0 if layers.argument(node, "keepdim") else sum(i < track.axis for i in dims)
    return Track(track.axis - gone, track.units)


def _softmax(d: Dependencies, node: Node) -> Tracked:
    track = _source(d, node)
    if track is not None and layers.argument(node, "dim") % _rank(d, node) == track.axis:
        _give_up(d, node, "channels are normalized against each other")
        return None
    return track


RULES: dict[str, Rule] = {
    **{f"conv{n}d": _convolution(n, transposed=False) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(n, transposed=True) for n in (1, 2, 3)},
    "linear": _linear,
    "batch_norm": _channel_norm,
    "instance_norm": _channel_norm,
    "prelu": _prelu,
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), _elementwise),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _split),
    **dict.fromkeys(("view", "_unsafe_view"), _reshape("size")),
    "reshape": _reshape("shape"),
    **dict.fromkeys(("flatten", "squeeze", "unsqueeze"), _reshape(None)),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    "expand": _expand,
    "slice": _slice,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **{f"{kind}_pool{n}d": _pool(n) for n in (1, 2, 3) for kind in ("avg", "max", "adaptive_avg")},
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest_exact2d"), _pool(2)),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(
        [
            "relu",
            "relu6",
            "hardtanh",
            "hardswish",
            "hardsigmoid",
            "sigmoid",
            "tanh",
            "silu",
            "gelu",
            "elu",
            "celu",
            "selu",
            "mish",
            "softplus",
            "leaky_relu",
            "clamp",
            "clamp_min",
            "clamp_max",
            "neg",
            "abs",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "square",
            "pow",
            "dropout",
            "feature_dropout",
            "alpha_dropout",
            "clone",
            "contiguous",
            "detach",
            "alias",
            "to",
            "lift_fresh_copy",
        ],
        _same,
    ),
    **dict.fromkeys(("sym_size", "sym_numel", "_assert_scalar", "sym_constrain_range"), _nothing),
    "_assert_tensor_metadata": _assertion,
}
