"""Format `c`: a C99 project for a microcontroller, from a quantized (QDQ) ONNX model.

No allocation, no standard library in the model: static calls, constant weights in flash, activations in one planned arena.
The outputs are the integer contract's (kernels/integer.py), which ONNX Runtime's are too, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ..common import files
from ..common.errors import PlanishError
from ..kernels import layout
from ..targets.target import Target
from . import c_project, firmware, memory_picture, onnx, patches, qdq, serial
from .c_project import Border, CArray, Project
from .format import Format, Source, Written
from .graph import Graph

TEMPLATES = Path(__file__).parent / "c_templates"
MODEL = "model.json"
"""what the runtimes need to know about the project: names, layers, memory"""
PICTURE = "memory.svg"
"""the arena over time"""
CODE_ESTIMATE = 12 * 1024
"""bytes of code where no compiler is there to tell: the largest of the benchmark networks needs about this much"""


class C(Format):
    """C99 sources, header, build files, known-answer test, linker script and firmware; runs on any MCU, here in `c` or `emulator`."""

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Write the project; link firmware.elf when the target is a microcontroller and ziglang is installed."""
        if target.kind == "gpu":
            raise PlanishError(
                f"format 'c' is for microcontrollers and CPUs; target '{target.name}' is a GPU, which takes pt2, tvm, onnx or onnx_tensorrt"
            )
        graph = source.graph or qdq.read(source.onnx)
        answers = graph.reference(source.golden_inputs)
        warnings: list[str] = []
        facts, flash, ram = write_project(graph, source.name, target, source.golden_inputs, folder, warnings)
        shapes = {v.name: onnx.describe(v)["shape"] for v in [*source.onnx.graph.input, *source.onnx.graph.output]}
        details = {k: v for k, v in facts.items() if k not in ("inputs", "outputs", "name")}
        inputs, outputs = (
            [
                {k: v for k, v in b.items() if k not in ("size", "offset")} | {"shape": shapes[b["name"]]}
                for b in facts[side]
            ]
            for side in ("inputs", "outputs")
        )
        return Written(inputs, outputs, flash, ram, details, tuple(warnings), answers=answers)


def write_project(
    graph: Graph,
    name: str,
    target: Target,
    golden: Mapping[str, np.ndarray],
    folder: Path,
    warnings: list[str],
) -> tuple[dict[str, Any], int | None, int | None]:
    """Write a deployment graph as a C project into `folder`: the facts about it, and bytes of flash and RAM where the target
    is a microcontroller. `golden` are inputs of the model, of which the first sample becomes the known-answer test.
    """
    project, patched = fitted(graph, name, target)
    check_budget(project, target)
    _write_sources(project, target, golden, folder)
    picture = memory_picture.draw(project.memory, [n.name for n in project.graph.nodes], project.title)
    (folder / PICTURE).write_text(picture, encoding="utf-8", newline="\n")
    facts = _facts(project)
    if patched is not None:
        facts["patches"] = patched.facts()
        warnings.append(f"whole maps do not fit the RAM; in patches: {patched.summary()}")
    if target.flash is not None and target.ram is not None:
        facts["regions"] = {"flash": target.flash.model_dump(), "ram": target.ram.model_dump()}
    flash: int | None = None
    ram: int | None = None
    if target.flash is not None:
        flash, ram, sizes = _link(project, target, folder, warnings)
        facts |= sizes
    (folder / MODEL).write_text(files.to_json(facts), encoding="utf-8")
    return facts, flash, ram


def fitted(graph: Graph, name: str, target: Target) -> tuple[Project, patches.Patched | None]:
    """The project, its first layers in patches where the target's RAM is too small for whole maps."""
    whole = c_project.build(graph, name, target.features)
    room = None if target.ram is None else target.ram.length - firmware.STACK
    if room is None or whole.memory.plan.arena <= room:
        return whole, None
    known: c_project.Known = {}
    found = patches.choose(graph, lambda g: c_project.calls_of(g, target.features, known), room)
    if found is None or found.arena > room:
        return whole, None
    return c_project.build(found.graph, name, target.features), found


def sources_of(project: Project) -> list[str]:
    """C files of the model, relative to the project's folder."""
    return [
        f"{project.name}.c",
        f"{project.name}_weights.c",
        *(f"kernels/{s}" for s in (*project.kernel_sources, *(i.file for i in project.instances))),
    ]


def check_budget(project: Project, target: Target) -> None:
    """Raise PlanishError when the arena cannot fit in the target's RAM or the weights in its flash."""
    plan = project.memory.plan
    over_flash = target.flash is not None and project.weight_bytes > target.flash.length
    if target.ram is not None:
        needed = plan.arena + firmware.STACK
        if needed > target.ram.length:
            step, live = plan.peak()
            node = project.graph.nodes[step] if 0 <= step < len(project.graph.nodes) else None
            where = f"at layer '{node.name}' ({node.op})" if node is not None else "at the inputs"
            shapes = {t.name: c_project.shape_text(t.shape) for t in project.graph.tensors.values()}
            tensors = ", ".join(
                f"'{b.name}' {b.size} bytes" + (f" ({shapes[b.name]})" if b.name in shapes else "") for b in live
            )
            raise PlanishError(
                f"model '{project.title}' is too large for '{target.name}': {needed} bytes of RAM (arena {plan.arena}, stack "
                f"{firmware.STACK}), {needed - target.ram.length} over its {target.ram.length}; the peak is {where}: {tensors}"
                + (
                    f"; and its {project.weight_bytes} bytes of weights do not fit the flash either"
                    if over_flash
                    else ""
                )
            )
    if target.flash is not None and over_flash:
        sizes = sorted(((sum(a.values.nbytes for a in x.arrays), x.node.name) for x in project.layers), reverse=True)
        largest = ", ".join(f"'{n}' {b} bytes" for b, n in sizes[:3])
        raise PlanishError(
            f"model '{project.title}' is too large for '{target.name}': {project.weight_bytes} bytes of weights, "
            f"{project.weight_bytes - target.flash.length} over its {target.flash.length} of flash; the largest: {largest}"
        )


def _link(project: Project, target: Target, folder: Path, warnings: list[str]) -> tuple[int, int, dict[str, Any]]:
    """Flash and RAM bytes, and the facts about them: measured on the linked firmware, or estimated with a warning."""
    split: dict[str, Any]
    if firmware.available():
        sources = [*sources_of(project), "firmware/main.c", "firmware/startup.c"]
        sizes = firmware.link(folder, sources, f"firmware/{target.name}.ld", target, "firmware.elf")
        split = {**asdict(sizes), "stack_reserved": firmware.STACK}
        compiled = {"compiler": firmware.version(), "flags": [*firmware.flags(target), *firmware.OPTIMIZE]}
        return sizes.flash, sizes.ram + firmware.STACK, {"sizes": split, "toolchain": compiled}
    warnings.append(
        "ziglang is not installed (pip install 'planish[mcu]'): no firmware.elf; flash and RAM bytes are estimates"
    )
    constants = project.weight_bytes + 100 * len(project.layers)
    split = {
        "code": CODE_ESTIMATE,
        "constants": constants,
        "data": 0,
        "bss": project.memory.plan.arena,
        "stack_reserved": firmware.STACK,
    }
    return CODE_ESTIMATE + constants, project.memory.plan.arena + firmware.STACK, {"sizes": split, "toolchain": None}


def _facts(project: Project) -> dict[str, Any]:
    """What MODEL says about the project."""
    plan = project.memory.plan
    return {
        "name": project.name,
        "sources": sources_of(project),
        "macs": project.graph.macs,
        "inputs": [_border(b, project.name, "input") for b in project.inputs],
        "outputs": [_border(b, project.name, "output") for b in project.outputs],
        "layers": [
            {
                "name": x.node.name,
                "op": x.node.op,
                "kernel": x.function.removeprefix(f"{project.name}_").removeprefix("planish_"),
                "macs": x.macs,
                "bytes": sum(a.values.nbytes for a in x.arrays),
            }
            for x in project.layers
        ],
        "memory": {
            "arena": plan.arena,
            "bound": project.memory.bound,
            "least": plan.least,
            "weights": project.weight_bytes,
            "buffers": [
                {
                    "name": p.buffer.name,
                    "offset": p.offset,
                    "size": p.buffer.size,
                    "first": p.buffer.first,
                    "last": p.buffer.last,
                }
                for p in plan.placed
            ],
        },
    }


def _border(border: Border, name: str, direction: str) -> dict[str, Any]:
    port = border.port
    return {
        "name": port.name,
        "shape": list(port.shape),
        "dtype": port.dtype,
        "scale": float(port.tensor.scale),
        "zero_point": port.tensor.zero_point,
        "layout": border.layout,
        "order": list(port.order),
        "code_dtype": "int8",
        "function": f"{name}_{direction}{border.suffix}",
        "size": border.size,
        "offset": border.offset,
    }


def _write_sources(project: Project, target: Target, golden: Mapping[str, np.ndarray], folder: Path) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    name = project.name
    common = {
        "p": project,
        "target": target,
        "upper": name.upper(),
        "sources": sources_of(project),
        "stack": firmware.STACK,
        "safe": c_project.safe,
        "shape_text": c_project.shape_text,
    }
    outputs = {
        f"{name}.h": ("model.h.jinja", {"guard": f"{name.upper()}_H"}),
        f"{name}.c": ("model.c.jinja", {}),
        f"{name}_weights.h": ("weights.h.jinja", {"guard": f"{name.upper()}_WEIGHTS_H"}),
        f"{name}_weights.c": ("weights.c.jinja", {}),
        f"{name}_test.c": ("test.c.jinja", _golden(project, golden)),
    }
    flags = {"gcc_flags": "", "zig_flags": ""}
    if target.flash is not None:
        line = {"baud": serial.BAUD, "chunk": serial.CHUNK, "id": ""}
        flags = {
            "gcc_flags": " ".join(firmware.gcc_flags(target)),
            "zig_flags": " ".join([*firmware.flags(target), "-fno-sanitize=all"]),
        }
        outputs |= {
            "firmware/main.c": ("main.c.jinja", {}),
            "firmware/startup.c": ("startup.c.jinja", {}),
            f"firmware/{target.name}.ld": ("target.ld.jinja", {}),
            "firmware/board.h": ("board.h.jinja", line),
            "firmware/serial.c": ("serial.c.jinja", line),
        }
        if target.uart is not None:
            outputs[f"firmware/board_{target.uart.driver}.c"] = (f"board_{target.uart.driver}.c.jinja", line)
    outputs |= {f"kernels/{i.file}": ("instance.c.jinja", {"instance": i}) for i in project.instances}
    outputs |= {"Makefile": ("Makefile.jinja", flags), "CMakeLists.txt": ("CMakeLists.txt.jinja", flags)}
    for path, (template, extra) in outputs.items():
        (folder / path).parent.mkdir(exist_ok=True)
        if "id" in extra:  # the model's own files are written by now
            extra["id"] = serial.identity(folder, name)
        text = environment.get_template(template).render(**common, **extra)
        (folder / path).write_text(text, encoding="utf-8", newline="\n")
    for file in [*project.included, *project.kernel_sources]:
        (folder / "kernels" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(c_project.KERNELS / file, folder / "kernels" / file)


def _golden(project: Project, golden: Mapping[str, np.ndarray]) -> dict[str, list[tuple[Border, CArray]]]:
    """The first golden sample and the codes that the reference gives for it, in the order of memory."""
    inputs = {b.port.name: np.asarray(golden[b.port.name])[:1] for b in project.inputs if b.port.name in golden}
    codes = project.graph.codes(inputs)

    def arrays(borders: Iterable[Border]) -> list[tuple[Border, CArray]]:
        return [(b, CArray("", "", "int8_t", layout.to_memory(codes[b.port.tensor.name]), "")) for b in borders]

    return {"golden_inputs": arrays(project.inputs), "golden_outputs": arrays(project.outputs)}
