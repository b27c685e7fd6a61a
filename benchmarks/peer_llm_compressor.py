"""llm-compressor on a Hugging Face folder: run by benchmarks/peers.py in a process of its own, with an interpreter that has it.

    PYTHON benchmarks/peer_llm_compressor.py METHOD FOLDER CALIBRATION.npy EVALUATION.npy

CALIBRATION and EVALUATION are token windows (n, length) int64. Standard output: one JSON line {"perplexity", "seconds",
"peak_bytes", "version"}: of the model with its weights (and activations, where the method has them) quantized, as llm-compressor's
own modules compute it; wall time of `oneshot` and of packing the weights, which `oneshot` leaves in float, and how far the peak memory
rose meanwhile. The forward pass behind the measurement unpacks them again.

AWQ is not compared: its modifier (0.14) pins memory of an accelerator and ends with an error on a machine that has none.
"""

import json
import math
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from peer_layers import Peak
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def recipe(method):
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    def weights(bits, group):
        return {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": group,
                },
            }
        }

    ignore = ["lm_head"]
    kinds = {
        "rtn": lambda b, g: [QuantizationModifier(config_groups=weights(b, g), ignore=ignore)],
        "gptq": lambda b, g: [GPTQModifier(config_groups=weights(b, g), ignore=ignore, actorder="static")],
    }
    if method == "smoothquant-w8a8":
        return [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(targets="Linear", scheme="W8A8", ignore=ignore)]  # fmt: skip
    name, bits, group = method.split("-")
    return kinds[name](int(bits.removeprefix("w")), int(group.removeprefix("g")))


def main():
    method, folder, calibration, evaluation = sys.argv[1:]
    torch.set_num_threads(1)
    import llmcompressor
    from compressed_tensors.compressors import ModelCompressor
    from llmcompressor import oneshot

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = np.load(calibration)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="\n")
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
    peak, started = Peak(), time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe(method),
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
    )
    packer = ModelCompressor.from_pretrained_model(model)
    assert packer is not None
    packer.compress_model(model)
    seconds = time.perf_counter() - started
    rose = peak.rose()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in torch.from_numpy(np.load(evaluation)).split(8):
            scores = model(input_ids=ids).logits[:, :-1].float()
            total += F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
    result = {"perplexity": math.exp(total / count), "seconds": seconds, "peak_bytes": rose, "version": llmcompressor.__version__}  # fmt: skip
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
