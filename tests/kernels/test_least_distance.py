"""Every version of every op with its output at the least distance from its input that it allows, neighbours close by.

The planner uses what `Call.overlap` and `Call.in_place` allow only where that saves memory. Here every pair uses it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from planish.export import planner
from planish.kernels.op import Node, ops

pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")

OPS = ("conv2d", "depthwise_conv2d", "fully_connected", "add", "mul", "average_pool", "max_pool", "global_average_pool",
       "layer_norm", "softmax", "clamp", "lookup")  # fmt: skip


def close(
    buffers: Iterable[planner.Buffer], alignment: int = 4, sharings: Iterable[planner.Sharing] = ()
) -> planner.Plan:
    """A plan in which every output that may lie over an input does so as closely as it may."""
    given, shared = list(buffers), list(sharings)
    size = {b.name: b.size for b in given}
    offsets: dict[str, int] = {}
    at = 0

    def aligned(value: int) -> int:
        return -(-value // alignment) * alignment

    for s in shared:
        if s.output not in offsets and s.input not in offsets:
            distance = 0 if s.distance is None else aligned(s.distance)
            offsets[s.output], offsets[s.input] = at, at + distance
            at = aligned(max(at + size[s.output], at + distance + size[s.input]))
    for buffer in given:
        if buffer.name not in offsets:
            offsets[buffer.name] = at
            at = aligned(at + buffer.size)
    placed = tuple(planner.Placed(b, offsets[b.name]) for b in given)
    return planner.Plan(placed, at, planner.least(given), alignment, tuple(shared), at)


def nodes(bench: Any, op: str) -> list[Node]:
    """The op's examples that run code and are small."""
    found = [bench.node_of(op, e) for e in bench.examples(op)]
    return [n for n in found if not ops()[op].alias(n)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ["stm32f446", "rp2040", pytest.param("corstone-300", marks=pytest.mark.qemu)])
def test_at_the_least_distance(
    op: str, target: str, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "corstone-300" and shutil.which("qemu-system-arm") is None:
        pytest.skip("qemu-system-arm is not installed")
    found = nodes(bench, op)
    monkeypatch.setattr(planner, "plan", close)
    bench.equal_reference(found, target, tmp_path)
