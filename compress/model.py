"""`Model`: the one form in which every checkpoint travels through the passes.

Whatever the user brings (a module with weights, a .pt2 program, an ONNX file) is traced to a flat graph of ATen ops
with its parameters attached. The graph needs none of the user's code, can be trained, rewritten and exported again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves

from ..common.errors import PlanishError, listed
from .mapped import Mapped

_EXAMPLE = 8
"""size with which a dynamic dimension besides the batch is traced again"""
RESIDENT = 1 << 26
"""bytes of mapped weights that are read before their pages are let go"""


@dataclass(frozen=True)
class Input:
    """One input tensor of a model."""

    name: str
    shape: tuple[int, ...]
    """of one sample batch; the first dimension is the batch when `Model.batched`; a dynamic dimension has an example's size"""
    dtype: torch.dtype
    dims: tuple[str | None, ...] = ()
    """name of each dimension that may have any size, None for a fixed one; () when no dimension besides the batch is dynamic"""
    state: bool = False
    """a key/value cache or a recurrent state: optional, and empty (size 0 along its dynamic dimension, else zeros) when absent"""

    def dim(self, index: int) -> str | None:
        """Name of a dynamic dimension besides the batch, None for a fixed one."""
        return self.dims[index] if self.dims else None

    def empty(self, batch: int) -> torch.Tensor:
        """The state before the first step, for `batch` samples."""
        rest = (0 if self.dim(i) else d for i, d in enumerate(self.shape) if i > 0)
        return torch.zeros((batch, *rest), dtype=self.dtype)


@dataclass(frozen=True)
class Entry:
    """One line of the receipt: what happened to one tensor, and why."""

    tensor: str
    """parameter name or 'activation of <layer>'"""
    action: str
    """quantized, pruned, trained, folded or left"""
    reason: str
    """for a tensor that was left: why; else the method"""
    before_bytes: int
    after_bytes: int
    error: float | None = None
    """relative error |after - before| / |before| of the tensor (Frobenius norm), where it is defined"""


@dataclass(frozen=True)
class Text:
    """How text becomes inputs of a language model."""

    tokenizer: str
    """content of the tokenizer.json of the `tokenizers` package"""
    begin: int | None
    """token that stands before every text, None when there is none"""
    window: int
    """largest number of tokens that the model takes at once"""
    causal: bool
    """whether output t scores token t + 1, so that perplexity is defined"""


@dataclass(frozen=True)
class Model:
    """A traced model: ATen graph, inputs, and the receipt of what was done to it so far. Passes return a new one."""

    graph: torch.fx.GraphModule
    """flat ATen ops from torch.export, in eval mode; parameters and buffers keep the names of the original checkpoint"""
    inputs: tuple[Input, ...]
    batched: bool
    """whether the first dimension of every input and output is a batch of any size"""
    source: str
    """what the user named, for messages and the manifest"""
    receipt: tuple[Entry, ...] = ()
    names: tuple[str, ...] = ()
    """names of the outputs; () for 'output', or 'output_0', 'output_1', ..."""
    text: Text | None = None
    """what turns text into the model's inputs, for a language model; None for every other model"""
    origin: Mapping[str, str] | None = None
    """content of config.json and of other small files of the Hugging Face folder that the model comes from, by name"""
    mapped: tuple[Mapped, ...] = ()
    """files whose tensors the graph reads where they stand, so that their pages can be let go"""

    def __call__(self, *args: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Outputs for input tensors in the order of `inputs`."""
        if not self.mapped:
            return self.graph(*args)
        try:
            return _Releasing(self).run(*args)
        finally:
            self.release()

    def release(self) -> None:
        """Let go of the pages of mapped tensors."""
        for mapped in self.mapped:
            mapped.release()

    def copy(self) -> Model:
        """The same model with parameters and graph of its own, so that a pass may change them."""
        return replace(self, graph=copy.deepcopy(self.graph))

    def editable(self) -> Model:
        """The same model with a graph of its own that shares its tensors: for passes that replace tensors and never write into them."""
        graph = copy.deepcopy(self.graph.graph)  # its tensors are named, not held
        return replace(self, graph=torch.fx.GraphModule(self.graph, graph))

    def with_receipt(self, *entries: Entry) -> Model:
        """The same model with more lines in its receipt."""
        return replace(self, receipt=self.receipt + entries)

    def example(self, batch: int = 2) -> tuple[torch.Tensor, ...]:
        """Zeros of the input shapes, for tracing."""
        return tuple(
            torch.zeros((batch, *i.shape[1:]) if self.batched else i.shape, dtype=i.dtype) for i in self.inputs
        )

    def feeds(self, inputs: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
        """Input tensors in the model's order for (n, ...) arrays by name; a state that is absent starts empty."""
        n = len(next(iter(inputs.values())))
        return tuple(
            torch.from_numpy(np.ascontiguousarray(inputs[i.name])).to(i.dtype) if i.name in inputs else i.empty(n)
            for i in self.inputs
        )

    def program(self) -> torch.export.ExportedProgram:
        """The model as a torch.export program, batch-dynamic when `batched`."""
        with torch.no_grad():
            return torch.export.export(self.graph, self.example(), dynamic_shapes=_dynamic(self.inputs, self.batched))

    def parameters(self) -> int:
        """Number of weight elements: floating parameters, and the codes of quantized ones."""
        return sum(weights(self.graph).values())

    def bytes(self) -> int:
        """Bytes of all parameters and buffers as stored."""
        tensors = dict(self.graph.named_parameters()) | dict(self.graph.named_buffers())
        return sum(t.numel() * t.element_size() for t in tensors.values())


class _Releasing(torch.fx.Interpreter):
    """Runs a graph node by node, and lets go of the mapped weights that were read when they have become many."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.graph)
        self._model, self._read = model, 0

    def run_node(self, n: torch.fx.Node) -> Any:
        """As ever; counts what the op reads."""
        constants = [self.env[a] for a in n.all_input_nodes if a.op == "get_attr"]
        self._read += sum(t.numel() * t.element_size() for t in constants if isinstance(t, torch.Tensor))
        value = super().run_node(n)
        if self._read > RESIDENT:
            self._model.release()
            self._read = 0
        return value


def _dynamic(inputs: Sequence[Input], batched: bool) -> Any:
    """torch.export's description of the dynamic dimensions: the batch, and those that the inputs name."""
    symbols = {n: torch.export.Dim(n, min=0 if i.state else 1) for i in reversed(inputs) for n in i.dims if n}
    if batched:
        symbols["batch"] = torch.export.Dim("batch", min=1)
    found = []
    for item in inputs:
        own = {index: symbols[name] for index, name in enumerate(item.dims) if name}
        found.append(({0: symbols["batch"]} if batched else {}) | own)
    return tuple(found) if any(found) else None


def weights(graph: torch.fx.GraphModule) -> dict[str, int]:
    """Learned numbers by tensor name: of parameters, and after quantization of the buffers that hold their codes, several to a byte."""
    found = {n: p.numel() for n, p in graph.named_parameters()}
    packed = _bits(graph)
    found |= {
        n: b.numel() * 8 // packed.get(n, 8) for n, b in graph.named_buffers() if n.endswith(("_codes", "_values"))
    }
    return found


def _bits(graph: torch.fx.GraphModule) -> dict[str, int]:
    """Bits of a weight in the buffers of codes that planish ops read, by name."""
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "planish":
            continue
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        codes = given.get("codes")
        if isinstance(codes, torch.fx.Node) and codes.op == "get_attr":
            width = 4 if "codebook" in node.target.name() else 8
            found[str(codes.target)] = int(given.get("bits", width))
    return found


def trace(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], source: str, declared: Sequence[Input] = ()
) -> Model:
    """Trace a module to a `Model`.

    `inputs` are example tensors by argument name, in order; their first dimension is taken as the batch and made
    dynamic; a model that fixes its batch is traced with the given one. `declared` describes the same inputs in the same order
    when some have dynamic dimensions besides the batch (examples of at least two elements there) or are states. Raises
    PlanishError for a model that torch.export cannot trace and for outputs that are not tensors.
    """
    module = module.eval()
    names = tuple(inputs)
    args = tuple(inputs.values())
    described = tuple(declared) or tuple(Input(n, tuple(x.shape), x.dtype) for n, x in inputs.items())
    batch = {x.shape[0] for x in args if x.ndim}
    candidates = [False]
    if len(batch) == 1 and all(x.ndim > 0 for x in args):
        candidates = [True, False]
    failure: Exception | None = None
    for batched in candidates:
        example = tuple(torch.cat([x[:1], x[:1]]) for x in args) if batched else args
        try:
            with torch.no_grad():
                program = torch.export.export(module, example, dynamic_shapes=_dynamic(described, batched))
        except Exception as error:  # torch.export raises many unrelated types for a model that it cannot trace
            failure = error
            continue
        model = from_program(program, names, source)
        if declared:
            model = replace(
                model,
                inputs=tuple(
                    replace(i, dims=d.dims, state=d.state) for i, d in zip(model.inputs, declared, strict=True)
                ),
            )
        return model
    raise PlanishError(f"'{source}' cannot be traced by torch.export: {_first_line(failure)}")


def from_program(program: torch.export.ExportedProgram, names: tuple[str, ...] | None, source: str) -> Model:
    """A `Model` from a torch.export program. `names` replaces the input names; raises PlanishError as `trace` does."""
    specs = program.graph_signature.output_specs
    kinds = [s for s in specs if s.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT]
    other = [type(s.arg).__name__ for s in kinds if not isinstance(s.arg, torch.export.graph_signature.TensorArgument)]
    if other:
        raise PlanishError(f"'{source}' returns {listed(other)}; every output must be a tensor")
    user = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    if names is not None and len(names) != len(user):
        raise PlanishError(f"'{source}' takes {len(user)} inputs; {len(names)} were given: {listed(names)}")
    found: list[Input] = []
    dynamic = []
    for index, node in enumerate(user):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise PlanishError(f"input '{node.name}' of '{source}' is not a tensor")
        dynamic.append(value.ndim > 0 and not isinstance(value.shape[0], int))
        shape = tuple(d if isinstance(d, int) else 1 if k == 0 else _EXAMPLE for k, d in enumerate(value.shape))
        named = tuple(None if k == 0 or isinstance(d, int) else str(d) for k, d in enumerate(value.shape))
        found.append(Input(names[index] if names else node.name, shape, value.dtype, named if any(named) else ()))
    model = Model(_flat(program, [i.name for i in found]), tuple(found), bool(dynamic) and all(dynamic), source)
    return model


def _flat(program: torch.export.ExportedProgram, names: list[str]) -> torch.fx.GraphModule:
    """The program's graph as a module of its own: tensors in by position, one tensor or a tuple out, and no hooks."""
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    graph = module.graph
    graph.set_codegen(CodeGen())
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    taken = {n.name for n in graph.nodes if n.op != "placeholder"}
    for node, name in zip(placeholders, names, strict=True):
        for other in graph.nodes:
            if name in taken and other.name == name:
                other.name = f"{name}_node"
        node.name = node.target = name
    output = next(n for n in graph.nodes if n.op == "output")
    leaves = tuple(tree_leaves(output.args))
    output.args = (leaves[0],) if len(leaves) == 1 else (leaves,)
    return torch.fx.GraphModule(module, graph)


def output_names(model: Model) -> tuple[str, ...]:
    """Names of the outputs: the model's own, else 'output', or 'output_0', 'output_1', ... when there are several."""
    if model.names:
        return model.names
    node = next(n for n in model.graph.graph.nodes if n.op == "output")
    flat = tree_leaves(node.args)
    return ("output",) if len(flat) == 1 else tuple(f"output_{i}" for i in range(len(flat)))


def predict(
    model: Model, inputs: Mapping[str, np.ndarray], batch: int = 256, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """Outputs (n, ...) by name for (n, ...) inputs, at most `batch` samples at a time, of a model whose tensors are on `device`.

    A model that fixes its batch takes its own; raises PlanishError when the samples do not fill it.
    """
    n = len(next(iter(inputs.values())))
    size = batch if model.batched else max(1, model.inputs[0].shape[0] if model.inputs[0].shape else 1)
    if not model.batched and n % size:
        raise PlanishError(f"{n} samples do not fill batches of {size}, which '{model.source}' fixes")
    parts: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for start in range(0, n, size):
            feeds = model.feeds({k: v[start : start + size] for k, v in inputs.items()})
            parts.append([y.cpu() for y in tree_leaves(model(*(x.to(device) for x in feeds)))])
    return {name: torch.cat([p[i] for p in parts]).numpy() for i, name in enumerate(output_names(model))}


def _first_line(error: Exception | None) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
