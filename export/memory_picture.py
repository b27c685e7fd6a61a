"""The arena over time as an SVG picture: steps from left to right, bytes from bottom to top, one rectangle a buffer.

Plain text, the same for the same plan. Where an output lies over an input that dies, both show through. A pointer on a rectangle
shows its name, place and life.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

from . import planner
from .memory import Memory

HEIGHT = 420
"""of the arena"""
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 58, 150
PAGE = 1080.0
"""width that the steps share, as far as these limits allow:"""
WIDEST, READABLE, NARROWEST = 78.0, 50.0, 5.0
"""a step is at most, at least where there are not many, and at least"""
MANY = 60
LETTER = 6.2
"""width of a character of the labels"""
COLOURS = ("#4878a8", "#6a9f58", "#c98a3a", "#8a6bb0", "#b5606b", "#4f9c98")
WORK, EDGE, INK, MARK = "#9a9a9a", "#333333", "#222222", "#c0392b"
UNPRINTABLE = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""characters that XML does not allow, even escaped"""


def draw(memory: Memory, steps: Sequence[str], title: str) -> str:
    """The picture of a plan; `steps` names the layer of each step."""
    plan = memory.plan
    count = len(steps)
    step = min(WIDEST, max(READABLE if count <= MANY else NARROWEST, PAGE / (count + 2)))
    width = LEFT + step * (count + 2) + RIGHT  # one column more for the inputs, one for the outputs
    most = max(plan.arena, 1)

    def x(at: int) -> float:
        return LEFT + step * (at + 1)

    def y(byte: int) -> float:
        return TOP + HEIGHT * (1 - byte / most)

    at, _ = plan.peak()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{TOP + HEIGHT + BOTTOM}" '
        f'viewBox="0 0 {width:.0f} {TOP + HEIGHT + BOTTOM}" font-family="sans-serif" font-size="11" fill="{INK}">',
        f'<rect width="{width:.0f}" height="{TOP + HEIGHT + BOTTOM}" fill="#ffffff"/>',
        _text(LEFT, 20, f"{title}: memory of activations", 'font-size="15"'),
        _text(LEFT, 38, _summary(memory)),
        f'<rect x="{LEFT}" y="{TOP}" width="{step * (count + 2):.1f}" height="{HEIGHT}" fill="#f6f6f6"/>',
        f'<rect x="{x(at):.1f}" y="{TOP}" width="{step:.1f}" height="{HEIGHT}" fill="{MARK}" fill-opacity="0.12"/>',
    ]
    parts += [line for byte in _ticks(most) for line in _grid(byte, y(byte), x(count + 1))]
    colours: dict[str, str] = {}
    labels: list[str] = []
    for placed in plan.placed:
        buffer = placed.buffer
        if not buffer.size:
            continue
        work = buffer.name not in memory.views
        fill = WORK if work else colours.setdefault(buffer.slot or buffer.name, COLOURS[len(colours) % len(COLOURS)])
        left, right = x(buffer.first), x(buffer.last + 1)
        height = HEIGHT * buffer.size / most
        parts.append(_rectangle(placed, fill, left, right - left, y(placed.end), height))
        labels += _label(buffer, left, step if right - left < 2.5 * step else right - left, y(placed.end), height)
    parts += labels
    parts.append(
        f'<rect x="{LEFT}" y="{TOP}" width="{step * (count + 2):.1f}" height="{HEIGHT}" fill="none" stroke="{EDGE}"/>'
    )
    parts += _steps(steps, step, at, x)
    return "\n".join([*parts, "</svg>", ""])


def _summary(memory: Memory) -> str:
    plan = memory.plan
    proof = "no plan is smaller" if plan.optimal else f"no plan has less than {plan.least:,}"
    return f"{plan.arena:,} bytes ({proof}); tensors alive at once: up to {memory.bound:,}; red: the fullest step"


def _ticks(most: int) -> list[int]:
    """About six round numbers of bytes from 0."""
    unit = 1
    while most / unit > 6:
        unit *= 2
    return list(range(0, most + 1, unit))


def _grid(byte: int, height: float, right: float) -> list[str]:
    return [
        f'<path d="M{LEFT} {height:.1f}H{right:.1f}" stroke="#dddddd"/>',
        _text(LEFT - 6, height + 4, f"{byte:,}", 'text-anchor="end"'),
    ]


def _rectangle(placed: planner.Placed, fill: str, left: float, width: float, top: float, height: float) -> str:
    buffer = placed.buffer
    life = "before the first layer" if buffer.first < 0 else f"step {buffer.first}"
    facts = f"{buffer.name}: {buffer.size:,} bytes from {placed.offset:,}, {life} to step {buffer.last}"
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" fill-opacity="0.62" '
        f'stroke="{EDGE}" stroke-width="0.6"><title>{_safe(facts)}</title></rect>'
    )


def _label(buffer: planner.Buffer, left: float, width: float, top: float, height: float) -> list[str]:
    """Name and bytes as far as they fit; a short life's stand in its first step, where later buffers do not lie over them."""
    letters = int((width - 4) / LETTER)
    lines = [_fit(buffer.name, letters), _fit(f"{buffer.size:,}", letters)]
    return [
        _text(left + 3, top + 12 + 13 * i, line, 'pointer-events="none"')
        for i, line in enumerate(lines)
        if line and height >= 13 * (i + 1) + 2
    ]


def _steps(steps: Sequence[str], step: float, fullest: int, x: Callable[[int], float]) -> list[str]:
    """Layer names below, turned; where steps are narrow, only as many as can be read, and the fullest one."""
    every = max(1, round(13 / step + 0.49))
    found: list[str] = []
    for i, name in enumerate(steps):
        if i != fullest and (i % every or abs(i - fullest) < every):
            continue
        at = x(i) + step / 2 + 4
        style = f'transform="rotate(-60 {at:.1f} {TOP + HEIGHT + 14})" text-anchor="end"'
        found.append(_text(at, TOP + HEIGHT + 14, _fit(name, 24), style + (f' fill="{MARK}"' if i == fullest else "")))
    return found


def _fit(text: str, letters: int) -> str:
    """The text, its middle left out where it is too long; empty where nothing readable is left."""
    if len(text) <= letters:
        return text
    if letters < 5:
        return ""
    return f"{text[: (letters - 1) // 2]}…{text[len(text) - (letters - 1 - (letters - 1) // 2) :]}"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{_safe(text)}</text>'.replace(" >", ">")


def _safe(text: str) -> str:
    return escape(UNPRINTABLE.sub("�", text), quote=True)
