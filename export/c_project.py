"""The generated C project: identifiers, layer structs and memory, ready for the templates in c_templates/."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import kernels
from ..kernels import layout
from ..kernels.c import version
from ..kernels.op import Call, Node, Tensor
from . import memory
from .graph import Array, Graph, Port

KERNELS = Path(kernels.__file__).parent / "c"
TYPES = {
    "float32": "float",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "int16": "int16_t",
    "uint16": "uint16_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
}
"""C type of an array by numpy dtype"""
RESERVED_WORDS = (
    "auto break case char const continue default do double else enum extern float for goto if inline int long "
    "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile "
    "while asm typeof main bool true false arena planish kernels firmware startup linux unix errno stdin "
    "stdout stderr code value low high layer"
)
RESERVED = frozenset(RESERVED_WORDS.split())
"""identifiers that generated names avoid: C keywords, and what the project itself defines"""
LONGEST = 48


def identifier(text: str, taken: set[str]) -> str:
    """A C identifier for any text, different from all in `taken`, to which it is added."""
    base = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[-LONGEST:].strip("_") or "unnamed"
    if not base[0].isalpha():
        base = f"n_{base}"
    name, count = base, 1
    while name in taken or name in RESERVED or name.startswith(("int8_t", "int16_t", "int32_t", "uint8_t")):
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


@dataclass(frozen=True)
class CArray:
    """A constant array in flash."""

    member: str
    """pointer member of the layer struct"""
    name: str
    type: str
    values: Array
    comment: str

    @property
    def lines(self) -> list[str]:
        """The initializer, at most about 110 characters a line."""
        flat = self.values.reshape(-1)
        items = [number(v) for v in flat] if self.values.dtype.kind == "f" else [str(v) for v in flat.tolist()]
        per_line = max(1, 108 // (max(len(i) for i in items) + 2))
        return [", ".join(items[i : i + per_line]) + "," for i in range(0, len(items), per_line)]


@dataclass(frozen=True)
class Layer:
    """One call of the generated code."""

    index: int
    node: Node
    call: Call
    function: str
    """of the kernel"""
    name: str
    """of the layer struct; layers with the same constants share one"""
    label: str
    """what names of its own begin with"""
    fields: Mapping[str, str]
    arrays: tuple[CArray, ...]
    arguments: tuple[str, ...]
    """C expressions: inputs, output, scratch"""
    sources: tuple[str, ...]
    """C expressions of the inputs when the kernel takes them as one array"""
    comment: str
    macs: int


@dataclass(frozen=True)
class Instance:
    """A kernel's template with its constants: one C file of the project."""

    name: str
    """of its file"""
    function: str
    """with the model's name in front: an application may hold several models"""
    kernel: str
    template: str
    defines: Mapping[str, int]
    inputs: str
    """parameters of the function between the layer and the output"""
    scratch: bool
    headers: tuple[str, ...]
    """that declare the layer's struct"""

    @property
    def file(self) -> str:
        """Its C file, below the project's folder kernels/."""
        return f"{self.name}.c"

    @property
    def prototype(self) -> str:
        """The function's declaration."""
        work = ", int8_t *scratch" if self.scratch else ""
        return f"void {self.function}(const planish_{self.kernel}_layer *layer, {self.inputs}, int8_t *y{work});"


@dataclass(frozen=True)
class Buffer:
    """A tensor's place in the arena."""

    name: str
    tensor: Tensor
    offset: int
    comment: str


@dataclass(frozen=True)
class Border:
    """An input or output of the model as the header shows it."""

    port: Port
    suffix: str
    """'' when it is the only one, else '_<name>'"""
    offset: int
    layout: str

    @property
    def size(self) -> int:
        """Codes, which are bytes."""
        return self.port.tensor.size

    @property
    def scale(self) -> str:
        """As a C constant."""
        return number(self.port.tensor.scale)

    @property
    def order(self) -> str:
        """Shape of the codes in memory."""
        return shape_text(tuple(self.port.shape[a] for a in self.port.order))


@dataclass(frozen=True)
class Project:
    """Everything the templates print."""

    name: str
    title: str
    graph: Graph
    memory: memory.Memory
    layers: tuple[Layer, ...]
    instances: tuple[Instance, ...]
    buffers: tuple[Buffer, ...]
    scratch: Mapping[str, int]
    """offset by identifier"""
    inputs: tuple[Border, ...]
    outputs: tuple[Border, ...]

    @property
    def kernel_sources(self) -> list[str]:
        """Files of kernels/c that are compiled as they are, sorted."""
        return sorted({s for layer in self.layers for s in layer.call.sources})

    @property
    def included(self) -> list[str]:
        """Files of kernels/c that others include: headers and templates, sorted; planish.h first."""
        found = {h for layer in self.layers for h in _headers(layer.call)} | {i.template for i in self.instances}
        return ["planish.h", *sorted(found)]

    @property
    def headers(self) -> list[str]:
        """Headers that declare the layers' structs."""
        return sorted({h for layer in self.layers for h in layer.call.headers})

    @property
    def structs(self) -> list[Layer]:
        """The first layer of every struct."""
        return list({layer.name: layer for layer in reversed(self.layers)}.values())[::-1]

    @property
    def arrays(self) -> list[tuple[Layer, CArray]]:
        """Every constant array, and the first layer that uses it."""
        first = {a.name: (layer, a) for layer in reversed(self.layers) for a in reversed(layer.arrays)}
        return list(first.values())[::-1]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constant arrays."""
        return sum(a.values.nbytes for _, a in self.arrays)


def build(graph: Graph, title: str, features: Iterable[str] = ()) -> Project:
    """The project for a deployment graph on a core with `features`. Identifiers come from the model's names."""
    name = identifier(title, set())
    calls = calls_of(graph, features)
    instances = _instances(name, [(n, calls[n.name]) for n in graph.nodes if n.name in calls])
    plan = memory.of(graph, calls)
    taken: set[str] = set()
    tensors = {t: identifier(t, taken) for t in graph.tensors}
    first: dict[memory.View, str] = {}
    for tensor in tensors:
        first.setdefault(plan.views[tensor], tensor)
    pointer = {t: tensors[first[plan.views[t]]] for t in tensors}
    layers: list[Layer] = []
    scratch: dict[str, int] = {}
    shared = _Shared({}, {})
    for node in graph.nodes:
        if node.name in calls:
            call = calls[node.name]
            instance = instances.get(_key(call))
            function = instance.function if instance else f"planish_{call.kernel}"
            label = identifier(node.name, taken)
            layers.append(_layer(graph, node, call, function, len(layers), pointer, label, name, shared))
            if call.scratch:
                scratch[f"{label}_scratch"] = plan.scratch[node.name]
    used = {a for layer in layers for a in (*layer.arguments, *layer.sources)}
    buffers = [
        Buffer(tensors[t], graph.tensors[t], plan.offsets[t], shape_text(layout.memory_shape(graph.tensors[t].shape)))
        for t in first.values()
        if tensors[t] in used
    ]
    inputs, outputs = (_borders(ports, plan) for ports in (graph.inputs, graph.outputs))
    used_instances = tuple(instances.values())
    return Project(name, title, graph, plan, tuple(layers), used_instances, tuple(buffers), scratch, inputs, outputs)


Known = dict[object, tuple[Node, Call]]
"""C calls that were made before; the node keeps the constants alive by whose identity it is found"""


def calls_of(graph: Graph, features: Iterable[str], known: Known | None = None) -> dict[str, Call]:
    """The C call of every node that runs code, by name. Nodes that differ in their names alone share one, also through `known`."""
    cache: Known = {} if known is None else known
    silent = memory.idle(graph)
    found: dict[str, Call] = {}
    for node in graph.nodes:
        if node.name not in silent:
            tensors = [(t.shape, float(t.scale), t.zero_point, t.bits) for t in (*node.inputs, node.output)]
            key = node.op, repr(tensors), repr(dict(node.attributes)), *((k, id(v)) for k, v in node.constants.items())
            if key not in cache:
                cache[key] = node, version.choose(graph.ops, node, features)
            found[node.name] = cache[key][1]
    return found


@dataclass(frozen=True)
class _Shared:
    """Constants that several layers use: patches of one map run the same layer many times."""

    arrays: dict[tuple[str, bytes], str]
    """name by type and content"""
    structs: dict[tuple[object, ...], str]
    """name by kernel, numbers and arrays"""

    def array(self, values: Array, name: str) -> str:
        """The name of an array of these values: `name` when there is none yet."""
        return self.arrays.setdefault((str(values.dtype), values.tobytes()), name)

    def struct(self, kernel: str, fields: Mapping[str, str], arrays: Iterable[CArray], name: str) -> str:
        """The name of a struct with these members: `name` when there is none yet."""
        key = (kernel, *fields.items(), *((a.member, a.name) for a in arrays))
        return self.structs.setdefault(key, name)


def _key(call: Call) -> tuple[object, ...]:
    """What decides whether two calls share compiled code."""
    return (call.template, *call.defines.items())


def _instances(model: str, calls: Iterable[tuple[Node, Call]]) -> dict[tuple[object, ...], Instance]:
    """The templates' instances by key, in the order of their first use."""
    found: dict[tuple[object, ...], Instance] = {}
    for node, call in calls:
        if call.template is None or _key(call) in found:
            continue
        count = sum(i.kernel == call.kernel for i in found.values())
        many = [f"const int8_t *x{i}" for i in range(len(node.inputs))]
        inputs = "const int8_t *const *x" if call.input_array else ", ".join(many)
        name = f"{call.kernel}_{count}"
        function = f"{model}_{name}"
        found[_key(call)] = Instance(
            name,
            function,
            call.kernel,
            call.template,
            call.defines,
            inputs,
            call.scratch > 0,
            call.headers or ("planish.h",),
        )
    return found


def _headers(call: Call) -> set[str]:
    """Headers of kernels/c that a call's files include, besides planish.h: found by reading them."""
    found: set[str] = set()
    waiting = [*call.headers, *call.sources, *([call.template] if call.template else [])]
    seen: set[str] = set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        included = re.findall(r'^#include "(.+)"', (KERNELS / file).read_text(encoding="utf-8"), re.MULTILINE)
        waiting += [i for i in included if i != "planish.h"]
        found |= {i for i in included if i != "planish.h"}
    return found | set(call.headers)


def _layer(
    graph: Graph,
    node: Node,
    call: Call,
    function: str,
    index: int,
    pointer: Mapping[str, str],
    label: str,
    model: str,
    shared: _Shared,
) -> Layer:
    arrays = tuple(
        CArray(
            member,
            shared.array(values, f"{model}_{label}_{member}"),
            TYPES[str(values.dtype)],
            values,
            call.comments.get(member, ""),
        )
        for member, values in call.arrays.items()
    )
    inputs = tuple(pointer[t.name] for i, t in enumerate(node.inputs) if i != call.updates)
    ends = [pointer[node.output.name], *([f"{label}_scratch"] if call.scratch else [])]
    arguments = (f"{label}_inputs" if call.input_array else None, *ends)
    listed = tuple(a for a in arguments if a is not None) if call.input_array else (*inputs, *ends)
    shapes = ", ".join(shape_text(layout.memory_shape(t.shape)) for t in node.inputs)
    comment = f"{node.name}: {node.op}, {shapes} -> {shape_text(layout.memory_shape(node.output.shape))}"
    fields = {k: number(v) if isinstance(v, float | np.floating) else str(v) for k, v in call.fields.items()}
    sources = inputs if call.input_array else ()
    macs = graph.ops[node.op].macs(node)
    name = shared.struct(call.kernel, fields, arrays, label)
    return Layer(index, node, call, function, name, label, fields, arrays, listed, sources, safe(comment), macs)


def _borders(ports: Iterable[Port], plan: memory.Memory) -> tuple[Border, ...]:
    ports, taken = tuple(ports), set[str]()
    return tuple(
        Border(
            port,
            f"_{identifier(port.name, taken)}" if len(ports) > 1 else "",
            plan.offsets[port.tensor.name],
            "NHWC" if len(port.shape) == 4 and port.order == layout.CHANNELS_LAST else "row-major",
        )
        for port in ports
    )


def safe(text: str) -> str:
    """Text that cannot end the comment it stands in."""
    return text.replace("*/", "* /").replace("/*", "/ *").replace("\n", " ")


def shape_text(shape: tuple[int, ...]) -> str:
    """'32 x 32 x 16': the dimensions after the batch."""
    return " x ".join(str(d) for d in (shape[1:] if len(shape) > 1 else shape))


def number(value: float | np.floating) -> str:
    """A C float constant that reads back as the same bits."""
    text = np.format_float_scientific(np.float32(value), unique=True, trim="0")
    return f"{text}f"
