"""Tokens a second of a Llama-shaped decoder of 1B parameters as artifacts for a GPU: w4a16 and bfloat16. Random weights.

    python benchmarks/gpu_decoder.py [--tiny] [--target cuda-sm90]

--tiny is the whole way on a network of a megabyte, on the CPU too: `planish compress`, `planish export`, the decode program with its caches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import planish
import torch
from planish.export import artifact
from planish.runtimes import cuda, cuda_decode, cuda_device

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
"""Llama-3.2-1B"""
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
PROMPT, STEPS, ROUNDS = 128, 128, 5


def checkpoint(folder: Path, shape: dict[str, int]) -> None:
    """A Hugging Face folder with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def decoder(folder: Path, device: str) -> cuda_decode.Decoder:
    """An artifact's decode program, captured in a CUDA graph on a GPU, with a prompt read."""
    model = cuda.read(artifact.load(folder))
    made = cuda_decode.static(cuda.on(model, torch.device("cuda", 0)) if device == "cuda" else model)
    capture = (lambda step: cuda_device.Captured(step).replay) if device == "cuda" else None
    found = cuda_decode.Decoder(made, PROMPT + STEPS + 1, device, capture)
    found.read(torch.randint(0, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0)))
    return found


def rate(found: cuda_decode.Decoder, device: str) -> float:
    """Tokens a second over STEPS steps behind the prompt."""
    found.rewind(PROMPT)
    found.step()
    if device == "cuda":
        cuda_device.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS - 1):
        found.step()
    if device == "cuda":
        cuda_device.synchronize()
    return (STEPS - 1) / (time.perf_counter() - start)


def measure(shape: dict[str, int], target: str, device: str) -> tuple[float, float]:
    """(w4a16, bfloat16) tokens a second, alternating; medians."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        checkpoint(root / "hf", shape)
        planish.compress(str(root / "hf"), target=target, recipe="w4a16-rtn", output=root / "w4")
        planish.export(str(root / "w4"), target=target, format="pt2", output=root / "ours")
        planish.export(str(root / "hf"), target=target, format="pt2", output=root / "base")
        both = [decoder(root / name, device) for name in ("ours", "base")]
        rates: list[list[float]] = [[], []]
        for _ in range(ROUNDS if device == "cuda" else 1):
            for index, item in enumerate(both):
                rates[index].append(rate(item, device))
        return statistics.median(rates[0]), statistics.median(rates[1])


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--target", default="cuda-sm90")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no CUDA device; --tiny runs a small network through the references on the CPU")
    ours, base = measure(TINY if options.tiny else LARGE, options.target, device)
    print(f"{device}: {ours:.1f} tokens/s in w4a16, {base:.1f} in bfloat16, {ours / base:.2f}x")


if __name__ == "__main__":
    main()
