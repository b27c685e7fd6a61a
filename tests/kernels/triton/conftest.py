"""Triton's interpreter, made to compute as a GPU does where it falls short (3.9): conversions that round, arithmetic of bfloat16.

By itself it cuts float32 to bfloat16, loses the carry of a mantissa that rounds up to the next power of two in 8-bit floats, and adds and
multiplies the bits of bfloat16 as integers.
"""

import numpy as np
import pytest
import torch

FLOATS = {
    "fp32": (torch.float32, np.uint32),
    "fp16": (torch.float16, np.uint16),
    "bf16": (torch.bfloat16, np.uint16),
    "fp8e4nv": (torch.float8_e4m3fn, np.uint8),
    "fp8e5": (torch.float8_e5m2, np.uint8),
}


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """Conversions by torch: to nearest, ties to even; products of bfloat16 in float32."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def converted(values, given, wanted, _mode):
        source, bits = FLOATS[given.name]
        target, wide = FLOATS[wanted.name]
        flat = np.frombuffer(np.ascontiguousarray(values).tobytes(), bits)
        made = torch.from_numpy(flat.copy()).view(source).float().to(target)
        unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[made.element_size()]
        return made.view(unsigned).numpy().astype(wide, copy=False).reshape(values.shape)

    plain = interpreter.InterpreterBuilder.create_dot

    def floats(value):
        if value.dtype.scalar.name != "bf16":
            return value
        single = interpreter.tl.float32
        return interpreter.TensorHandle(
            converted(value.data, value.dtype.scalar, single, None).view(np.float32), single
        )

    def dot(self, a, b, *rest):
        return plain(self, floats(a), floats(b), *rest)

    def rounded(operation):
        def made(self, a, b):
            if a.dtype.scalar.name != "bf16":
                return operation(self, a, b)
            float32, bfloat16 = interpreter.tl.float32, interpreter.tl.bfloat16
            a, b = (interpreter.TensorHandle(converted(v.data, v.dtype.scalar, float32, None).view(np.float32), float32) for v in (a, b))  # fmt: skip
            wide = operation(self, a, b)
            return interpreter.TensorHandle(converted(wide.data, float32, bfloat16, None), bfloat16)

        return made

    for name in ("create_fadd", "create_fsub", "create_fmul"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, rounded(getattr(interpreter.InterpreterBuilder, name)))  # fmt: skip
    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
