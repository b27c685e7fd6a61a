"""Train one of the two small language models of benchmarks/weights on the data folder's text, on one CPU core.

    python benchmarks/train_text.py decoder|mamba -o FOLDER [--cpu-minutes 30] [--checkpoint FILE]

Writes a Hugging Face folder: config.json, model.safetensors (float16), tokenizer.json, tokenizer_config.json, and
training.json with the held-out perplexity. The learning rate follows the CPU time used (user and system, tokenizer
included), so that the budget is kept on a machine of any speed; the steps made, and so the weights, depend on the machine.
The weights kept are the best on held-out text. Needs transformers, tokenizers and a C compiler (for scan.c).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import text
import torch
from planish.common.errors import missing_extra
from planish.common.files import new_file, new_folder, to_json
from planish.runtimes.c import find_compiler
from torch import nn
from torch.nn import functional as F

VOCABULARY = 4096
CONTEXT = 256  # tokens of a training row and of an evaluation row
BATCH = 8  # rows of a step
PEAK = {"decoder": 2e-3, "mamba": 2e-3}  # learning rates
WARM_UP = 0.03  # of the budget
WEIGHT_DECAY = 0.1
DROPOUT = {"decoder": 0.25, "mamba": 0.35}  # on the embeddings and on what each block adds to the residual stream
EVALUATIONS = 16
SEED = 20261121


# --- the scan in C, as a function with a gradient


class Scan(torch.autograd.Function):
    """`scan.c`: x, delta (batch, time, channels), a (channels, state), b, c (batch, time, state) to y like x."""

    library: ctypes.CDLL

    @classmethod
    def compile(cls, state: int) -> None:
        """Build scan.c for this machine; the library stays loaded after its file is gone."""
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "scan.so"
            flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", f"-DSTATE={state}"]
            source = Path(__file__).with_name("scan.c")
            subprocess.run([*find_compiler(), *flags, str(source), "-o", str(library), "-lm"], check=True)
            cls.library = ctypes.CDLL(str(library))

    @staticmethod
    def _call(function: Any, shape: torch.Size, *tensors: torch.Tensor) -> None:
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
        function(*(ctypes.c_int64(n) for n in shape), *(ctypes.c_void_p(t.data_ptr()) for t in tensors))

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        operands = [t.detach().float().contiguous() for t in given]
        y = torch.empty_like(operands[0])
        Scan._call(Scan.library.scan_forward, y.shape, *operands, y)
        ctx.save_for_backward(*operands)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        operands = ctx.saved_tensors
        results = [torch.zeros_like(t) for t in operands]
        work = torch.empty(2 * (operands[0].shape[1] + 1), operands[2].shape[1])
        Scan._call(
            Scan.library.scan_backward, operands[0].shape, *operands, gradients[0].float().contiguous(), *results, work
        )
        return tuple(results)


def fast_mixer(mixer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What transformers' MambaMixer computes for `hidden` (batch, time, width) without a cache, time loop in C."""
    m: Any = mixer
    x, gate = m.in_proj(hidden).chunk(2, dim=-1)  # (batch, time, channels) each
    taps = m.conv1d.weight[:, 0]  # (channels, taps)
    padded = F.pad(x.float(), (0, 0, taps.shape[1] - 1, 0))
    x = F.silu(sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(taps.shape[1])) + m.conv1d.bias)
    step, b, c = m.x_proj(x).split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], dim=-1)
    delta = F.softplus(m.dt_proj(step).float())
    y: Any = Scan.apply(x, delta, -torch.exp(m.A_log), b, c)
    return m.out_proj((y + x * m.D) * F.silu(gate))


# --- the two models


def make(kind: str) -> Any:
    """A fresh transformers model, float32."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise missing_extra("transformers", "hf", "training the language models") from error

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "decoder":
        config = transformers.LlamaConfig(
            **common,
            num_hidden_layers=6,
            intermediate_size=768,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * CONTEXT,
            tie_word_embeddings=True,
        )
        return transformers.LlamaForCausalLM(config)
    config = transformers.MambaConfig(
        **common, num_hidden_layers=7, state_size=16, expand=2, tie_word_embeddings=False, initializer_range=0.02
    )
    return transformers.MambaForCausalLM(config)


def speed_up(model: Any) -> None:
    """Give Mamba mixers the forward with the scan in C. A model without mixers stays as it is."""
    for module in model.modules():
        if type(module).__name__ == "MambaMixer":
            Scan.compile(module.ssm_state_size)
            module.forward = lambda hidden, _mixer=module, **_: fast_mixer(_mixer, hidden)


def add_dropout(model: Any, share: float) -> None:
    """Dropout, while training, on the embeddings and the output of every attention, MLP and mixer: the text is read many times."""
    for name, module in model.named_modules():
        if name.endswith((".embed_tokens", ".embeddings", ".self_attn.o_proj", ".mlp.down_proj", ".mixer")):
            module.register_forward_hook(lambda m, _, y: F.dropout(y, share, m.training))


def make_tokenizer(words: str) -> Any:
    """Byte-level BPE with VOCABULARY tokens learnt from `words`; token 0 is <|endoftext|>."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(words.splitlines(keepends=True), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False
    )


# --- training


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices only; not on norms, biases, convolutions and the scan's A_log and D."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.endswith("A_log")]
    kept = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]


def train(
    model: Any, tokens: torch.Tensor, held_out: torch.Tensor, kind: str, budget: float, checkpoint: Path | None
) -> dict[str, Any]:
    """Train until the process has used `budget` seconds of CPU; leaves the best weights in `model`.

    tokens (n,): rows are drawn from it at random; held_out (rows, CONTEXT).
    """
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(groups(model), lr=PEAK[kind], betas=(0.9, 0.95))
    best: tuple[float, dict[str, torch.Tensor]] = (math.inf, {})
    step, evaluated, recent = 0, 0, 0.0
    while True:
        used = time.process_time() / budget
        if used * EVALUATIONS >= evaluated + 1 or used >= 1:
            evaluated = math.floor(used * EVALUATIONS)
            model.eval()
            value = text.perplexity(lambda ids: scores(model, ids), held_out)
            model.train()
            print(
                f"{time.process_time() / 60:6.1f} CPU min, step {step:6}: loss {recent:.3f}, held-out perplexity {value:.2f}",
                flush=True,
            )
            if value < best[0]:
                best = (value, {n: t.detach().clone() for n, t in model.state_dict().items()})
                if checkpoint is not None:
                    with new_file(checkpoint, force=True) as file:
                        torch.save(best[1], file)
        if used >= 1:
            break
        rate = min(used / WARM_UP, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * used)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK[kind] * rate
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        ids = tokens[starts + torch.arange(CONTEXT + 1)]  # (BATCH, CONTEXT + 1)
        loss = F.cross_entropy(scores(model, ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
    model.load_state_dict(best[1])
    return {"steps": step, "tokens_seen": step * BATCH * CONTEXT}


def scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(batch, time) to logits (batch, time, vocabulary); matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, use_cache=False).logits


def amend(path: Path, **values: str) -> None:
    """Set values of a JSON file."""
    path.write_text(to_json(json.loads(path.read_text()) | values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(PEAK))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--cpu-minutes", type=float, default=30.0)
    parser.add_argument("--checkpoint", type=Path, help="keep the best weights so far in this file while training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    torch.manual_seed(SEED)
    model = make(options.kind)
    words = text.training_text()
    tokenizer = make_tokenizer(words)
    tokens, held_out = (torch.tensor(tokenizer.encode(t)) for t in (words, text.held_out_text()))
    rows = text.windows(held_out, CONTEXT)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens", flush=True)
    speed_up(model)
    add_dropout(model, DROPOUT[options.kind])
    facts = train(model.train(), tokens, rows, options.kind, options.cpu_minutes * 60, options.checkpoint)

    model.eval()
    model.half().float()  # what is measured is what is kept
    with new_folder(options.output) as folder:
        value = text.perplexity(lambda ids: model(input_ids=ids, use_cache=False).logits, rows)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        amend(folder / "config.json", dtype="float32")  # kept in 16 bits, computed in 32
        amend(
            folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
        )  # known to old and new versions
        facts |= {"held_out_perplexity": round(value, 3), "held_out_tokens": rows.numel(), "context": CONTEXT}
        facts |= {"parameters": sum(p.numel() for p in model.parameters()), "training_tokens": len(tokens)}
        facts |= {"cpu_minutes": round(time.process_time() / 60, 1), "command": f"train_text.py {options.kind}"}
        (folder / "training.json").write_text(to_json(facts))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
