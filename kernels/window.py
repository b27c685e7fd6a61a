"""Sliding windows: the geometry that convolutions and pools share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .op import Array, FloatOp, Node, Unsupported
from .parsing import flag, four


@dataclass(frozen=True)
class Window:
    """Kernel, stride, dilation (height, width) and pads (top, left, bottom, right) of a two-dimensional window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns from the first tap to the last."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return (kh - 1) * dh + 1, (kw - 1) * dw + 1

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Output rows and columns (floor division, as ONNX with ceil_mode 0)."""
        top, left, bottom, right = self.pads
        rows, columns = self.span
        return (height + top + bottom - rows) // self.stride[0] + 1, (width + left + right - columns) // self.stride[
            1
        ] + 1

    def attributes(self) -> dict[str, tuple[int, ...]]:
        """As `Node.attributes`."""
        return {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation, "pads": self.pads}

    def fields(self) -> dict[str, int]:
        """As members of the C layer struct. Pads at the far ends follow from the output size."""
        return {
            "kernel_height": self.kernel[0],
            "kernel_width": self.kernel[1],
            "stride_height": self.stride[0],
            "stride_width": self.stride[1],
            "dilation_height": self.dilation[0],
            "dilation_width": self.dilation[1],
            "pad_top": self.pads[0],
            "pad_left": self.pads[1],
        }


def of(node: Node) -> Window:
    """The window that `parse` stored in a node."""
    a = node.attributes
    return Window(a["kernel"], a["stride"], a["dilation"], a["pads"])


def parse(node: FloatOp, kernel: tuple[int, int]) -> Window:
    """The window of a Conv or pool node, auto_pad and ceil_mode resolved against the shapes of its tensors.

    ceil_mode becomes more padding at the bottom and right: the extra taps read no input, as ONNX defines it.
    """
    a = node.attributes
    x = node.inputs[0]
    assert x is not None
    _, _, height, width = four(x, "its input")  # pyright: ignore[reportArgumentType]
    _, _, rows, columns = four(node.output, "its output")
    stride = _pair(a.get("strides", (1, 1)), "strides")
    dilation = _pair(a.get("dilations", (1, 1)), "dilations")
    pads = tuple(int(p) for p in a.get("pads", (0, 0, 0, 0)))
    if len(pads) != 4 or min(pads) < 0:
        raise Unsupported(f"pads {list(pads)}; four numbers of at least 0 are supported")
    auto = a.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else str(auto)
    window = Window(kernel, stride, dilation, (pads[0], pads[1], pads[2], pads[3]))
    if auto == "VALID":
        window = Window(kernel, stride, dilation, (0, 0, 0, 0))
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((-(-size // step) - 1) * step + span - size, 0)
            for size, step, span in zip((height, width), stride, window.span, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        first, last = (less, more) if auto == "SAME_UPPER" else (more, less)
        window = Window(kernel, stride, dilation, (first[0], first[1], last[0], last[1]))
    elif auto != "NOTSET":
        raise Unsupported(f"auto_pad '{auto}'; NOTSET, VALID, SAME_UPPER and SAME_LOWER are supported")
    if flag(a, "ceil_mode"):
        (span_h, span_w), (top, left, _, _) = window.span, window.pads
        bottom = (rows - 1) * stride[0] + span_h - height - top
        right = (columns - 1) * stride[1] + span_w - width - left
        window = Window(kernel, stride, dilation, (top, left, max(bottom, 0), max(right, 0)))
    if window.output(height, width) != (rows, columns):
        raise Unsupported(f"its output is {rows} x {columns}; its window gives {window.output(height, width)}")
    return window


def patches(x: Array, window: Window, fill: int) -> Array:
    """Every window of x (n, c, h, w) padded with `fill`, as a view (n, c, out_h, out_w, kh, kw)."""
    top, left, bottom, right = window.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, window.span, axis=(2, 3))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return view[:, :, :: window.stride[0], :: window.stride[1], :: window.dilation[0], :: window.dilation[1]]


def taps(x: Array, window: Window, fill: float) -> Iterator[Array]:
    """For each tap in row-major order, what it reads at every output position: (n, c, out_h, out_w)."""
    view = patches(x, window, fill)  # pyright: ignore[reportArgumentType]
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            yield view[..., i, j]


def _pair(values: object, what: str) -> tuple[int, int]:
    found = tuple(int(v) for v in np.atleast_1d(np.asarray(values)))
    if len(found) != 2 or min(found) < 1:
        raise Unsupported(f"{what} {list(found)}; two numbers of at least 1 are supported")
    return found[0], found[1]


def kernel(node: FloatOp) -> tuple[int, int]:
    """Attribute kernel_shape of a pool."""
    return _pair(node.attributes.get("kernel_shape", ()), "kernel_shape")


def pool_fields(node: Node) -> dict[str, int]:
    """Shape members of a pool's C layer struct."""
    _, channels, height, width = node.inputs[0].shape
    _, _, rows, columns = node.output.shape
    return {
        "in_height": height,
        "in_width": width,
        "channels": channels,
        "out_height": rows,
        "out_width": columns,
        **of(node).fields(),
    }
