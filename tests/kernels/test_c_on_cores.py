"""The C kernels give the same bits on every core: with an FPU and fused multiply-add, and in software floating point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.kernels import op as contract

C = Path(contract.__file__).parent / "c"
CORES = {
    "cortex-m0plus": ("thumb-freestanding-eabi", "cortex_m0plus"),
    "cortex-m4": ("thumb-freestanding-eabihf", "cortex_m4+vfp4d16sp"),
}
FLASH, RAM, STACK = 0x08000000, 0x20000000, 0x10000000
SCRIPT = """
SECTIONS {
    . = 0x08000000;
    .text : { *(.text*) }
    .rodata : { *(.rodata*) }
    .ARM.exidx : { *(.ARM.exidx*) }
    .data : { *(.data*) }
    .bss : { *(.bss*) }
}
"""


@pytest.mark.parametrize("core", sorted(CORES))
def test_same_bits(core: str, bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    unicorn = pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is not installed (extra 'mcu')")
    from unicorn import arm_const

    text, nodes = bench.harness()
    runs = [f"run_{name}_{i}" for name, found in nodes.items() for i, (_, call) in enumerate(found) if call is not None]
    main = "void *const entries[] = {" + ", ".join(f"(void *){r}" for r in runs) + "};\n"
    (tmp_path / "harness.c").write_text(text + main + "void *const *start(void) { return entries; }\n")
    (tmp_path / "link.ld").write_text(SCRIPT)
    target, cpu = CORES[core]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, f"-mcpu={cpu}", "-O2", "-std=c99", "-w"]
    command += ["-ffp-contract=off", "-nostartfiles", "-Wl,-e,start", "-T", str(tmp_path / "link.ld"), f"-I{C}"]
    command += [str(p) for p in sorted(C.glob("*.c"))] + [str(tmp_path / "harness.c"), "-o", str(tmp_path / "out.elf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]

    models = {
        "cortex-m0plus": arm_const.UC_CPU_ARM_CORTEX_M0,
        "cortex-m4": arm_const.UC_CPU_ARM_CORTEX_M4,
    }
    machine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
    machine.ctl_set_cpu_model(models[core])
    for base in (FLASH, RAM, STACK):
        machine.mem_map(base, 1 << 22)
    addresses: dict[str, int] = {}
    with (tmp_path / "out.elf").open("rb") as file:
        elf = elffile.ELFFile(file)
        for segment in elf.iter_segments():
            if segment["p_type"] == "PT_LOAD" and segment["p_filesz"]:
                machine.mem_write(segment["p_vaddr"], segment.data())
        for symbol in elf.get_section_by_name(".symtab").iter_symbols():
            addresses[symbol.name] = symbol["st_value"]

    rng = np.random.default_rng(12)
    for name, found in nodes.items():
        for i, (node, call) in enumerate(found):
            if call is None:
                continue
            inputs = bench.random_inputs(rng, node, 1)
            expected = bench.layout.to_memory(bench.op(name).reference(node, *inputs))[0]
            address, pointers = RAM + 64, []
            for x in inputs:
                machine.mem_write(address, bench.layout.to_memory(x).tobytes())
                pointers.append(address)
                address += x.size + 1  # odd addresses too: no kernel may assume alignment
            machine.mem_write(RAM, np.array(pointers, np.uint32).tobytes())
            y, scratch = address, (address + node.output.size + 3) & ~3  # scratch holds numbers
            if call.updates is not None:
                machine.mem_write(y, bench.layout.to_memory(inputs[call.updates]).tobytes())
            for register, value in zip((0, 1, 2), (RAM, y, scratch), strict=True):
                machine.reg_write(arm_const.UC_ARM_REG_R0 + register, value)
            machine.reg_write(arm_const.UC_ARM_REG_SP, STACK + (1 << 22))
            machine.reg_write(arm_const.UC_ARM_REG_LR, RAM + (1 << 22) - 16 | 1)
            machine.emu_start(addresses[f"run_{name}_{i}"] | 1, RAM + (1 << 22) - 16)
            got = np.frombuffer(bytes(machine.mem_read(y, node.output.size)), np.int8)
            np.testing.assert_array_equal(got, expected, err_msg=f"{name} example {i} on {core}")
