"""The picture of the arena: well-formed, complete, and the same for the same plan."""

from xml.etree import ElementTree

import pytest
from planish.export import memory, memory_picture, planner, qdq

SVG = "{http://www.w3.org/2000/svg}"


def planned(tiny, name):
    graph = qdq.read(tiny(name)[0])
    silent = memory.idle(graph)
    calls = {n.name: graph.ops[n.op].call(n) for n in graph.nodes if n.name not in silent}
    return memory.of(graph, calls), [n.name for n in graph.nodes]


def rectangles(picture):
    """(title, x, y, width, height) of every buffer."""
    root = ElementTree.fromstring(picture)
    return [
        (r[0].text, *(float(r.get(k)) for k in ("x", "y", "width", "height")))
        for r in root.iter(f"{SVG}rect")
        if len(r) and r[0].tag == f"{SVG}title"
    ]


@pytest.mark.parametrize("name", ["residual", "branches"])
def test_every_buffer_is_drawn_in_its_place(tiny, name):
    found, steps = planned(tiny, name)
    picture = memory_picture.draw(found, steps, "tiny")
    drawn = rectangles(picture)
    assert len(drawn) == sum(1 for p in found.plan.placed if p.buffer.size)
    scale = memory_picture.HEIGHT / found.plan.arena
    step = min(
        width / (p.buffer.last - p.buffer.first + 1) for p, (*_, width, _) in zip(found.plan.placed, drawn, strict=True)
    )
    for placed, (title, x, y, width, height) in zip(found.plan.placed, drawn, strict=True):
        buffer = placed.buffer
        assert f"{buffer.name}: {buffer.size:,} bytes from {placed.offset:,}" in title
        assert height == pytest.approx(buffer.size * scale, abs=0.1)
        assert memory_picture.TOP + memory_picture.HEIGHT - y - height == pytest.approx(placed.offset * scale, abs=0.2)
        assert width == pytest.approx(step * (buffer.last - buffer.first + 1), abs=0.2)
        assert x == pytest.approx(memory_picture.LEFT + step * (buffer.first + 1), abs=0.2)
    assert f"{found.plan.arena:,} bytes" in picture
    assert picture == memory_picture.draw(found, steps, "tiny")


@pytest.mark.parametrize("name", ['a<b>&"c"', "é\x00\ud800", "x" * 300, ""])
def test_any_name_gives_a_well_formed_picture(name):
    buffers = [planner.Buffer(name, 64, -1, 0), planner.Buffer("y", 32, 0, 1)]
    plan = planner.plan(buffers)
    found = memory.Memory(plan, 96, {}, {}, {})
    assert len(rectangles(memory_picture.draw(found, [name], name).encode())) == 2


def test_many_steps_and_none():
    buffers = [planner.Buffer(f"t{i}", 64, i, i + 1) for i in range(300)]
    found = memory.Memory(planner.plan(buffers), 128, {}, {}, {})
    assert len(rectangles(memory_picture.draw(found, [f"s{i}" for i in range(301)], "many"))) == 300
    empty = memory.Memory(planner.plan([]), 0, {}, {}, {})
    assert rectangles(memory_picture.draw(empty, [], "empty")) == []
