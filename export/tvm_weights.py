"""Quantized weights in a TVM library: stored as integer codes, widened to float32 once when the model is loaded.

The kernels read float32 (see tvm_import), and a compiled module keeps every constant in the type its kernel reads: four bytes
for a code of one. Here the codes move out of `main` into a second function, `weights`, which widens them and returns all as one
tuple; `main` takes that tuple as its last argument. Whoever runs the library calls `weights` once and passes the result on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _tvm_compat, tvm_layers

FUNCTION = "weights"
"""name of the function in the library; a library without stored codes does not have it"""
SMALLEST = 256
"""values in a constant that is worth a call; smaller ones stay float32 in `main`"""
TYPES = (np.int8, np.int16)
"""in order of preference; int16 holds what 8-bit codes less their zero point can be, -255 to 255"""

OPAQUE = 8
"""TVM's number for a kernel that no pass fuses"""


@dataclass(frozen=True)
class Stored:
    """A module whose weights are codes, and how many bytes they take."""

    module: Any
    code_bytes: int = 0
    """in the library"""
    widened_bytes: int = 0
    """in memory as float32, beside the codes; 0 where nothing is stored as codes"""


def store_codes(module: Any) -> Stored:
    """Move the whole-number constants of `main` to `weights` as codes. The last step before compiling.

    Every value comes back bit for bit. A module without such constants is returned as it is.
    """
    codes: dict[Any, np.ndarray] = {}
    for _, operands in tvm_layers.kernel_calls(module["main"]):
        found = (as_codes(a.value.numpy()) for a in operands if tvm_layers.is_constant(a))
        codes.update({_key(c): c for c in found if c is not None})
    if not codes:
        return Stored(module)
    module = _read_from_argument(module, codes)
    return Stored(
        _with_weights(module, list(codes.values())),
        sum(a.nbytes for a in codes.values()),
        sum(4 * a.size for a in codes.values()),
    )


def as_codes(values: np.ndarray) -> np.ndarray | None:
    """The same numbers in the narrowest of TYPES; None where they are few, not float32, not whole, or too large."""
    if values.dtype != np.float32 or values.size <= SMALLEST:
        return None
    for dtype in TYPES:
        limits = np.iinfo(dtype)
        if values.min() >= limits.min and values.max() <= limits.max:  # false for NaN
            codes = values.astype(dtype)
            exact = codes.astype(np.float32).tobytes() == values.tobytes()  # bytes: -0.0 is not 0
            return codes if exact else None
    return None


def _key(codes: np.ndarray) -> Any:
    """Equal for equal tensors."""
    return codes.shape, codes.dtype.name, codes.tobytes()


def _read_from_argument(module: Any, codes: dict[Any, np.ndarray]) -> Any:
    """The module with `main` taking its weights as a tuple, after its other parameters."""
    ir = _tvm_compat.load()
    relax = ir.relax
    types = [relax.TensorType(a.shape, "float32") for a in codes.values()]
    argument = relax.Var("widened", relax.TupleType(types))
    places = {key: i for i, key in enumerate(codes)}

    def read(operand: Any) -> Any:
        found = as_codes(operand.value.numpy()) if tvm_layers.is_constant(operand) else None
        return operand if found is None else relax.TupleGetItem(argument, places[_key(found)])

    @relax.expr_functor.mutator
    class Read(relax.PyExprMutator):
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            if not tvm_layers.is_kernel_call(call):
                return call
            kernel, operands = call.args
            emitted = [self.builder_.normalize(read(a)) for a in operands.fields]
            return relax.Call(call.op, [kernel, relax.Tuple(emitted)], call.attrs, call.ty_args)

    main = module["main"]
    body = Read(module).visit_expr(main.body)
    changed = relax.Function([*main.params, argument], body, main.ret_ty, main.is_pure, main.attrs)
    others = {v: f for v, f in module.functions_items() if v.name_hint != "main"}
    made = relax.BlockBuilder(ir.tvm.IRModule(others, attrs=module.attrs))
    made.add_func(changed, "main")
    return made.get()


def _with_weights(module: Any, codes: list[np.ndarray]) -> Any:
    """The module with the function `weights`."""
    ir = _tvm_compat.load()
    relax = ir.relax
    builder = relax.BlockBuilder(module)
    kernels = {d: builder.add_func(_widening(d), f"widen_{d}") for d in sorted({a.dtype.name for a in codes})}
    with builder.function(FUNCTION, []):
        tensors = []
        for array in codes:
            flat = relax.const(array.reshape(-1))
            line = relax.TensorType((array.size,), "float32")
            shaped = relax.TensorType(array.shape, "float32")
            values = builder.emit(relax.call_tir(kernels[array.dtype.name], [flat], out_ty=line))
            # a view: as an op, reshape would be compiled to a copy
            view = relax.call_pure_packed("vm.builtin.reshape", values, relax.ShapeExpr(array.shape), ty_args=shaped)
            tensors.append(builder.emit(view))
        builder.emit_func_output(relax.Tuple(tensors))
    return builder.get()


def _widening(dtype: str) -> Any:
    """Kernel (n,) codes -> (n,) float32 for any n: TVM's folding of constants, which would undo it, needs numbers for shapes."""
    ir = _tvm_compat.load()
    count = ir.tirx.Var("n", "int64")
    codes = ir.te.placeholder((count,), dtype, name="codes")
    values = ir.te.compute((count,), lambda i: codes[i].astype("float32"), name="values")
    kernel = ir.te.create_prim_func([codes, values]).without_attr("global_symbol")
    return kernel.with_attrs({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": OPAQUE})
