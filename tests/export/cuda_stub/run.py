"""`python run.py JOB`: an artifact of format tvm on the device that cuda.c makes of host memory.

Triton kernels run in Triton's interpreter on the memory that the launch names, TVM's own kernels as their unscheduled loops, compiled for
the CPU. Everything else (loading, constants, memory plan, order of calls, arguments, grids) is TVM's CUDA runtime with the artifact.
"""

import ctypes
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import tvm
from planish.export import artifact
from planish.kernels.triton.record import POINTERS
from planish.runtimes.tvm import Tvm

job = json.loads(Path(sys.argv[1]).read_text())
stub = ctypes.CDLL(job["stub"])
stub.stub_remaining.restype = ctypes.c_size_t
stub.stub_remaining.argtypes = [ctypes.c_void_p]
loops = tvm.runtime.load_module(job["loops"]) if job["loops"] else None
dtypes = {name: dtype for dtype, name in POINTERS.items()}
NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
log = []


def memory(address):
    """Bytes from an address to the end of its allocation, as a torch tensor that shares them."""
    size = stub.stub_remaining(address)
    assert size, f"{address:#x} is no device memory"
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def pointer(argument):
    return ctypes.cast(argument, ctypes.POINTER(ctypes.c_void_p))[0]


def triton(kernel, grid, arguments):
    values = dict(kernel["constants"])
    for (name, kind), argument in zip(kernel["types"].items(), arguments, strict=False):
        if kind.startswith("*"):
            address = pointer(argument)
            part = torch.empty(0, dtype=torch.uint8) if address is None else memory(address)
            dtype = dtypes[kind]
            values[name] = part[: len(part) // dtype.itemsize * dtype.itemsize].view(dtype)
        else:
            values[name] = ctypes.cast(argument, ctypes.POINTER(NUMBERS[kind]))[0]
    count = len(kernel["types"])
    assert [pointer(arguments[count + i]) for i in (0, 1)] == [None, None], "scratch pointers are null"
    module = importlib.import_module(f"planish.kernels.triton.{kernel['module']}")
    getattr(module, kernel["kernel"])[grid](**values, num_warps=kernel["warps"], num_stages=kernel["stages"])


def plain(kernel, arguments):
    """TVM's own kernel: the same function in plain loops."""
    tensors = []
    for place, shape, dtype in zip(kernel["places"], kernel["shapes"], kernel["dtypes"], strict=True):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        tensors.append((memory(pointer(arguments[place]))[:size], shape, dtype))
    given = [tvm.runtime.tensor(t.numpy().view(dtype).reshape(shape)) for t, shape, dtype in tensors]
    loops[kernel["function"]](*given)
    for (part, _, _), value in zip(tensors, given, strict=True):
        part.copy_(torch.from_numpy(value.numpy().reshape(-1).view(np.uint8)))


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))
def launched(name, sizes, arguments):
    name = name.decode()
    grid, block, shared = tuple(sizes[0:3]), tuple(sizes[3:6]), sizes[6]
    entry = {"kernel": name, "grid": grid, "block": block, "shared": shared}
    try:
        if name in job["triton"]:
            triton(job["triton"][name], grid, arguments)
        else:
            plain(job["plain"][name], arguments)
    except Exception as error:  # an exception cannot pass through the C code: the parent reads it
        entry["error"] = repr(error)
    log.append(entry)


stub.stub_handle(launched)
inputs = dict(np.load(job["inputs"]))
with Tvm().open(artifact.load(Path(job["artifact"])), 1) as session:
    found = session.run(inputs)
    again = session.run(inputs)
np.savez(job["outputs"], **found)
same = all((again[n] == found[n]).all() for n in found)
Path(job["log"]).write_text(json.dumps({"launches": log, "modules": stub.stub_modules(), "same": same}))
