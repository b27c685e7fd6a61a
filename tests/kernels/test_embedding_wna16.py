"""Quantized embeddings: ONNX Runtime and TVM give the reference's rows to the bit, and the table stays packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish.compress.model import trace
from planish.export import lowering, tvm_import
from planish.export.onnx import float_weight_bytes, narrow_bytes, optimized
from planish.export.tvm import compile_model
from planish.kernels import embedding_wna16, packing
from planish.kernels.linear_wna16 import dequantize
from planish.runtimes import ort
from planish.targets import target
from torch import nn

ROWS = 50


def drawn(columns: int, bits: int, group: int, zero: bool) -> dict[str, torch.Tensor]:
    """Tensor arguments of the op, drawn."""
    g = torch.Generator().manual_seed(columns + bits + group)
    groups = columns // group
    codes = torch.randint(0, 1 << bits, (ROWS, columns), generator=g, dtype=torch.uint8)
    found = {"codes": packing.pack(codes, bits, group), "scale": torch.rand(ROWS, groups, generator=g) * 0.02 + 0.01}
    if zero:
        found["zero_point"] = torch.randint(0, 1 << bits, (ROWS, groups), generator=g, dtype=torch.uint8)
    return found


def reference(indices: torch.Tensor, tensors: dict[str, torch.Tensor], bits: int, group: int) -> np.ndarray:
    zero = tensors.get("zero_point")
    return torch.ops.planish.embedding_wna16(indices, tensors["codes"], tensors["scale"], zero, bits, group).numpy()


def node(tensors: dict[str, torch.Tensor], shape: tuple[str | int, ...], **attributes: int) -> onnx.ModelProto:
    """An ONNX model of one planish node on indices of a shape."""
    names = ["indices", *(f"e.weight_{n}" for n in tensors)]
    settings: dict[str, Any] = dict(attributes)
    made = helper.make_node("embedding_wna16", names, ["y"], "e", domain="planish", **settings)
    constants = [numpy_helper.from_array(v.numpy(), f"e.weight_{n}") for n, v in tensors.items()]
    indices = helper.make_tensor_value_info("indices", TensorProto.INT64, shape)
    y = helper.make_empty_tensor_value_info("y") if isinstance(shape[0], int) else None
    columns = tensors["scale"].shape[1] * attributes["group"]
    y = y or helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, columns])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("planish", 1)]
    return helper.make_model(
        helper.make_graph([made], "g", [indices], [y], constants), opset_imports=opsets, ir_version=10
    )


GRID = [
    (bits, columns, group, zero)
    for bits in (8, 4, 2)
    for columns, group in [(128, 32), (128, 128), (96, 96), (96, 48), (40, 8), (86, 43), (20, 20), (43, 43)]
    for zero in (False, True)
]


@pytest.mark.parametrize(("bits", "columns", "group", "zero"), GRID)
def test_onnx_runtime_equals_the_reference(bits: int, columns: int, group: int, zero: bool) -> None:
    tensors = drawn(columns, bits, group, zero)
    model = lowering.lowered(node(tensors, ("batch", "length"), bits=bits, group=group))
    native = any(n.op_type == embedding_wna16.OP for n in model.graph.node)
    assert native == (group != 8 and group * bits % 8 == 0 and (group != 43 or columns == 43))
    session = ort.create(model.SerializeToString(), 1)
    for shape in ((1, 1), (3, 7), (2, 0)):
        indices = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1))
        got = ort.run(session, {"indices": indices.numpy()})["y"]
        np.testing.assert_array_equal(got, reference(indices, tensors, bits, group))


def test_the_reference_picks_rows_of_the_table_that_the_codes_stand_for() -> None:
    tensors = drawn(96, 4, 32, True)
    table = dequantize(tensors["codes"], tensors["scale"], tensors["zero_point"], 4, 32)
    indices = torch.tensor([[3, 3], [0, ROWS - 1]])
    np.testing.assert_array_equal(reference(indices, tensors, 4, 32), table[indices].numpy())
    for beyond in (-1, ROWS):
        with pytest.raises(IndexError):
            reference(torch.tensor([beyond]), tensors, 4, 32)


class Positions(nn.Module):
    """Rows of words, and of positions that the shape of the input alone says."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group
        self.words, self.positions = nn.Module(), nn.Module()
        for table in (self.words, self.positions):
            for part, value in drawn(96, 4, group, False).items():
                table.register_buffer(f"weight_{part}", value)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        def rows(table: Any, indices: torch.Tensor) -> torch.Tensor:
            codes, scale = table.weight_codes, table.weight_scale
            return torch.ops.planish.embedding_wna16(indices, codes, scale, None, 4, self.group)

        return rows(self.words, input_ids) + rows(self.positions, torch.arange(input_ids.shape[1])[None])


@pytest.mark.parametrize("group", [32, 8])
def test_tables_stay_packed_in_the_graph_that_runs(group: int, tmp_path: Path) -> None:
    """Of positions too, which are constants where the length is fixed."""
    module, ids = Positions(group), torch.arange(24).reshape(1, 24)
    model = lowering.to_onnx(trace(module, {"input_ids": ids}, "net"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    runs = optimized(tmp_path / "m.onnx")
    assert narrow_bytes(runs) == 2 * ROWS * 96 // 2
    tables = 2 * ROWS * (96 // group) * 4
    assert float_weight_bytes(runs) == tables + (256 * 2 * 4 if group == 8 else 0)
    got = ort.run(ort.create(tmp_path / "m.onnx", 1), {"input_ids": ids.numpy()})["output"]
    np.testing.assert_array_equal(got, module(ids).numpy())
    assert {"words", "positions"} <= {n.name for n in model.graph.node}


@pytest.mark.parametrize(
    ("bits", "columns", "group", "zero"), [(4, 96, 32, False), (8, 40, 8, True), (2, 86, 43, True)]
)
def test_tvm_equals_the_reference(bits: int, columns: int, group: int, zero: bool) -> None:
    tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from planish.runtimes.tvm import bound_main

    tensors = drawn(columns, bits, group, zero)
    fixed = tvm_import.fix_batch(node(tensors, (2, 5), bits=bits, group=group))
    compiled = compile_model(fixed, target.load("host"), {})
    machine = tvm.relax.VirtualMachine(compiled.executable, tvm.cpu())
    indices = torch.randint(0, ROWS, (2, 5), generator=torch.Generator().manual_seed(1))
    got = bound_main(machine)(tvm.runtime.tensor(indices.numpy())).numpy()
    np.testing.assert_array_equal(got, reference(indices, tensors, bits, group))
    assert compiled.packed_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
