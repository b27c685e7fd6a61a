"""One-dimensional networks as two-dimensional ones of height 1, so that every kernel for images takes them.

A tensor (1, channels, length) that a convolution or pool reads or makes becomes (1, channels, 1, length), and so do the tensors that
only elementwise ops keep apart from one. In memory that is length x channels, channels innermost. Where such a region begins or
ends stands a transpose, spelled so that it costs nothing when the model itself transposes there or when it is the model's border:

    (1, c, l) -> Transpose (1, l, c) -> Reshape (1, 1, l, c) -> Transpose (1, c, 1, l)      the last two move no byte

A mean over the length of (1, channels, length), or over the tokens of (1, tokens, channels), is a mean over an image's pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ..kernels.lookup import Lookup
from . import fold
from .fold import Array, Folded

WINDOWS = ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool")
"""ops that make an image of what they read"""
ELEMENTWISE = (
    *("QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "Add", "Mul", "Identity", "Dropout"),
    *("Concat", "Slice", "Pad"),
    *Lookup.onnx_types,
)
"""ops that read and make images where one of their tensors is one"""
MEAN = "ReduceMean"


def widen(folded: Folded) -> Folded:
    """The same function with two-dimensional convolutions and pools only; a graph without one-dimensional ones as it is."""
    images = _images(folded)
    if not images and not any(_token_mean(n, folded) for n in folded.nodes):
        return folded
    return _Widened(folded, images).result()


def _rank(name: str, folded: Folded) -> int:
    return len(folded.shapes.get(name, ()))


def _images(folded: Folded) -> set[str]:
    """The three-dimensional activations that become four-dimensional."""
    fixed = fold.fixed(folded)

    def activations(names: Iterable[str]) -> list[str]:
        return [n for n in names if n and n not in fixed and _rank(n, folded) == 3]

    found: set[str] = set()
    for node in folded.nodes:
        if node.op_type in WINDOWS and _rank(node.input[0], folded) == 3:
            found.update(activations([node.input[0], node.output[0]]))
        elif _length_mean(node, folded):
            found.update(activations([node.input[0]]))
    while True:
        before = len(found)
        for node in folded.nodes:
            members = activations([*node.input, *node.output]) if node.op_type in ELEMENTWISE else []
            if found.intersection(members):
                found.update(members)
        if len(found) == before:
            return found


def _mean_axes(node: onnx.NodeProto, folded: Folded) -> list[int] | None:
    """Axes of a ReduceMean of a three-dimensional tensor, None for any other node."""
    if node.op_type != MEAN or _rank(node.input[0], folded) != 3:
        return None
    given = folded.constants.get(node.input[1]) if len(node.input) > 1 else fold.attributes(node).get("axes")
    return None if given is None else sorted(int(a) % 3 for a in np.atleast_1d(np.asarray(given)))


def _length_mean(node: onnx.NodeProto, folded: Folded) -> bool:
    return _mean_axes(node, folded) == [2]


def _token_mean(node: onnx.NodeProto, folded: Folded) -> bool:
    return _mean_axes(node, folded) == [1]


def _view(node: onnx.NodeProto, folded: Folded) -> bool:
    """(1, c, l) to (1, c, 1, l) or back, spelled by the model itself."""
    if node.op_type not in ("Reshape", "Unsqueeze", "Squeeze"):
        return False
    small, large = sorted((folded.shapes[n] for n in (node.input[0], node.output[0])), key=len)
    return len(small) == 3 and large == (*small[:2], 1, small[2])


class _Widened:
    def __init__(self, folded: Folded, images: set[str]) -> None:
        self.folded, self.images = folded, images
        self.fixed = fold.fixed(folded)
        self.maker = {o: n for n in folded.nodes for o in n.output}
        self.constants = dict(folded.constants)
        self.shapes: dict[str, tuple[int, ...]] = dict(folded.shapes)
        self.nodes: list[onnx.NodeProto] = []
        inner = {o for n in folded.nodes if self._inside(n) for o in n.output if o in images}
        outer = {i for n in folded.nodes if not self._inside(n) for i in n.input} | {v.name for v in folded.outputs}
        self.entering = images - inner
        """images that an op outside of the region, or the model's input, makes with three dimensions"""
        self.leaving = inner & outer
        """images that are read with three dimensions too"""
        self.name = {t: f"{t}.image" if t in self.entering | self.leaving else t for t in images}

    def _inside(self, node: onnx.NodeProto) -> bool:
        """Whether a node works on images."""
        known = node.op_type in (*WINDOWS, *ELEMENTWISE)
        if not known and not _length_mean(node, self.folded) and not _view(node, self.folded):
            return False
        return any(n in self.images for n in [*node.input, *node.output])

    def result(self) -> Folded:
        for value in self.folded.inputs:
            self._enter(value.name)
        for node in self.folded.nodes:
            if _token_mean(node, self.folded):
                self._mean(node, self._tokens(node.input[0]), self.shapes[node.output[0]])
                self._enter(node.output[0])
            elif _length_mean(node, self.folded):
                self._length_mean(node)
            elif self._inside(node):
                self._image_node(node)
                for name in node.output:
                    if name in self.leaving:
                        self._leave(name)
            else:
                self.nodes.append(node)
                for name in node.output:
                    self._enter(name)
        return replace(self.folded, nodes=tuple(self.nodes), constants=self.constants, shapes=self.shapes)

    # --- borders

    def _add(
        self, kind: str, inputs: list[str], output: str, shape: tuple[int, ...] | None = None, **attributes: Any
    ) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        if shape is not None:
            self.shapes[output] = shape
        return output

    def _constant(self, name: str, value: Array) -> str:
        self.constants[name] = value
        self.shapes[name] = value.shape
        return name

    def _enter(self, name: str) -> None:
        """(1, c, l) to (1, c, 1, l)."""
        if name not in self.entering:
            return
        _, c, length = self.shapes[name]
        rows = self._add("Transpose", [name], f"{name}.rows", (1, length, c), perm=[0, 2, 1])
        self._as_image(rows, self.name[name])

    def _as_image(self, name: str, image: str) -> str:
        """(1, l, c) to (1, c, 1, l), the same bytes."""
        _, length, c = self.shapes[name]
        shape = self._constant(f"{image}.shape", np.array([1, 1, length, c], np.int64))
        lines = self._add("Reshape", [name, shape], f"{image}.lines", (1, 1, length, c))
        return self._add("Transpose", [lines], image, (1, c, 1, length), perm=[0, 3, 1, 2])

    def _leave(self, name: str) -> None:
        """(1, c, 1, l) to (1, c, l)."""
        image = self.name[name]
        _, c, length = self.folded.shapes[name]
        lines = self._add("Transpose", [image], f"{name}.lines", (1, 1, length, c), perm=[0, 2, 3, 1])
        shape = self._constant(f"{name}.shape", np.array([1, length, c], np.int64))
        rows = self._add("Reshape", [lines, shape], f"{name}.rows", (1, length, c))
        self._add("Transpose", [rows], name, (1, c, length), perm=[0, 2, 1])

    def _tokens(self, name: str) -> str:
        """(1, tokens, channels) as an image whose pixels are the tokens."""
        image = f"{name}.tokens"
        return image if image in self.shapes else self._as_image(name, image)

    def _length_mean(self, node: onnx.NodeProto) -> None:
        output, image = node.output[0], self.name[node.input[0]]
        if output not in self.images:
            self._mean(node, image, self.shapes[output])
            return
        made = helper.make_node(MEAN, [image, self._pixels(output)], [self.name[output]], name=fold.label(node))
        self.nodes.append(made)
        self.shapes[self.name[output]] = (1, self.shapes[image][1], 1, 1)
        if output in self.leaving:
            self._leave(output)

    def _mean(self, node: onnx.NodeProto, image: str, wanted: tuple[int, ...]) -> None:
        """ReduceMean of an image over its pixels, in the shape `wanted`."""
        output = node.output[0]
        pooled, shape = f"{output}.pooled", self._constant(f"{output}.shape", np.array(wanted, np.int64))
        self.nodes.append(helper.make_node(MEAN, [image, self._pixels(output)], [pooled], name=fold.label(node)))
        self.shapes[pooled] = (1, self.shapes[image][1], 1, 1)
        self._add("Reshape", [pooled, shape], output)

    def _pixels(self, output: str) -> str:
        return self._constant(f"{output}.axes", np.array([2, 3], np.int64))

    # --- nodes on images

    def _image_node(self, node: onnx.NodeProto) -> None:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for index, name in enumerate(node.output):
            if name in self.images:
                made.output[index] = self.name[name]
                _, c, length = self.folded.shapes[name]
                self.shapes[self.name[name]] = (1, c, 1, length)
        for index, name in enumerate(node.input):
            if name in self.images:
                made.input[index] = self.name[name]
            elif name in self.fixed and self._is_operand(node, index):
                made.input[index] = self._fixed_image(name)
        if _view(node, self.folded):
            made = helper.make_node("Identity", made.input[:1], made.output[:1], name=node.name)
        self._change(made)
        self.nodes.append(made)

    def _is_operand(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether an input that is constant lies along an image, as a bias or a bound does not."""
        if node.op_type == "Conv":
            return index == 1
        return node.op_type in ("Add", "Mul", "Concat") and self.folded.shapes.get(node.input[index], (1,)) != ()

    def _fixed_image(self, name: str) -> str:
        """A constant with one more dimension, before the last: (out, in, k) to (out, in, 1, k); also behind its dequantization."""
        made = f"{name}.image"
        if made in self.shapes:
            return made
        maker = self.maker.get(name)
        shape = self.folded.shapes[name]
        lead = (1,) * max(0, 3 - len(shape)) + shape
        wanted = (*lead[:-1], 1, lead[-1])
        if name in self.constants:
            return self._constant(made, self.constants[name].reshape(wanted))
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self.constants:
            codes = self._constant(f"{maker.input[0]}.image", self.constants[maker.input[0]].reshape(wanted))
            copied = onnx.NodeProto()
            copied.CopyFrom(maker)
            copied.input[0], copied.output[0] = codes, made
            axis = int(fold.attributes(maker).get("axis", 1)) % max(len(shape), 1) + len(lead) - len(shape)
            fold.set_attribute(copied, "axis", axis + 1 if axis == 2 else axis)
            self.nodes.append(copied)
            self.shapes[made] = wanted
            return made
        target = self._constant(f"{made}.shape", np.array(wanted, np.int64))
        return self._add("Reshape", [name, target], made, wanted)

    def _axes(self, node: onnx.NodeProto, sizes: int) -> None:
        """Input 3 of a Slice or Pad names its axes; left out they are the first ones, of which there are `sizes`."""
        given = self.constants[node.input[3]] if len(node.input) > 3 and node.input[3] else np.arange(sizes)
        while len(node.input) < 4:
            node.input.append("")
        moved = np.array([_axis(a) for a in given.tolist()], np.int64)
        node.input[3] = self._constant(f"{node.output[0]}.axes", moved)

    def _change(self, node: onnx.NodeProto) -> None:
        """What else than its tensors changes about a node."""
        given = fold.attributes(node)
        if node.op_type in WINDOWS:
            for key in ("kernel_shape", "strides", "dilations"):
                if key in given:
                    fold.set_attribute(node, key, [1, *given[key]])
            if "pads" in given:
                fold.set_attribute(node, "pads", [0, given["pads"][0], 0, given["pads"][1]])
        elif node.op_type == "Concat":
            fold.set_attribute(node, "axis", _axis(given["axis"]))
        elif node.op_type == "Slice" and node.input[1] in self.constants:
            self._axes(node, self.constants[node.input[1]].size)
        elif node.op_type == "Pad" and node.input[1] in self.constants:
            self._axes(node, self.constants[node.input[1]].size // 2)


def _axis(axis: int) -> int:
    """An axis of (1, c, l) as one of (1, c, 1, l)."""
    return 3 if axis % 3 == 2 else axis % 3
