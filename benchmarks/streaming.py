"""Memory of a compression against the size of the checkpoint, what a dry run foretells, and resuming after a kill.

    python benchmarks/streaming.py [--layers 4 8 16 32] [--width 1024] [--recipe w4a16-rtn] [--json]

Llama-shaped checkpoints of random 16-bit weights that differ in depth alone are compressed by the command line, each in a process of
its own. Peak memory is the process's own figure (getrusage); it is bounded by a block and must not grow with the depth. The deepest
checkpoint is then compressed again, killed (SIGKILL) when half of its blocks are done, and taken up: both outputs must be the same.
"""

import argparse
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 4096
SHARD = 4
"""layers in a file"""


def checkpoint(folder, layers, width):
    """A sharded Hugging Face folder with random weights; returns their bytes."""
    folder.mkdir()
    inner, small = width * 11 // 4, width // 4
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 256,
        "max_position_embeddings": 2048, "vocab_size": VOCABULARY, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator, index = torch.Generator().manual_seed(0), {}

    def drawn(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    def write(name, tensors):
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        return sum(t.numel() * t.element_size() for t in tensors.values())

    ones = torch.ones(width, dtype=torch.bfloat16)
    total = write(
        "model-00.safetensors", {"model.embed_tokens.weight": drawn(VOCABULARY, width), "model.norm.weight": ones}
    )
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (small, width),
        "self_attn.v_proj": (small, width),
    }
    shapes |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    shapes |= {"mlp.down_proj": (width, inner)}
    for start in range(0, layers, SHARD):
        tensors = {}
        for layer in range(start, min(start + SHARD, layers)):
            place = f"model.layers.{layer}."
            tensors |= {f"{place}{n}.weight": drawn(*s) for n, s in shapes.items()}
            tensors |= {f"{place}{n}.weight": ones.clone() for n in ("input_layernorm", "post_attention_layernorm")}
        total += write(f"model-{start + 1:02d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def command(model, data, recipe, output, *more):
    return [sys.executable, "-c", "from planish.cli import main; main()", "compress", str(model), "-d", str(data), "-r", recipe, "-o", str(output), "--json", *more]  # fmt: skip


def run(words):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def resumed(model, data, recipe, output, blocks):
    """Kill a run when `blocks` are done and take it up: (blocks taken over, seconds of the second run)."""
    part = output.with_name(output.name + ".partial")
    process = subprocess.Popen(
        command(model, data, recipe, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(found := list(part.rglob("*.safetensors"))) < blocks and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = time.perf_counter()
    run(command(model, data, recipe, output))
    return len(found), time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--recipe", default="w4a16-rtn", help="one whose passes foresee what they store")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    say = sys.stderr if arguments.json else sys.stdout
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        data = place / "tokens.npz"
        import numpy as np

        np.savez(data, input_ids=np.random.default_rng(0).integers(0, VOCABULARY, (16, 64)))
        for layers in sorted(arguments.layers):
            model = place / f"model{layers}"
            size = checkpoint(model, layers, arguments.width)
            foretold = run(command(model, data, arguments.recipe, place / "none", "--dry-run"))
            report = run(command(model, data, arguments.recipe, place / f"out{layers}"))
            row = {"layers": layers, "checkpoint_bytes": size, "peak_bytes": report["peak_memory_bytes"], "seconds": report["seconds"]}  # fmt: skip
            row |= {"foretold_peak_bytes": foretold["peak_memory_bytes"], "bytes": report["bytes"], "foretold_bytes": foretold["bytes"]}  # fmt: skip
            rows.append(row)
            print(f"{layers:3} layers  checkpoint {size / 2**20:8.1f} MiB   peak {row['peak_bytes'] / 2**20:7.1f} MiB (foretold {row['foretold_peak_bytes'] / 2**20:7.1f})   compressed {row['bytes']:,} bytes (foretold {row['foretold_bytes']:,})   {row['seconds']:.1f} s", file=say, flush=True)  # fmt: skip
        taken, seconds = resumed(model, data, arguments.recipe, place / "again", layers // 2)
        names = [p.name for p in (place / f"out{layers}").iterdir()]
        _, different, absent = filecmp.cmpfiles(place / f"out{layers}", place / "again", names, shallow=False)
        same = not different and not absent
        print(f"killed behind {taken} blocks and taken up in {seconds:.1f} s: {'the same bytes' if same else 'OTHER BYTES'}", file=say)  # fmt: skip
    grown = rows[-1]["peak_bytes"] - rows[0]["peak_bytes"]
    more = rows[-1]["checkpoint_bytes"] - rows[0]["checkpoint_bytes"]
    print(f"peak memory grew by {grown / 2**20:.1f} MiB for {more / 2**20:.1f} MiB more of weights", file=say)
    if arguments.json:
        print(json.dumps({"rows": rows, "resume": {"blocks": taken, "same": same}}))


if __name__ == "__main__":
    main()
