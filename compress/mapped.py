"""`Mapped`: a file whose tensors are read where they stand, page by page, instead of being copied into memory.

The mapping is private: whoever writes into such a tensor changes his own pages, never the file, and loses the change with the
next `release`. Passes replace tensors and do not write into them (`Model.editable`); `Model.copy` takes them into memory.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import zlib
from pathlib import Path

import safetensors
import torch

from ..common.errors import PlanishError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""the element types of a safetensors file that planish reads"""
CHUNK = 1 << 24
"""bytes that are read at a time where a whole file is gone through"""


class Mapped:
    """One file, mapped. The pages that were read stay in memory until `release`, or until the system needs the room."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map: mmap.mmap | bytearray = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size else bytearray()
            )
        self._start = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr() if self.size else 0

    @staticmethod
    def of_bytes(content: bytes | memoryview) -> Mapped:
        """The same interface to a file's content that is in memory."""
        made = object.__new__(Mapped)
        made._map, made.size, made._start = bytearray(content), len(content), 0
        return made

    def part(self, offset: int, size: int) -> bytes:
        """A part of the file."""
        return bytes(memoryview(self._map)[offset : offset + size])

    def file(self) -> io.RawIOBase:
        """A file object that reads the content from its beginning."""
        return _Reader(self)

    def crc32(self, offset: int, size: int) -> int:
        """Check sum of a part of the file; its pages are let go again."""
        found = 0
        for start in range(offset, offset + size, CHUNK):
            found = zlib.crc32(self.part(start, min(CHUNK, offset + size - start)), found)
            self.release()
        return found

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """The contiguous tensor whose first byte is at `offset`. The caller has checked that it lies within the file."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:  # a kernel may read aligned words only
            raw = bytearray(self._map[offset : offset + count * dtype.itemsize])
            return torch.frombuffer(raw, dtype=dtype).reshape(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's data is a part of the mapping."""
        return self._start <= tensor.data_ptr() < self._start + self.size

    def release(self) -> None:
        """Let go of all pages that were read; the next read of a tensor takes them from the file again."""
        if isinstance(self._map, mmap.mmap):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Reader(io.RawIOBase):
    """Sequential reading of a mapped file, for libraries that want a file object."""

    def __init__(self, source: Mapped) -> None:
        self._source, self._place = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._source.size)[whence])
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        end = self._source.size if size is None or size < 0 else min(self._place + size, self._source.size)
        found = self._source.part(self._place, max(0, end - self._place))
        self._place += len(found)
        return found


def safetensors_file(path: Path) -> tuple[Mapped, dict[str, torch.Tensor]]:
    """The mapping of a safetensors file and its tensors by name, in the file's order.

    Raises PlanishError for a missing, truncated or malformed file and for an element type that is not in DTYPES.
    """
    if not path.is_file():
        raise PlanishError(f"weights '{path}' do not exist")
    try:
        with safetensors.safe_open(path, "pt"):  # checks the header against the file's length, reads no tensor
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise PlanishError(f"weights '{path}' are damaged or no safetensors file: {reason}") from None
    header.pop("__metadata__", None)
    mapped = Mapped(path)
    found: dict[str, torch.Tensor] = {}
    for name, item in sorted(header.items(), key=lambda i: i[1]["data_offsets"]):
        if item["dtype"] not in DTYPES:
            raise PlanishError(f"weights '{path}': '{name}' has dtype {item['dtype']}; accepted: {', '.join(DTYPES)}")
        found[name] = mapped.tensor(DTYPES[item["dtype"]], tuple(item["shape"]), 8 + size + item["data_offsets"][0])
    return mapped, found
