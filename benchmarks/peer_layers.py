"""One tool, one method, on given linear layers: run by benchmarks/peers.py in a process of its own, for time and memory.

    PYTHON benchmarks/peer_layers.py TOOL METHOD IN.safetensors OUT.safetensors

IN holds weights (out, in) float32 by name. OUT gets what each quantized weight stands for, float32. Standard output: one JSON
line {"seconds", "peak_bytes", "stored_bytes", "version"}. Both are of the way from float weights in memory to their stored low-bit form,
in the form that the tool takes (a traced program, modules, an ONNX model) and gives: seconds the median wall time of REPEATS goes, each
from fresh input; peak bytes how far resident memory rose in the first one above what the process held before it. What was freed
before but kept by the allocator is given back first, or a tool could fill it unseen. A small weight goes first, for what happens once.
The interpreter must have the tool installed; nothing else of planish is imported for another tool.
"""

import ctypes
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REPEATS = 5
GROUP = {"rtn4-g128": 128, "rtn4-g32": 32, "rtn8": None, "hqq4-g64": 64, "hqq2-g64": 64}


class Peak:
    """How far this process' resident memory rises above what it holds now, in bytes (Linux with glibc: the peak is reset first)."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.read("VmRSS")

    def read(self, key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

    def rose(self):
        return max(0, self.read("VmHWM") - self.before)


def stack(weights):
    """The layers side by side, every one reading the same input: as modules by number."""
    layers = torch.nn.ModuleList()
    for weight in weights.values():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    return layers


def restored(layers):
    """What each layer's weight stands for: its answers to the unit vectors."""
    with torch.no_grad():
        return [m(torch.eye(m.in_features)).float().T.contiguous() for m in layers]


def planish(method, weights):
    import planish
    from planish.compress import recipe
    from planish.compress.model import trace
    from planish.compress.passes import Context
    from planish.targets import target

    class Side(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = stack(weights)

        def forward(self, x):
            return tuple(layer(x) for layer in self.layers)

    steps = {
        "rtn4-g128": "quantize.rtn: {bits: 4, group: 128, clip: false}",
        "rtn4-g32": "quantize.rtn: {bits: 4, group: 32, clip: false}",
        "rtn8": "quantize.rtn: {bits: 8, group: null, clip: false}",
        "hqq4-g64": "quantize.hqq: {bits: 4, group: 64}",
        "hqq2-g64": "quantize.hqq: {bits: 2, group: 64}",
        "nf4": "quantize.nf4",
        "fp4": "quantize.fp4",
    }
    width = next(iter(weights.values())).shape[1]
    model = trace(Side(), {"x": torch.zeros(2, width)}, "layers")
    plan = recipe.parse(f"name: x\npasses:\n  - {steps[method]}\n", "benchmark")
    context = Context(model, None, target.load("host"), torch.Generator().manual_seed(0))

    def run():
        return plan.passes[0][1].apply(model, context)

    def answers(result):
        with torch.no_grad():
            return [y.float().T.contiguous() for y in result(torch.eye(width))], result.bytes()

    return planish.__version__, run, answers


def torchao(method, weights):
    import torchao
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    layers = stack(weights)
    group = GROUP[method]
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int8 if group is None else torch.int4,
        granularity=PerAxis(0) if group is None else PerGroup(group),
    )

    def run():
        quantize_(layers, config)
        return layers

    def answers(result):
        return restored(result), None

    return torchao.__version__, run, answers


def hqq(method, weights):
    import hqq as package
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layers = stack(weights)
    config = BaseQuantizeConfig(nbits=int(method[3]), group_size=GROUP[method], axis=1)

    def run():
        return [HQQLinear(m, config, compute_dtype=torch.float32, device="cpu") for m in layers]

    def answers(result):
        return [m.dequantize().float() for m in result], None

    return package.__version__, run, answers


def bitsandbytes(method, weights):
    import bitsandbytes as package
    from bitsandbytes import functional

    def run():
        if method == "rtn8":
            return [functional.int8_vectorwise_quant(w)[:2] for w in weights.values()]
        return [functional.quantize_4bit(w, blocksize=64, quant_type=method) for w in weights.values()]

    def answers(result):
        if method == "rtn8":
            return [q.float() * (s.float() / 127)[:, None] for q, s in result], None
        return [functional.dequantize_4bit(q, s).float() for q, s in result], None

    return package.__version__, run, answers


def onnxruntime(method, weights):
    import onnxruntime as package
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        HQQWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    names = list(weights)
    value = helper.make_tensor_value_info
    width = next(iter(weights.values())).shape[1]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=f"m{i}") for i in range(len(names))],
        "layers",
        [value("x", TensorProto.FLOAT, ["n", width])],
        [value(f"y{i}", TensorProto.FLOAT, ["n", weights[n].shape[0]]) for i, n in enumerate(names)],
        [numpy_helper.from_array(weights[n].T.contiguous().numpy(), f"w{i}") for i, n in enumerate(names)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    group = GROUP[method]
    config = (
        HQQWeightOnlyQuantConfig(block_size=group, bits=4)
        if method.startswith("hqq")
        else DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=True, bits=4)
    )

    def run():
        quantizer = MatMulNBitsQuantizer(model, algo_config=config)
        quantizer.process()
        return quantizer.model.model

    def answers(result):
        session = package.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs = session.run(None, {"x": torch.eye(width).numpy()})
        return [torch.from_numpy(y).T.contiguous() for y in outputs], sum(
            len(i.raw_data) for i in result.graph.initializer
        )

    return package.__version__, run, answers


def main():
    tool, method, source, output = sys.argv[1:]
    torch.set_num_threads(1)
    weights = {n: t.clone() for n, t in load_file(source).items()}  # in memory, not mapped from the file
    tools = {
        "planish": planish,
        "torchao": torchao,
        "hqq": hqq,
        "bitsandbytes": bitsandbytes,
        "onnxruntime": onnxruntime,
    }
    first = {"warm": next(iter(weights.values()))[:64].clone()}
    tools[tool](method, first)[1]()  # imports and the first call's set-up are not what is compared
    times, rises = [], []
    for _ in range(REPEATS):
        result = run = answers = None  # what the last go holds is freed
        version, run, answers = tools[tool](method, weights)
        peak, started = Peak(), time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
        rises.append(peak.rose())
    values, stored = answers(result)
    save_file(dict(zip(weights, values, strict=True)), output)
    measured = {"seconds": statistics.median(times), "peak_bytes": rises[0]}
    print(json.dumps(measured | {"stored_bytes": stored, "version": version}))


if __name__ == "__main__":
    main()
