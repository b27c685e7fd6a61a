"""Every kernel compiles for every architecture without a GPU, keeps its registers, fits the shared memory, and uses tensor cores."""

import functools
import importlib
import json
import pkgutil
import sys
from dataclasses import replace
from pathlib import Path

import planish.kernels.triton
import pytest
import torch
from planish.common.errors import PlanishError
from planish.kernels.gpu import op
from planish.kernels.gpu.core import CORES
from planish.kernels.triton import ahead, config, record

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import gpu_cases

FILES = [m.name for m in pkgutil.iter_modules(planish.kernels.triton.__path__)]


def modules():
    """Files of kernels/triton that hold kernels of an op."""
    found = {n: importlib.import_module(f"planish.kernels.triton.{n}") for n in FILES if n != "worker"}
    return {n: m for n, m in found.items() if hasattr(m, "variants")}


@functools.cache
def compiled(core):
    """(variant, what became of it) of every kernel for a core, by file; all at once, for a worker takes seconds to start."""
    wanted = {n: m.variants(CORES[core]) for n, m in modules().items()}
    made = iter(ahead.compile_all([v for variants in wanted.values() for v in variants], core))
    return {n: [(v, next(made)) for v in variants] for n, variants in wanted.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("core", CORES)
def test_kernels_compile_without_spills_and_use_tensor_cores(core, name):
    found = compiled(core)[name]
    assert 0 < len(found) <= 6
    for variant, made in found:
        assert made.spills == 0 and made.stack_bytes == 0, variant.label
        assert made.shared_bytes <= CORES[core].shared_bytes, variant.label
        assert made.registers <= 255
        assert bool(made.tensor_cores) >= variant.matrix, f"{variant.label}: {dict(made.instructions)}"
        assert variant.label, "a variant says what it is for"


def int8_with(**constants):
    """The product of int8 codes with other tiles than its own."""
    base = modules()["linear_int8"].variants(CORES["sm_80"])[1]
    return replace(base, constants={**base.constants, **constants}, warps=4, stages=2)


def test_a_kernel_that_spills_is_seen(tmp_path):
    """The gate itself: a tile far too large for its warps."""
    variants = [int8_with(BN=64, BM=64, BK=64), int8_with(BN=256, BM=256, BK=64)]
    small, large = ahead.compile_all(variants, "sm_80", keep=tmp_path)
    assert small.spills == 0 < large.spills
    assert small.tensor_cores.keys() == {"IMMA"}
    assert "mma.sync" in Path(small.files["ptx"]).read_text()


def test_a_kernel_that_does_not_compile_is_one_line():
    broken = replace(int8_with(BK=48), label="48 columns")
    with pytest.raises(PlanishError, match=r"^linear_int8.linear_int8 \(48 columns\) does not compile for sm_90: .+$"):
        ahead.compile_all([broken], "sm_90")


def specialized(launch, label):
    """A recorded launch as Triton compiles it when it runs: an integer that is 1 is a constant."""
    variant = launch.variant
    ones = {n: 1 for n, v in zip(variant.types, launch.arguments, strict=True) if isinstance(v, int) and v == 1}
    types = {n: t for n, t in variant.types.items() if n not in ones}
    unaligned = tuple(n for n in variant.unaligned if n in types)
    return replace(variant, types=types, constants={**variant.constants, **ones}, unaligned=unaligned, label=label)


@pytest.mark.parametrize("tokens", [1, 17])
def test_what_the_ops_launch_compiles(tokens):
    """Every kernel that `run` of an op launches, for its own sizes, as Triton specializes it on a GPU."""
    core, found = CORES["sm_90"], {}
    for make in gpu_cases.KINDS:
        layer = make(256, 1024)
        packed = op.ops()[layer.op].pack(layer, core)
        schema = getattr(torch.ops.planish, f"gpu_{layer.op}").default._schema
        given = {a.name: "" if str(a.type) == "str" else None for a in schema.arguments}
        given |= {**packed.tensors, **packed.attributes, "x": torch.randn(tokens, 1024, dtype=torch.bfloat16)}
        for launch in record.record(layer.op, op.kernel(layer.op).run, given, core).launches:
            variant = specialized(launch, layer.op)
            found[repr(replace(variant, label=""))] = variant
    assert len(found) > len(gpu_cases.KINDS)
    for variant, made in zip(found.values(), ahead.compile_all(list(found.values()), core.name), strict=True):
        assert made.spills == 0, (variant.label, variant.kernel)


def test_every_gpu_op_has_its_kernel_and_its_node():
    for name in op.ops():
        assert hasattr(op.kernel(name), "run"), name
        schema = getattr(torch.ops.planish, f"gpu_{name}").default._schema
        assert schema.arguments[0].name == "x", name


def test_views_in_the_epilogue_become_rows():
    """Kernels read factor and residual as (rows, out); a graph may hand over a part of a wider tensor, or a transposed one."""
    wide = torch.randn(4, 6, 32)
    names = [a.name for a in torch.ops.planish.gpu_linear_wna16.default._schema.arguments]
    given = [{"x": wide, "factor": wide[..., :16], "residual": wide.transpose(0, 1)}.get(n) for n in names]
    made = dict(zip(names, op.in_rows(names, given), strict=True))
    assert made["x"] is wide and made["codes"] is None
    for name in ("factor", "residual"):
        assert made[name].is_contiguous() and torch.equal(made[name], given[names.index(name)])


def test_shipped_tables_name_what_the_ops_would_try():
    for path in config.TABLES.glob("*.json"):
        content = json.loads(path.read_text())
        assert path.stem in CORES
        assert content["card"] and content["triton"]
        for entries in content["entries"].values():
            for key, entry in entries.items():
                assert key == config.bucket(*(int(p[1:]) for p in key.split("_")))
                assert set(entry) >= {"form", "constants", "warps", "stages"}


def test_an_unknown_core_takes_the_table_of_the_nearest_older_one():
    from planish.kernels.gpu.core import Core

    assert config._nearest(Core("sm_86", 84, 101_376)) == "sm_80"
    assert config._nearest(Core("sm_120", 170, 101_376)) == "sm_90"
