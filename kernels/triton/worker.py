"""`python -m planish.kernels.triton.worker JOBS ANSWER`: the process behind ahead.compile_all."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .ahead import LOCAL, TENSOR_CORES

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
"""where Triton's wheel has NVIDIA's assembler and disassembler"""
WARP = 32


def compiled(variant: dict[str, Any], core: str, keep: Path | None, stem: str) -> dict[str, Any]:
    """The fields of ahead.Compiled."""
    function = getattr(importlib.import_module(f".{variant['module']}", __package__), variant["kernel"])
    names = function.arg_names
    unknown = (set(variant["types"]) | set(variant["constants"])) ^ set(names)
    if unknown:
        raise ValueError(f"arguments {sorted(unknown)} are of the variant or of the kernel alone")
    signature = {n: variant["types"].get(n, "constexpr") for n in names}
    aligned = [
        i
        for i, n in enumerate(names)
        if n in variant["types"] and n not in variant["unaligned"] and signature[n] != "fp32"
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(i,): variant["constants"][n] for i, n in enumerate(names) if n in variant["constants"]},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": variant["warps"], "num_stages": variant["stages"], "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", int(core.removeprefix("sm_")), WARP), options=options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = {kind: folder / f"{stem}.{kind}" for kind in ("ptx", "cubin", "sass", "ttgir")}
        files["ptx"].write_text(made.asm["ptx"])
        files["ttgir"].write_text(made.asm["ttgir"])
        files["cubin"].write_bytes(made.asm["cubin"])
        files["sass"].write_text(_tool("nvdisasm", "-c", str(files["cubin"])))
        usage = _tool("cuobjdump", "--dump-resource-usage", str(files["cubin"]))
        counts = _mnemonics(files["sass"].read_text())
    return {
        "core": core,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "shared_bytes": made.metadata.shared,
        "stack_bytes": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spills": sum(counts[n] for n in LOCAL),
        "tensor_cores": {n: counts[n] for n in TENSOR_CORES if counts[n]},
        "instructions": dict(sorted(counts.items())),
        "threads": made.metadata.num_warps * WARP,
        "name": made.metadata.name,
        "files": {k: str(v) for k, v in files.items()} if keep else {},
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _mnemonics(sass: str) -> Counter[str]:
    """Instructions by mnemonic: lines like `/*0070*/ @!P0 IMAD.WIDE R2, ... ;`."""
    found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)
    return Counter(found)


def main() -> None:
    """Compile what the jobs file asks for; one line of JSON a variant."""
    jobs, answer = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    keep = Path(jobs["keep"]) if jobs["keep"] else None
    with answer.open("w", encoding="utf-8") as sink:
        for index, variant in jobs["variants"].items():
            stem = f"{variant['module']}-{variant['kernel']}-{index}-{jobs['core']}"
            try:
                line = {"index": int(index), "compiled": compiled(variant, jobs["core"], keep, stem)}
            except (
                Exception
            ) as error:  # Triton and ptxas raise many unrelated types; each becomes the caller's one line
                text = [t for t in str(error).strip().splitlines() if t.strip()]
                line = {"index": int(index), "error": f"{type(error).__name__}: {text[-1] if text else ''}"}
            sink.write(json.dumps(line) + "\n")
            sink.flush()


if __name__ == "__main__":
    main()
