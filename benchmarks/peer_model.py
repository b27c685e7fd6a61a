"""planish on a Hugging Face folder: run by benchmarks/peers.py in a process of its own.

    python benchmarks/peer_model.py PASSES FOLDER CALIBRATION.npy EVALUATION.npy

PASSES is a JSON list of YAML passes. Output as that of peer_llm_compressor.py: {"perplexity", "seconds", "peak_bytes", "version"}.
"""

import json
import sys

import low_bit
import numpy as np
import planish
import torch
from peer_layers import Peak
from planish.common import memory
from planish.compress import evaluation, load
from planish.compress.data import Data, check


def main():
    passes, folder, calibration, evaluated = sys.argv[1:]
    torch.set_num_threads(1)
    model = load.load(folder)
    data = check(Data({"input_ids": np.load(calibration)}, None, "calibration"), model.inputs)
    for parameter in model.graph.parameters():
        parameter.sum()  # weights are mapped from their file; the other tool's are in memory when its measurement starts
    memory.return_freed()  # as `planish compress` does for mapped weights
    peak = Peak()
    compressed, seconds = low_bit.quantize(model, json.loads(passes), data)
    rose = peak.rose()
    value = evaluation.perplexity(evaluation.language(compressed), np.load(evaluated)).value
    print(json.dumps({"perplexity": value, "seconds": seconds, "peak_bytes": rose, "version": planish.__version__}))


if __name__ == "__main__":
    main()
