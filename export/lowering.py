"""From a traced model to ONNX: the form that every export format starts from.

torch.onnx writes the ATen ops; planish::quantize and planish::dequantize become QuantizeLinear and DequantizeLinear. Then a
few exact rewrites bring the graph into the form that runtimes fuse:

- a mean over height and width is GlobalAveragePool, which has an integer kernel where ReduceMean has none;
- an op that only moves or selects values (Slice, Pad, Reshape, Transpose, MaxPool, ...) between a dequantize and a
  quantize with equal parameters runs on the codes themselves;
- a zero pad in front of a convolution is the convolution's own padding;
- quantized weights that are transposed before they are read are stored transposed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxscript import opset21

from ..common.errors import PlanishError
from ..compress.model import Model, output_names
from ..kernels import affine
from . import fused, metadata

OPSET = 21
MOVES = ("Slice", "Pad", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool")


assert affine.LIBRARY  # registers planish::quantize and planish::dequantize, which the table below names


def _quantize(x, scale, zero_point, axis, quant_min, quant_max, dtype):
    return opset21.QuantizeLinear(x, scale, zero_point, axis=axis)


def _dequantize(q, scale, zero_point, axis):
    return opset21.DequantizeLinear(q, scale, zero_point, axis=axis)


def to_onnx(model: Model, lower: bool = True) -> onnx.ModelProto:
    """The model as ONNX (opset 21), dynamic in the dimensions in which the model is; equal models give equal bytes.

    Fused low-bit ops become what their files lower them to; with `lower` False they stay nodes of the domain `planish`. The file's
    metadata (metadata.py) names the inputs that are states and carries what the lowering had to say.

    Raises PlanishError for an op that torch.onnx does not know, naming it.
    """
    _refuse_partial_ranges(model)
    table = {torch.ops.planish.quantize.default: _quantize, torch.ops.planish.dequantize.default: _dequantize}
    table |= fused.translations()
    with _quiet():
        try:
            program = torch.onnx.export(
                model.program(),
                (),
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                custom_translation_table=table,
                input_names=[i.name for i in model.inputs],
                output_names=list(output_names(model)),
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise PlanishError(
                f"'{model.source}' cannot be written as ONNX: {str(cause).strip().splitlines()[0]}"
            ) from error
    assert program is not None
    proto = program.model_proto
    graph = _Graph(proto)
    graph.global_means()
    graph.moves_on_codes()
    graph.pads_into_convolutions()
    graph.transposes_into_weights()
    graph.drop_unused()
    graph.name_nodes()
    _strip(proto, model)
    metadata.put(proto, metadata.STATES, [i.name for i in model.inputs if i.state])
    return lowered(proto) if lower else proto


def lowered(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of `to_onnx(model, lower=False)` in ops that ONNX Runtime has; one without fused ops is returned as it is."""
    if not fused.used(proto):
        return proto
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    notes = fused.lower(made)
    _Graph(made).drop_unused()
    metadata.put(made, metadata.NOTES, notes)
    metadata.put(made, metadata.LOW_BIT, fused.low_bit(proto))
    return made


def _refuse_partial_ranges(model: Model) -> None:
    """QuantizeLinear saturates at the limits of its type: codes of fewer bits need another lowering than this one."""
    for node in model.graph.graph.nodes:
        if node.target is torch.ops.planish.quantize.default:
            low, high, dtype = node.args[4:7]
            limits = torch.iinfo(dtype)
            if (low, high) != (limits.min, limits.max):
                raise PlanishError(f"'{node.name}' quantizes to {low} .. {high}; ONNX has {limits.min} .. {limits.max}")


class _Graph:
    """The rewrites, over an index of who makes and who reads each value."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = proto.graph
        self.constants = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        self._index()

    def _index(self) -> None:
        self.maker = {o: n for n in self.graph.node for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.results = {o.name for o in self.graph.output}

    def _alone(self, value: str) -> onnx.NodeProto | None:
        """The one reader of a value that is no output of the graph."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.results else None

    def _add_constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.graph.initializer.append(numpy_helper.from_array(value, name))
            self.constants[name] = value
        return name

    def global_means(self) -> None:
        """ReduceMean over axes 2 and 3, kept, becomes GlobalAveragePool."""
        for node in self.graph.node:
            if node.op_type != "ReduceMean" or len(node.input) < 2:
                continue
            axes = self.constants.get(node.input[1])
            keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
            if axes is not None and keep and sorted(axes.tolist()) in ([2, 3], [-2, -1]):
                node.op_type = "GlobalAveragePool"
                del node.input[1:]
                del node.attribute[:]

    def moves_on_codes(self) -> None:
        """DequantizeLinear -> move -> QuantizeLinear with equal parameters: the move alone, on codes."""
        for node in list(self.graph.node):
            if node.op_type not in MOVES:
                continue
            before, after = self.maker.get(node.input[0]), self._alone(node.output[0])
            if (
                before is None
                or after is None
                or before.op_type != "DequantizeLinear"
                or after.op_type != "QuantizeLinear"
            ):
                continue
            if list(before.input[1:3]) != list(after.input[1:3]):
                continue
            zero = self.constants[before.input[2]]
            if zero.ndim:
                continue
            if node.op_type == "Pad":
                name = self._add_constant(f"{before.input[2]}.pad", zero)
                rest = list(node.input[3:])
                del node.input[2:]
                node.input.extend([name, *rest])
            node.input[0] = before.input[0]
            node.output[0] = after.output[0]
            self.graph.node.remove(after)
            self._index()

    def pads_into_convolutions(self) -> None:
        """Pad with zeros over the spatial dimensions, read by one Conv, becomes the Conv's pads."""
        for pad in list(self.graph.node):
            if pad.op_type != "Pad" or any(a.name == "mode" and a.s != b"constant" for a in pad.attribute):
                continue
            amounts = self.constants.get(pad.input[1])
            fill = self.constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
            conv = self._alone(pad.output[0])
            if amounts is None or fill is None or np.any(fill != 0) or conv is None or conv.op_type != "Conv":
                continue
            maker = self.maker.get(pad.input[0])
            half = len(amounts) // 2
            if (maker is not None and maker.op_type == "QuantizeLinear") or any(amounts[[0, 1, half, half + 1]]) or amounts.min() < 0:  # fmt: skip
                continue
            attribute = next((a for a in conv.attribute if a.name == "pads"), None)
            own = list(attribute.ints) if attribute is not None else [0] * (2 * (half - 2))
            added = [*amounts[2:half].tolist(), *amounts[half + 2 :].tolist()]
            if attribute is not None:
                conv.attribute.remove(attribute)
            conv.attribute.append(helper.make_attribute("pads", [a + b for a, b in zip(own, added, strict=True)]))
            conv.input[0] = pad.input[0]
            self.graph.node.remove(pad)
            self._index()

    def transposes_into_weights(self) -> None:
        """DequantizeLinear of constant codes -> Transpose: the codes are stored transposed, and what multiplies reads them directly."""
        for node in list(self.graph.node):
            source = self.maker.get(node.input[0]) if node.op_type == "Transpose" else None
            if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in self.constants:
                continue
            codes = self.constants[source.input[0]]
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(reversed(range(codes.ndim))))
            attributes = {a.name: helper.get_attribute_value(a) for a in source.attribute}
            axis = attributes.get("axis", 1) % codes.ndim
            layer, _, what = source.input[0].rpartition(".")
            name = f"{layer}.{what}_transposed" if layer else f"{what}_transposed"
            self._add_constant(name, np.ascontiguousarray(codes.transpose(order)))
            attributes["axis"] = order.index(axis)
            inputs = [name, *source.input[1:]]
            place = list(self.graph.node).index(node)
            made = helper.make_node("DequantizeLinear", inputs, list(node.output), name=node.name, **attributes)
            self.graph.node.remove(node)
            self.graph.node.insert(place, made)
            self._index()

    def drop_unused(self) -> None:
        """Nodes and initializers that nothing reads any more."""
        changed = True
        while changed:
            self._index()
            dead = [n for n in self.graph.node if not any(o in self.readers or o in self.results for o in n.output)]
            for node in dead:
                self.graph.node.remove(node)
            changed = bool(dead)
        unused = [i for i in self.graph.initializer if i.name not in self.readers and i.name not in self.results]
        for item in unused:
            self.graph.initializer.remove(item)

    def name_nodes(self) -> None:
        """Call every node that reads a weight by its layer (`layer1.0.conv1`), the others by the value they make."""
        taken: set[str] = set()
        for node in self.graph.node:
            name = self._layer(node) or node.output[0]
            while name in taken:
                name += "_"
            taken.add(name)
            node.name = name

    def _layer(self, node: onnx.NodeProto) -> str | None:
        """The layer whose weight a node reads: as its second input, or anywhere behind the first one in a fused op."""
        for value in node.input[1:] if node.domain == fused.DOMAIN else node.input[1:2]:
            weight = self._stored(value)
            if weight in self.constants and self.constants[weight].ndim > 1 and "." in weight:
                return weight.rpartition(".")[0]
        return None

    def _stored(self, value: str) -> str:
        """The constant that a value is decoded or converted from; the value itself where there is none."""
        source = self.maker.get(value)
        while source is not None and source.op_type in ("DequantizeLinear", "Cast"):
            value = source.input[0]
            source = self.maker.get(value)
        return value


def _strip(proto: onnx.ModelProto, model: Model) -> None:
    """Remove what says how the file came about: source lines of the user's code, trace metadata, stale shapes."""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    proto.graph.doc_string = ""
    symbols: dict[str, str] = {}
    for value, item in zip(proto.graph.input, model.inputs, strict=True):
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                symbols[dim.dim_param] = "batch" if index == 0 else item.dim(index) or dim.dim_param
    for value in [*proto.graph.input, *proto.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]
    proto.graph.name = "main"
    proto.producer_name = "planish"
    proto.producer_version = ""
    for item in [*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx's remarks about packages that planish does not use off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
